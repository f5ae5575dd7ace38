"""Who may import whom, and how long a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mnet_fx

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("passes/**/*.py"), *ROOT.glob("mnet_fx/**/*.py")])
LONGEST = 420


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


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("mnet_fx.formats", {"mnet_fx.fixed_point", "mnet_fx.cost", "passes"}),
        ("mnet_fx.fixed_point", {"mnet_fx.tape", "mnet_fx.replay", "mnet_fx.region", "passes"}),
        ("mnet_fx.replay", {"mnet_fx.tape", "mnet_fx.region", "passes"}),
        ("mnet_fx.shear", {"mnet_fx.tape", "mnet_fx.steps", "mnet_fx.fixed_point", "mnet_fx.replay", "passes"}),
        ("mnet_fx.tape", {"mnet_fx.steps", "mnet_fx.region", "mnet_fx.api", "passes"}),
        ("mnet_fx.steps", {"mnet_fx.fixed_point", "mnet_fx.region", "mnet_fx.api", "passes"}),
        ("mnet_fx.reporting.findings", {"mnet_fx.api", "mnet_fx.captured", "mnet_fx.budget.estimating"}),
        ("mnet_fx.reporting.report", {"mnet_fx.api", "mnet_fx.captured", "mnet_fx.budget.estimating"}),
        ("mnet_fx.api", {"mnet_fx.cli.main", "mnet_fx.reporting.ask", "mnet_fx.verification"}),
        ("mnet_fx.region", {"mnet_fx.api", "mnet_fx.reporting.report"}),
    ],
)
def test_the_lower_layers_do_not_know_the_upper_ones(module, forbidden):
    assert not GRAPH[module] & forbidden


def test_only_the_backend_and_graph_modules_rewrite():
    """The files that call both halves: they alone give `passes.rewrite` the module of a region."""
    calls = {path for path in ROOT.glob("mnet_fx/**/*.py") if "passes.rewrite(" in path.read_text()}
    assert {path.stem for path in calls} == {"compile_backend", "graph_modules"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_public_name_is_that_of_a_module_of_ours():
    """The module would take its place as an attribute of the package, once it is imported."""
    taken = {path.stem for path in ROOT.glob("mnet_fx/*.py")} | {path.parent.name for path in ROOT.glob("mnet_fx/*/__init__.py")}
    assert taken & set(mnet_fx.__all__) == {"toy_datasets"}  # which is the module


def test_public_names_are_there_and_come_late():
    for name in mnet_fx.__all__:
        assert getattr(mnet_fx, name) is not None
    code = "import sys, mnet_fx, mnet_fx.cli.main; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
