"""The commands: each reads its arguments, asks one function of mnet_fx, and says what that found."""

from __future__ import annotations

import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..progress import working
from .options import (
    MOMENTUM_NAMES,
    device_option,
    given,
    input_options,
    loss_option,
    model_arguments,
    momentum_options,
    output_options,
    said,
)

__all__ = ["bench", "demo", "estimate", "plan", "report", "verify"]

_TEXTS = {"text": "", "json": ".json"}
_REPORTS = {"text": "", "table": ".txt", "markdown": ".md", "csv": ".csv", "json": ".json", "html": ".html"}
_TABLES = {"text": "", "markdown": ".md", "csv": ".csv", "json": ".json"}
_MEMORY = "What there is, such as 16GiB: does a step fit, how large may batch and depth be? Status 1 where it does not fit."
_BUDGET = "What a step may take in all, such as 16GiB; or a number below 1, relative to plain training."
_GPUS = ("NVIDIA H100", "NVIDIA A100", "NVIDIA L4", "AMD MI350X", "AMD MI300X", "AMD MI300A", "AMD MI210X")


_choice_of_plot = click.option(
    "--plot",
    type=click.Choice(["bars", "batch", "depth", "gamma"]),
    default="bars",
    show_default=True,
    help="What a picture shows: the parts of each way, or the total as batch, depth or gamma vary.",
)


@contextmanager
def _asked(model: str, call: str) -> Iterator[None]:
    """Turns what goes wrong into an error that names the argument; warnings of mnet_fx are one line each."""
    from mnet_fx.errors import MnetError, MnetWarning, SettingsError

    before = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, MnetWarning):
            click.echo(f"Warning: {message}", err=True)
        else:
            before(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except click.ClickException:
            raise
        except SettingsError as error:
            raise _setting(str(error)) from error
        except MnetError as error:
            raise click.ClickException(f"{model}: {error}") from error
        except Exception as error:
            shape = f" with --input {call}" if call else ""
            raise click.ClickException(f"{model} could not be run{shape}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What went wrong at first, in one paragraph, and where in code that is not torch's."""
    text = str(error)
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    places += [(f.filename, str(f.lineno), f.name) for f in traceback.extract_tb(error.__traceback__)] if not places else []
    own = [f"{file}:{line} in {name}" for file, line, name in places if not {"torch", "mnet_fx"} & {*file.replace("\\", "/").split("/")}]
    said = " ".join(str(error).split()[:60])
    return f"{type(error).__name__}: {said}" + (f" (at {own[-1]})" if own else "")


def _setting(message: str) -> click.BadParameter:
    """An option of mnet_fx that cannot work, by its name on the command line."""
    first = message.replace("=", " ").split()[0].strip(":,'\"()")
    name = "--input" if first == "example_inputs" else f"--{first.replace('_', '-')}" if first in _NAMED else None
    name = "--regions" if name is None and "container" in message else name
    return click.BadParameter(message, param_hint=name)


_NAMED = frozenset({*MOMENTUM_NAMES, "memory", "gpu", "optimizer", "loss"})


def _made(model: str, kwargs: tuple[str, ...], inputs: tuple[str, ...], seed: int, device: str, needed: bool = True) -> tuple[Any, Any]:
    """The model, in train mode on the device, and a call of it."""
    import torch

    from .inputs import Call, made
    from .models import keywords, load

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # the error says it
    torch.manual_seed(seed)
    loaded = load(model, keywords(kwargs))
    texts = inputs or loaded.inputs
    if needed and not texts:
        raise click.BadParameter(f"what {model} takes is not known: give the shape, as in --input 8x3x224x224", param_hint="--input")
    if texts and not inputs:
        click.echo(f"inputs: {' '.join(texts)} (by default; --input says otherwise)", err=True)
    try:
        call = made(texts, device) if texts else Call((), {}, "")
        return loaded.model.train().to("cpu" if device == "meta" else device), call
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{device!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device") from error


@click.command()
@model_arguments
@input_options
@click.option("--optimizer", metavar="NAME", help="Of torch.optim, such as AdamW: count its state too.")
@click.option("--memory", metavar="SIZE", help=_MEMORY)
@click.option("--gpu", metavar="NAME", help="Estimate seconds on a GPU, such as 'NVIDIA H100'.", shell_complete=lambda *_: list(_GPUS))
@click.option("--values", is_flag=True, help="Run the forward pass once on the CPU, and see what only values decide: bits put aside.")
@loss_option
@_choice_of_plot
@momentum_options
@output_options(_TEXTS, pictures=True)
def estimate(model: str, kwargs: Any, inputs: Any, seed: int, memory: Any, plot: str, fmt: Any, output: Any, **options: Any) -> int:
    """Say what a training step of MODEL will take, before it runs: plain, with checkpoints, as a momentum network."""
    import mnet_fx

    net, call = _made(model, kwargs, inputs, seed, "cpu" if options["values"] else "meta")
    with _asked(model, call.text), working(f"estimating {model}"):
        extra = {"optimizer": _optimizer(options["optimizer"]), "memory": memory, "gpu": options["gpu"], "loss": _loss(options["loss"])}
        found = mnet_fx.estimate(net, call.example_inputs, values=options["values"], **extra, **given(options))
        fits = memory is None or found.fits(memory)
        against = None if plot == "bars" else plot
        said(fmt, output, _TEXTS, _texts(found), lambda path: found.plot(path, against=against))
    return 0 if fits else 1


@click.command()
@model_arguments
@input_options
@click.option("--memory", metavar="SIZE", required=True, help=_BUDGET)
@click.option("--optimizer", metavar="NAME", help="Of torch.optim, such as AdamW: count its state too.")
@loss_option
@momentum_options
@output_options(_TEXTS)
def plan(model: str, kwargs: Any, inputs: Any, seed: int, memory: str, fmt: Any, output: Any, **options: Any) -> int:
    """Choose what MODEL keeps and what it runs again, so that a training step fits in --memory."""
    import mnet_fx

    net, call = _made(model, kwargs, inputs, seed, "meta")
    with _asked(model, call.text), working(f"planning {model}"):
        share = float(memory) if re.fullmatch(r"0?\.\d+", memory) else memory
        extra = {"optimizer": _optimizer(options["optimizer"]), "loss": _loss(options["loss"])}
        found = mnet_fx.plan(net, call.example_inputs, memory=share, **extra, **given(options))
        said(fmt, output, _TEXTS, _texts(found))
    return 0


@click.command()
@model_arguments
@input_options
@momentum_options
@output_options(_REPORTS, pictures=True)
def report(model: str, kwargs: Any, inputs: Any, seed: int, fmt: str | None, output: str | None, **options: Any) -> int:
    """Say what would be rewritten of MODEL, what would not, why, and which bytes are kept. Status 1 if there is no residual chain."""
    import mnet_fx

    net, call = _made(model, kwargs, inputs, seed, "meta", needed=False)
    with _asked(model, call.text):
        with working(f"reading {model}"):
            found = mnet_fx.report(net, call.example_inputs if call.text else None, **given(options))
        write: dict[str, Callable[[], str]] = {
            "text": lambda: str(found),
            "table": found.table,
            "markdown": lambda: found.table("github"),
            "csv": found.to_csv,
            "json": found.to_json,
            "html": lambda: found.to_html(model),
        }
        said(fmt, output, _REPORTS, lambda name: write[name](), found.plot)
    return 0 if found.regions else 1


@click.command()
@model_arguments
@input_options
@device_option
@loss_option
@momentum_options
@output_options(_TEXTS)
def verify(model: str, kwargs: Any, inputs: Any, seed: int, device: str, loss: Any, fmt: Any, output: Any, **options: Any) -> int:
    """Prove on MODEL that its rewritten form is sound and its gradients are exact. Status 1 if a check fails."""
    import mnet_fx

    net, call = _made(model, kwargs, inputs, seed, device)
    with _asked(model, call.text):
        with working(f"verifying {model}"):
            rewritten = mnet_fx.momentumize(net, call.example_inputs, **given(options))
            found = mnet_fx.verify(rewritten, *call.args, loss=_loss(loss), **call.kwargs)
        said(fmt, output, _TEXTS, _texts(found))
    return 0 if found.ok else 1


@click.command()
@model_arguments
@input_options
@device_option
@loss_option
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed steps of each way.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
@momentum_options
@output_options(_TABLES, pictures=True)
def bench(model: str, kwargs: Any, inputs: Any, seed: int, device: str, fmt: Any, output: Any, **options: Any) -> int:
    """Run training steps of MODEL, plain, with checkpoints and as a momentum network: seconds and bytes, measured."""
    import torch

    from .bench import benched

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    net, call = _made(model, kwargs, inputs, seed, device)
    with _asked(model, call.text):
        found = benched(net, call, given(options), _loss(options["loss"]), options["rounds"])
        said(fmt, output, _TABLES, found.said, found.plot)
    return 0 if found.steps else 1


@click.command()
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images in the batch.")
@click.option("--pixels", type=click.IntRange(33), default=128, show_default=True, help="Height and width of the images.")
@click.option("--gamma", type=click.FloatRange(0, 1, max_open=True), default=0.9, show_default=True, help="Momentum in [0, 1).")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads of torch.")
def demo(batch: int, pixels: int, gamma: float, threads: int) -> int:
    """One step of ResNet-101, plain and rewritten: report, bytes, proof (under two minutes)."""
    import torch

    from .demo import demo as run_demo

    torch.set_num_threads(threads)
    return run_demo(batch, pixels, gamma)


def _texts(found: Any) -> Callable[[str], str]:
    return lambda name: json.dumps(found.to_dict(), indent=2) if name == "json" else str(found)


def _optimizer(name: str | None) -> Any:
    """A class of torch.optim."""
    import torch

    if name is None:
        return None
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        from difflib import get_close_matches

        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
        close = get_close_matches(name, known, n=3, cutoff=0.4)
        more = f"; did you mean {' or '.join(close)}?" if close else ""
        raise click.BadParameter(f"torch.optim has no optimizer {name!r}{more}", param_hint="--optimizer")
    return found


def _loss(text: str | None) -> Any:
    from .models import found

    return None if text is None else found(text, "--loss")
