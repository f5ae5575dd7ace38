"""Options that commands share, where what they say goes, and progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "MOMENTUM_NAMES",
    "device_option",
    "given",
    "input_options",
    "loss_option",
    "model_arguments",
    "momentum_options",
    "output_options",
    "said",
]

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

PICTURES = (".png", ".svg", ".pdf")


def _choice(name: str, choices: str, text: str) -> Any:
    """An option with a few values, of which the first is the default."""
    values = choices.split()
    return click.option(name, type=click.Choice(values), default=values[0], show_default=True, help=text)


def _all(*decorators: Any) -> Decorator[Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class _Granularity(click.Choice):
    """A choice, or a number of blocks."""

    def __init__(self) -> None:
        super().__init__(["add", "module"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return int(value) if str(value).isdecimal() and int(value) > 0 else super().convert(value, param, ctx)


GRANULARITY = "A step for each residual add, for each repeated block, or for every so many blocks (a number)."
GAMMA = "Momentum in [0, 1): near 1 takes least memory, near 0 is closest to the original."
KWARGS = "Argument of what makes the model, or a JSON object of such; may be repeated."
INPUT = "A tensor that the model takes, such as 8x3x224x224 or 2x64:int64:0-50256, or file.py:function for all; may be repeated."
LOSS = "Function (output) -> loss; by default output.loss, or the sum of all outputs."

momentum_options = _all(
    click.option("--gamma", type=float, default=0.9, show_default=True, help=GAMMA),
    _choice("--initial-velocity", "zero first", "v[0] = 0, or the speed of the first residual."),
    _choice("--weights", "momentum matched signed", "Weights of the residuals: as in the paper; closest to the original; with signs."),
    click.option("--granularity", type=_Granularity(), default="add", show_default=True, help=GRANULARITY),
    click.option("--regions", multiple=True, metavar="PATH", help="Make the layers of this list steps; may be repeated; or auto."),
    _choice("--backward", "reversible stored", "Take chains back, or store activations."),
    click.option("--min-steps", type=click.IntRange(1), default=2, show_default=True, help="Leave shorter chains alone."),
    _choice("--on-drift", "raise warn ignore", "What to do when a step does not repeat."),
    _choice("--precision", "standard high", "High also where elements never mix, for 4 bytes more per element."),
    _choice("--rest", "store checkpoint", "What becomes of what lies outside of chains."),
    click.option("--offload", is_flag=True, help="Chains that wait on CUDA leave their state in memory of the host."),
    click.option("--inner", default="eager", show_default=True, help="What runs the steps: eager, inductor, any backend of torch.compile."),
)
MOMENTUM_NAMES = (
    "gamma", "initial_velocity", "weights", "granularity", "regions", "backward", "min_steps", "on_drift", "precision", "rest", "inner",
    "offload",
)  # fmt: skip

model_arguments = _all(click.argument("model"), click.option("--kwargs", multiple=True, metavar="NAME=VALUE", help=KWARGS))
input_options = _all(
    click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:DTYPE[:LOW-HIGH]]", help=INPUT),
    click.option("--seed", type=int, default=0, show_default=True, help="Of weights and inputs."),
)
device_option = click.option("--device", default="cpu", show_default=True, help="Where to run, such as cuda.")
loss_option = click.option("--loss", metavar="FILE.PY:FUNCTION", help=LOSS)


def output_options(formats: Mapping[str, str], pictures: bool = False) -> Decorator[Any]:
    """The options --format and --output of a command.

    Args:
        formats: its formats, each with the suffix of files that stands for it, or an empty text.
        pictures: whether it draws, where a file has the suffix of a picture.
    """
    suffixes = [suffix for suffix in formats.values() if suffix] + [*PICTURES] * pictures
    where = f"File to write; its suffix decides the format: {', '.join(suffixes)}."
    return _all(
        click.option("--format", "fmt", type=click.Choice([*formats]), help="How to say it; by default text, or what --output ends in."),
        click.option("--output", "-o", type=click.Path(dir_okay=False), help=where),
    )


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `momentumize` among those of a command."""
    found = {name: options[name] for name in MOMENTUM_NAMES}
    regions = list(found["regions"]) or None
    return {**found, "regions": "auto" if regions == ["auto"] else regions}


def said(
    fmt: str | None,
    output: str | None,
    formats: Mapping[str, str],
    write: Callable[[str], str],
    draw: Callable[[str], Any] | None = None,
) -> None:
    """Says a result, on the terminal or in a file; where the file is a picture, on the terminal as well.

    Args:
        fmt, output, formats: as of `output_options`.
        write: gives the text in a format.
        draw: draws a picture into a file.
    """
    suffix = Path(output).suffix.lower() if output else ""
    if output and not Path(output).resolve().parent.is_dir():
        raise click.BadParameter(f"the folder of {output!r} is not there", param_hint="--output")
    if output and suffix in PICTURES and fmt is None:
        if draw is None:
            raise click.BadParameter(f"{output!r} is a picture, which this command does not draw", param_hint="--output")
        draw(output)
        click.echo(write("text").rstrip("\n"))
    else:
        of_suffix = next((name for name, known in formats.items() if known and known == suffix), "text")
        text = write(fmt or of_suffix)
        if output is None:
            click.echo(text.rstrip("\n"))
            return
        try:
            Path(output).write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise click.BadParameter(f"{output!r} cannot be written: {error.strerror}", param_hint="--output") from error
    click.echo(f"wrote {output}", err=True)
