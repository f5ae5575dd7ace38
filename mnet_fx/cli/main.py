"""The commands of `mnet-fx`.

The parser is click: it checks values, names the option in every error, writes the help, and completes words in bash, zsh and fish without
another package. typer would add rich and shellingham on top of it for the same; argparse completes nothing and would need shtab. Tables
are tabulate's and progress tqdm's, as everywhere in mnet_fx.

torch is imported when a command runs, so that help and completion are quick.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from .commands import bench, demo, estimate, plan, report, verify

__all__ = ["main"]

_EPILOG = """\b
MODEL is one of
  torchvision:resnet101              a model of torchvision, random weights
  timm:vit_tiny_patch16_224          a model of timm, random weights
  hf:GPT2LMHeadModel                 a model or config of transformers; --kwargs go to the config
  hf:path/to/folder                  a saved config, with its weights where there are any
  package.module:factory             a class or function of yours that makes the model, or the model
  file.py:factory                    the same in a file

\b
Examples
  mnet-fx estimate torchvision:resnet101 --input 64x3x224x224 --memory 16GiB
  mnet-fx report timm:vit_tiny_patch16_224 --output report.html
  mnet-fx verify model.py:Net --kwargs depth=12 --input 8x64:int64:0-999 --gamma 0.1
  mnet-fx bench hf:GPT2LMHeadModel --kwargs n_layer=4 --input input_ids=2x128:int64:0-50256

\b
Exit status
  0  all is well
  1  it is not: a check failed, it does not fit in --memory, or there is no residual chain
  2  an argument is wrong, or the model could not be made or run

Completion of words: eval "$(mnet-fx completion bash)", or zsh, or fish.
"""


def _version(context: click.Context, _: Any, asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"mnet-fx {version('mnet-fx')}")
        except PackageNotFoundError:
            click.echo("mnet-fx (not installed)")
        context.exit()


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show where in Python an error came from.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Train deep residual models without storing their activations, bit for bit exact: what it will save, what it does, and the proof."""
    context.obj = {"debug": debug}


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes words in a shell: eval "$(mnet-fx completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "mnet-fx", "_MNET_FX_COMPLETE").source())


for _command in (estimate, plan, report, verify, bench, demo):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: those after the name of the program; by default those of the process.

    Returns:
        The exit status; see `mnet-fx --help`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("mnet_fx").setLevel(logging.ERROR)
    try:
        result = cli.main(given, prog_name="mnet-fx", standalone_mode=False, complete_var="_MNET_FX_COMPLETE")
    except click.ClickException as error:
        _traceback(given)
        error.show()
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except BrokenPipeError:  # as where the output is read by head
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0


def _traceback(arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
