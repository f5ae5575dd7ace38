"""Who may import whom, and how long a file may grow."""

import ast
import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import mnet_fx

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FILES = sorted([*ROOT.glob("passes/**/*.py"), *ROOT.glob("mnet_fx/**/*.py")])
LONGEST = 350  # lines of a file
CODE_LINES = 17_851  # of both packages; raise it with what a new capability needs, and lower it when you can


def name_of(path: Path) -> str:
    """Of a module of our own, as "package.module"; that of a package ends in "__init__"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules of our own that a file imports, anywhere in it, as "package.module"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    known = {name_of(p) for p in FILES} | {"passes", "mnet_fx"}
    return found & known


GRAPH = {name_of(p): imports(p) for p in FILES}


def test_passes_know_nothing_of_mnet_fx():
    assert not {name: found for name, found in GRAPH.items() if name.startswith("passes") and any(f.startswith("mnet_fx") for f in found)}


def test_imports_have_no_cycle():
    order, open_, done = [], set(), set()

    def visit(name):
        assert name not in open_, f"import cycle through {name}"
        if name not in done:
            open_.add(name)
            for other in sorted(GRAPH.get(name, ())):
                visit(other)
            open_.discard(name)
            done.add(name)
            order.append(name)

    for name in GRAPH:
        if not name.endswith("__init__"):
            visit(name)
    assert order


# The rooms of docs/architecture.md: each may know those above it. A folder stands for all its files, a file for itself.
SHOWING = [
    "findings",
    "report",
    "build",
    "text",
    "data",
    "html",
    "svg",
    "road",
    "plots",
    "estimates",
]  # what is above all: ask, drawing, steps
MNET_FX = [
    ("errors", "arguments", "progress", "toy_datasets"),
    ("closeness",),
    ("read_maps", "budget.sizes"),
    ("settings",),
    ("arithmetic",),
    ("runtime",),
    ("inner", "regions", "lockstep"),
    ("budget.measured", *(f"reporting.{name}" for name in SHOWING)),
    ("checkpoints",),
    ("compiled", "named"),
    ("captured",),
    ("rewrite",),
    ("budget",),
    ("api",),
    ("integrations", "loading"),
    ("verifying", "reporting"),
    ("map_fits", "step_streams", "tuned"),
    ("calibration",),
    ("tuning",),
    ("cli",),
    ("__main__", "__init__"),
]
PASSES = [("refusals",), ("regions",), ("graphs",), ("capturing", "planning", "rewriting"), ("__init__",)]


def room_of(name: str, rooms: list[tuple[str, ...]]) -> tuple[int, str]:
    """Height and name of the room that a module, without its package, lies in; the longest name counts."""
    found = [(len(room), i, room) for i, row in enumerate(rooms) for room in row if name == room or name.startswith(f"{room}.")]
    return max(found)[1:]


@pytest.mark.parametrize("name", [name for name in GRAPH if not name.endswith(".__init__")])
def test_each_room_knows_only_those_below_it(name):
    package, _, rest = name.partition(".")
    rooms = PASSES if package == "passes" else MNET_FX
    height, room = room_of(rest, rooms)
    for other in GRAPH[name]:
        theirs, _, module = other.partition(".")
        if theirs == package and module and not module.endswith("__init__"):
            other_height, other_room = room_of(module, rooms)
            same = room == other_room or (height == other_height and "reporting" in room and "reporting" in other_room)
            assert other_height < height or same, f"{name} imports {other}"


def test_the_page_says_who_may_know_whom():
    rooms = [["what `reporting` shows" if name.startswith("reporting.") else f"`{name}`" for name in row] for row in MNET_FX[:-1]]
    assert " < ".join(", ".join(dict.fromkeys(row)) for row in rooms) + "." in ARCHITECTURE.read_text()


def test_every_file_is_listed_by_its_first_line():
    """`MNET_FX_GOLDEN=write` writes the page anew."""
    page = ROOT / "docs" / "files.md"
    if os.environ.get("MNET_FX_GOLDEN") == "write":
        page.write_text(file_page())
    assert page.read_text() == file_page()


def file_page() -> str:
    """docs/files.md."""
    folders: dict[str, list[str]] = {}
    for path in FILES:
        folder, name = path.relative_to(ROOT).parent.as_posix(), path.name
        if not name.startswith("__"):
            lines = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].splitlines()
            text = (lines[0] if lines[0].endswith((".", ":")) else " ".join(lines)).replace("|", "\\|")
            folders.setdefault(folder, []).append(f"| `{name}` | {text} |")
    tables = ("\n".join([f"## {folder}", "", "| file | what it is |", "|---|---|", *rows]) for folder, rows in sorted(folders.items()))
    head = "# Every file\n\nBy how each begins, without `__init__` and `__main__`; [which rooms there are](architecture.md), and why.\n"
    return "\n\n".join([head.rstrip("\n"), *tables]) + "\n"


def test_what_runs_and_what_counts_know_no_graph():
    low = {name for name in GRAPH if name.startswith(("mnet_fx.arithmetic", "mnet_fx.runtime"))}
    assert not {name: found for name in low if (found := {f for f in GRAPH[name] if f.startswith("passes")})}


def test_only_the_backend_and_graph_modules_rewrite():
    """The files that call both halves: they alone give `passes.rewrite` the module of a region."""
    calls = {path for path in ROOT.glob("mnet_fx/**/*.py") if "passes.rewrite(" in path.read_text()}
    assert {path.stem for path in calls} == {"backend", "graph_modules"}


def test_no_module_of_passes_is_shadowed_by_a_function():
    for path in ROOT.glob("passes/**/*.py"):
        package = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
        if path.stem != "__init__":
            assert getattr(package, path.stem, None) is sys.modules.get(name_of(path)), path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def docstring_lines(node: ast.AST) -> set[int]:
    first = node.body[0]  # type: ignore[attr-defined]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return set(range(first.lineno, first.end_lineno + 1)) if is_text else set()


def test_functions_are_short():
    """Without their docstrings; and all code without blanks, comments and docstrings is no more than it was."""
    lengths, code = [], 0
    for path in FILES:
        text = path.read_text()
        tree = ast.parse(text)
        texts: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
                texts |= docstring_lines(node)
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1 - len(docstring_lines(node)))
        lines = enumerate(text.splitlines(), 1)
        code += sum(bool(line.strip()) and not line.lstrip().startswith("#") and i not in texts for i, line in lines)
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 6
    assert lengths[int(0.9 * len(lengths))] < 20
    assert lengths[-1] <= 45
    assert code <= CODE_LINES


def test_no_public_name_is_that_of_a_module_of_ours():
    """The module would take its place as an attribute of the package, once it is imported."""
    taken = {path.stem for path in ROOT.glob("mnet_fx/*.py")} | {path.parent.name for path in ROOT.glob("mnet_fx/*/__init__.py")}
    assert taken & set(mnet_fx.__all__) == {"toy_datasets"}  # which is the module


def test_what_dir_shows():
    assert dir(mnet_fx) == sorted([*mnet_fx.__all__, "__version__"])
    assert mnet_fx.__version__ == version("mnet-fx")


def test_what_the_import_costs():
    """Beyond that of torch, which is not needed until a name is asked for; torchvision comes later still (tqdm with torch._dynamo)."""
    code = "import time, torch; t = time.perf_counter(); import mnet_fx; mnet_fx.__all__; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 0.3
    code = "import sys, mnet_fx; mnet_fx.momentumize; print(sorted({'torchvision', 'matplotlib', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_there_and_come_late():
    for name in mnet_fx.__all__:
        assert getattr(mnet_fx, name) is not None
    code = "import sys, mnet_fx, mnet_fx.cli.main; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
