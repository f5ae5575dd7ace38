"""The command line, driven in this process, as a subprocess, and in a pseudo-terminal."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import jsonschema
import pytest
import torch

from mnet_fx.cli import inputs, models
from mnet_fx.cli.main import main
from mnet_fx.reporting import data

OWN = '''
import time

import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

class Net(nn.Module):
    """A model as people write them."""

    def __init__(self, depth=4, d=16):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block(d) for _ in range(depth)), nn.Linear(d, 3)

    def forward(self, x, scale=1.0):
        for layer in self.layers:
            x = x + layer(x * scale)
        return self.head(x)

class Clock(Block):
    def forward(self, x):
        return x + super().forward(x) * (1 + time.perf_counter() % 1)

class Timed(nn.Module):
    """Reads the clock in each step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Clock(16) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

ready = Net(2)
number = 3

def fails():
    raise RuntimeError("no weights here")

def batch():
    return {"x": torch.ones(4, 16), "scale": 0.5}

def loss(output):
    return output.square().mean()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's file, in which the command line runs."""
    made = tmp_path_factory.mktemp("own")
    (made / "own_model.py").write_text(OWN)
    (made / "broken.py").write_text("import torch\nraise ImportError('half a module')\n")
    before = Path.cwd()
    os.chdir(made)
    yield made
    os.chdir(before)
    sys.path[:] = [path for path in sys.path if path != str(made)]


@pytest.fixture
def run(folder, capsys):
    """Runs one command in this process; gives its status, and what it wrote to stdout and to stderr."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


NET = ("own_model.py:Net", "--input", "4x16")

# ---- report


def test_report_says_what_would_be_rewritten(run):
    status, out, err = run("report", *NET)
    assert (status, err) == (0, "")
    assert out.startswith("4 of 4 residual adds rewritten, in 1 region(s)")


@pytest.mark.parametrize("fmt", ["text", "table", "markdown", "csv", "json", "html"])
def test_report_has_formats(run, fmt):
    status, out, _ = run("report", *NET, "--format", fmt)
    assert status == 0
    if fmt == "json":
        jsonschema.validate(json.loads(out), data.schema())
    if fmt == "csv":
        assert [line["step"] for line in csv.DictReader(io.StringIO(out))] == ["0", "1", "2", "3"]
    if fmt == "markdown":
        assert out.startswith("| part ")
    if fmt == "html":
        assert out.startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["r.json", "r.csv", "r.md", "r.html", "r.txt", "r.png", "r.svg"])
def test_the_suffix_of_the_file_is_the_format(run, folder, name):
    status, out, err = run("report", *NET, "--output", name)
    assert (status, err) == (0, f"wrote {name}\n")
    assert bool(out) == (name in ("r.png", "r.svg"))  # a picture goes with the text
    start = (folder / name).read_bytes()[:20]
    known = {".json": b"{", ".csv": b"index,", ".md": b"|", ".html": b"<!doctype", ".txt": b"part", ".png": b"\x89PNG", ".svg": b"<?xml"}
    assert start.startswith(known[Path(name).suffix])


def test_report_takes_the_options_of_momentumize(run):
    options = ("--gamma", "0.1", "--weights", "matched", "--initial-velocity", "first", "--precision", "high", "--backward", "stored")
    _, out, _ = run("report", *NET, *options, "--format", "json")
    (region,) = json.loads(out)["regions"]
    assert (region["gamma_min"], region["storage"]) == (0.1, "autograd")
    assert json.loads(run("report", *NET, "--regions", "layers", "--format", "json")[1])["captured"][0]["front_end"] == "named"
    assert run("report", *NET, "--min-steps", "5")[0] == 1


def test_a_model_without_a_chain_has_status_one(run):
    status, out, _ = run("report", "own_model.py:Net", "--kwargs", "depth=1", "--input", "4x16")
    assert status == 1
    assert "too_short" in out


def test_without_inputs_it_is_a_preview(run):
    status, out, _ = run("report", "own_model.py:Net")
    assert status == 0
    assert "A preview, read without inputs" in out


# ---- estimate, verify, bench


def test_estimate(run, folder):
    status, out, err = run("estimate", *NET, "--optimizer", "AdamW", "--memory", "1GiB", "--format", "json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["ways"]["momentum"]["kept_bytes"] < found["ways"]["plain"]["kept_bytes"]
    assert found["optimizer"] == "AdamW"
    status, out, _ = run("estimate", *NET, "--memory", "2KiB")
    assert status == 1
    assert re.search(r"fits in 2.00 KiB +no +no", out)
    assert run("estimate", *NET, "--output", "bars.png")[0] == 0
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_estimate_with_values(run):
    _, sizes, _ = run("estimate", *NET, "--gamma", "0.001")
    status, values, err = run("estimate", *NET, "--gamma", "0.001", "--values")
    assert (status, err) == (0, "")
    assert "values=True looks" in sizes
    assert "values=True looks" not in values


@pytest.mark.parametrize("against", ["batch", "depth"])
def test_estimate_in_a_picture_against(run, folder, against):
    assert run("estimate", *NET, "--output", f"{against}.svg", "--plot", against)[0] == 0
    assert (folder / f"{against}.svg").read_bytes().startswith(b"<?xml")


def test_plan(run):
    status, out, err = run("plan", *NET, "--memory", "0.99")
    assert (status, err) == (0, "")
    assert re.search(r"rest='checkpoint', keep=\d+", out)
    status, out, _ = run("plan", *NET, "--memory", "1GiB", "--optimizer", "AdamW", "--format", "json", "--gamma", "0.5")
    found = json.loads(out)
    assert (status, found["memory"], found["options"]["gamma"]) == (0, 2**30, 0.5)
    assert found["predicted"]["parts"]["optimizer state"] > 0
    status, _, err = run("plan", *NET, "--memory", "2KiB")
    assert status == 2
    assert "does not fit in 2.00 KiB: with the least kept" in err
    assert run("plan", *NET, "--memory", "1GiB", "--regions", "layers")[0] == 2


def test_verify_says_whether_all_is_well(run):
    status, out, err = run("verify", *NET, "--loss", "own_model.py:loss")
    assert (status, err) == (0, "")
    assert "all checks passed" in out
    assert json.loads(run("verify", *NET, "--format", "json")[1])["ok"] is True


def test_verify_of_a_model_that_does_not_repeat_has_status_one(run):
    status, out, _ = run("verify", "own_model.py:Timed", "--input", "4x16", "--regions", "layers")
    assert status == 1
    assert out.startswith("Timed: NOT verified")
    assert re.search(r"exact +NO", out)


def test_bench(run):
    status, out, _ = run("bench", *NET, "--rounds", "1", "--format", "json")
    found = json.loads(out)
    assert status == 0
    assert {row["way"] for row in found["rows"]} >= {"plain", "momentum"}
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    _, out, _ = run("bench", "own_model:Net", "--input", "4x16", "--rounds", "1")
    assert re.search(r"^momentum +\S+ KiB", out, re.MULTILINE)


# ---- models


@pytest.mark.parametrize(
    ("model", "kwargs", "kind"),
    [
        ("own_model.py:Net", ["depth=2", "d=8"], "Net"),
        ("own_model.py:Net", ['{"depth": 2, "d": 8}'], "Net"),
        ("own_model:Net", ["depth=3"], "Net"),
        ("own_model.py:ready", [], "Net"),
        ("torch.nn:Linear", ["in_features=3", "out_features=2"], "Linear"),
        ("torch:nn.Linear", ["in_features=3", "out_features=2", "bias=false"], "Linear"),
        ("torchvision:resnet18", ["num_classes=7"], "ResNet"),
        ("hf:BertConfig", ["hidden_size=8", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=8"], "BertModel"),
        ("hf:GPT2LMHeadModel", ["n_embd=8", "n_layer=2", "n_head=2", "vocab_size=50"], "GPT2LMHeadModel"),
    ],
)
def test_models_have_names(folder, model, kwargs, kind):
    loaded = models.load(model, models.keywords(kwargs))
    assert type(loaded.model).__name__ == kind
    assert isinstance(loaded.model, torch.nn.Module)


def test_an_encoder_with_a_decoder_is_given_inputs_for_both(folder):
    sizes = ["d_model=8", "d_kv=4", "d_ff=8", "num_layers=2", "num_heads=2", "vocab_size=20"]
    assert [text.split("=")[0] for text in models.load("hf:T5Config", models.keywords(sizes)).inputs] == ["input_ids", "decoder_input_ids"]


def test_models_of_timm(folder):
    pytest.importorskip("timm")
    loaded = models.load("timm:vit_tiny_patch16_224", {"depth": 2})
    assert loaded.inputs == ("2x3x224x224",)
    assert len(loaded.model.blocks) == 2


def test_a_saved_model_has_its_weights(folder):
    transformers = pytest.importorskip("transformers")
    small = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(small)
    model.save_pretrained(folder / "saved")
    loaded = models.load("hf:saved", {})
    assert torch.equal(loaded.model.transformer.wte.weight, model.transformer.wte.weight)
    assert loaded.inputs == ("input_ids=2x16:int64:0-49",)
    (folder / "alone").mkdir()
    (folder / "alone" / "config.json").write_text((folder / "saved" / "config.json").read_text())
    assert type(models.load("hf:alone/config.json", {}).model) is type(model)


WRONG = [  # arguments, and what the error must name
    (["reprot", "x"], "No such command 'reprot'"),
    (["report"], "Missing argument 'MODEL'"),
    (["report", "resnet101"], "'resnet101' names no model: it must be torchvision:NAME"),
    (["report", "torchvision:resnet1O1"], "MODEL: torchvision has no model 'resnet1O1'; did you mean resnet101"),
    (["report", "hf:GPT2Confg"], "did you mean GPT2Config"),
    (["report", "nowhere.py:Net"], "MODEL: there is no file 'nowhere.py'"),
    (["report", "no_such_module:Net"], "there is no module 'no_such_module'"),
    (["report", "broken.py:Net"], "broken.py fails when it is imported: ImportError: half a module"),
    (["report", "own_model.py:Nett"], "own_model.py has no 'Nett'; did you mean Net"),
    (["report", "own_model.py:number"], "own_model.py:number is a int: neither a model nor a function"),
    (["report", "own_model.py:batch"], "own_model.py:batch gave a dict, and not a torch.nn.Module"),
    (["report", "own_model.py:fails"], "own_model.py:fails could not be made: RuntimeError: no weights here"),
    (["report", "own_model.py:Net", "--kwargs", "dept=3"], "MODEL or --kwargs: own_model.py:Net(dept=3): TypeError"),
    (["report", "own_model.py:Net", "--kwargs", "depth"], "--kwargs: must be name=value or a JSON object, got 'depth'"),
    (["report", "own_model.py:ready", "--kwargs", "depth=3"], "--kwargs: own_model.py:ready is a model already"),
    (["report", *NET[:2], "4x16x"], "--input: '4x16x' is no shape"),
    (["report", *NET[:2], "4x16:float33"], "--input: '4x16:float33' has the dtype 'float33'"),
    (["report", *NET[:2], "4x17"], "could not be run with --input 4x17: RuntimeError: a and b must have same reduction dim"),
    (["report", *NET[:2], "own_model.py:nothing"], "--input: own_model.py has no 'nothing'"),
    (["report", *NET, "--gamma", "1.5"], "--gamma: gamma must be a number in [0, 1), got 1.5"),
    (["report", *NET, "--gamma", "high"], "'--gamma': 'high' is not a valid float"),
    (["report", *NET, "--weights", "own"], "'--weights': 'own' is not one of 'momentum', 'matched', 'signed'"),
    (["report", *NET, "--weights", "matched", "--min-steps", "0"], "'--min-steps': 0 is not in the range x>=1"),
    (["report", *NET, "--regions", "layer"], "--regions: "),
    (["report", *NET, "--format", "xml"], "'--format': 'xml' is not one of"),
    (["report", *NET, "--output", "nowhere/r.json"], "--output: the folder of 'nowhere/r.json' is not there"),
    (["report", *NET, "--inner", "mnet_fx"], "--inner: inner is what compiles the parts"),
    (["estimate", "own_model.py:Net"], "--input: what own_model.py:Net takes is not known"),
    (["estimate", *NET, "--memory", "much"], "--memory: memory must be a number of bytes"),
    (["estimate", *NET, "--optimizer", "AdamX"], "--optimizer: torch.optim has no optimizer 'AdamX'; did you mean Adam"),
    (["estimate", *NET, "--gpu", "NVIDIA H1000"], "--gpu: "),
    (["verify", *NET, "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    (["verify", *NET, "--output", "v.png"], "--output: 'v.png' is a picture, which this command does not draw"),
    (["bench", *NET, "--rounds", "0"], "'--rounds': 0 is not in the range x>=1"),
    (["bench", *NET, "--loss", "own_model.py:lost"], "--loss: own_model.py has no 'lost'; did you mean loss"),
    (["demo", "--batch", "0"], "'--batch': 0 is not in the range x>=1"),
    (["demo", "--pixels", "3"], "'--pixels': 3 is not in the range x>=33"),
    (["demo", "--gamma", "1"], "'--gamma': 1.0 is not in the range 0<=x<1"),
    (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_an_error_names_the_argument_and_the_cause(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_debug_shows_where_an_error_came_from(run):
    status, _, err = run("--debug", "report", "own_model.py:fails")
    assert status == 2
    assert "in fails" in err


# ---- inputs


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "low", "high"),
    [
        ("8x3x4", (8, 3, 4), torch.float32, None, None),
        ("50", (50,), torch.float32, None, None),
        ("50:int64", (50,), torch.int64, 0, 1),
        ("50:int64:3-5", (50,), torch.int64, 3, 5),
        ("50:uint8:0-255", (50,), torch.uint8, 0, 255),
        ("50:float64:-2-2", (50,), torch.float64, -2, 2),
        ("50:float32:-2--1", (50,), torch.float32, -2, -1),
        ("50:bfloat16:1e-2-.5", (50,), torch.bfloat16, 0.0099, 0.5),
        ("50:bool", (50,), torch.bool, 0, 1),
        ("50:complex64", (50,), torch.complex64, None, None),
    ],
)
def test_inputs_are_what_their_texts_say(text, shape, dtype, low, high):
    (value,) = inputs.made([text], "cpu").args
    assert (tuple(value.shape), value.dtype) == (shape, dtype)
    if low is not None:
        assert low <= value.float().min().item()
        assert value.float().max().item() <= high
        assert value.unique().numel() > 1
    assert inputs.made([text], "meta").args[0].device.type == "meta"


def test_inputs_have_places_or_names_or_come_from_a_function(folder):
    assert [tuple(value.shape) for value in inputs.made(["2x3", "4"], "cpu").args] == [(2, 3), (4,)]
    call = inputs.made(["mask=2x3:bool", "ids=2:int64:0-9"], "cpu")
    assert [*call.kwargs] == ["mask", "ids"]
    assert call.example_inputs is call.kwargs
    assert inputs.made(["own_model.py:batch"], "cpu").kwargs["scale"] == 0.5


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a=2", "a=3"], "'a' is given twice"),
        (["a=2", "3"], "all arguments by position or all by name"),
        (["own_model.py:batch", "3"], "gives all inputs"),
        (["2:int64:0.5-2"], "int64 needs whole numbers"),
        (["2:int64:5-2"], "must not be the larger one"),
        (["2:uint8:0-256"], "beyond that of uint8, 0 to 255"),
        (["2:bool:0-1"], "which bool does not take"),
        (["2:float32:high"], "not in a range low-high"),
        (["axb"], "is no shape"),
        ([""], "is no shape"),
    ],
)
def test_inputs_that_cannot_be_read(folder, texts, words):
    with pytest.raises(click.BadParameter, match=words):
        inputs.made(texts, "cpu")


# ---- as a program


def program(*arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "mnet_fx", *arguments], capture_output=True, text=True, env=environment, timeout=120, **more
    )


def test_help_is_quick_and_says_how_to_begin():
    begin = time.perf_counter()
    done = program("--help")
    assert time.perf_counter() - begin < 2.0  # without torch
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("torchvision:resnet101", "Exit status", "estimate", "verify", "completion"))
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize("command", ["estimate", "report", "verify", "bench", "demo"])
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "--gamma" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion_for(run, shell):
    status, out, _ = run("completion", shell)
    assert status == 0
    assert "_MNET_FX_COMPLETE" in out


def test_completion_completes():
    done = program(env={"_MNET_FX_COMPLETE": "bash_complete", "COMP_WORDS": "mnet-fx report own.py:Net --form", "COMP_CWORD": "3"})
    assert done.stdout.split() == ["plain,--format"]
    done = program(env={"_MNET_FX_COMPLETE": "bash_complete", "COMP_WORDS": "mnet-fx report own.py:Net --format j", "COMP_CWORD": "4"})
    assert done.stdout.split() == ["plain,json"]


def in_terminal(command, folder):
    """Runs a command in a pseudo-terminal; gives its status and what the terminal was sent."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    sent = b""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end was closed
                break
            if not piece:
                break
            sent += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sent.decode()


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_in_a_terminal_a_report_and_an_error(folder):
    status, sent = in_terminal(["-m", "mnet_fx", "report", *NET], folder)
    assert status == 0
    assert "4 of 4 residual adds rewritten" in sent
    status, sent = in_terminal(["-m", "mnet_fx", "report", "own_model.py:Nett"], folder)
    assert status == 2
    assert "Error: Invalid value for MODEL: own_model.py has no 'Nett'; did you mean Net" in sent


WAIT = "import time; from mnet_fx.progress import working\nwith working('thinking', {delay}): time.sleep({sleep})\nprint('done')"


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_progress_is_shown_in_a_terminal_once_it_takes_long(folder):
    status, sent = in_terminal(["-c", WAIT.format(delay=0.3, sleep=1.2)], folder)
    assert status == 0
    assert "thinking ..." in sent
    assert sent.rstrip().endswith("done")
    nested = "from mnet_fx.progress import working\nwith working('all', 0.1) as say:\n say('first'); {wait}\n"
    nested += " with working('part'): {wait}\n {wait}"
    _, sent = in_terminal(["-c", "import time; " + nested.format(wait="time.sleep(0.7)")], folder)
    seen = [sent.index(f"{what} ...") for what in ("first", "part")]
    assert seen == sorted(seen)
    assert "first ..." in sent[seen[1] :]
    assert "all ..." not in sent
    assert "thinking" not in in_terminal(["-c", WAIT.format(delay=2.0, sleep=0.3)], folder)[1]


def test_progress_is_not_shown_where_the_output_is_no_terminal():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    code = WAIT.format(delay=0.1, sleep=0.5)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")
