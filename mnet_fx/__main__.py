"""Command line: `python -m mnet_fx demo`, also installed as `mnet-fx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

__all__ = ["main"]


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
        return int(text)

    return whole_number


def _momentum(text: str) -> float:
    try:
        gamma = float(text)
    except ValueError:
        gamma = -1.0
    if not 0 <= gamma < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return gamma


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mnet-fx", description="Exactly reversible momentum networks from residual models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="one step of ResNet-101, plain and rewritten: report, bytes, proof (under two minutes)")
    demo.add_argument("--batch", type=_at_least(1), default=8, help="images in the batch (default 8)")
    demo.add_argument("--pixels", type=_at_least(33), default=128, help="height and width of the images, 33 or more (default 128)")
    demo.add_argument("--gamma", type=_momentum, default=0.9, help="momentum in [0, 1) (default 0.9)")
    demo.add_argument("--threads", type=_at_least(1), default=2, help="threads of torch (default 2)")
    options = parser.parse_args(arguments)
    import torch  # after parsing, so that --help is quick

    from .demo import demo as run_demo

    torch.set_num_threads(options.threads)
    return run_demo(options.batch, options.pixels, options.gamma)


if __name__ == "__main__":
    sys.exit(main())
