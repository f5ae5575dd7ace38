"""Command line: `python -m mnet_fx demo`, also installed as `mnet-fx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mnet-fx", description="Exactly reversible momentum networks from residual models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="one step of ResNet-101, plain and rewritten: report, bytes, proof (under two minutes)")
    demo.add_argument("--batch", type=int, default=8, help="images in the batch (default 8)")
    demo.add_argument("--pixels", type=int, default=128, help="height and width of the images (default 128)")
    demo.add_argument("--gamma", type=float, default=0.9, help="momentum in [0, 1) (default 0.9)")
    demo.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    options = parser.parse_args(arguments)
    import torch  # after parsing, so that --help is quick

    from .demo import demo as run_demo

    torch.set_num_threads(options.threads)
    return run_demo(options.batch, options.pixels, options.gamma)


if __name__ == "__main__":
    sys.exit(main())
