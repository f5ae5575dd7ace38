"""Who may import whom, and how long a file may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("passes/*.py"), *ROOT.glob("mnet_fx/*.py")])
LONGEST = 420


def imports(path: Path) -> set[str]:
    """Modules of our own that a file imports, anywhere in it, as "package.module"."""
    package, found = path.parent.name, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {f"{package}.{node.module}"} if node.module else {f"{package}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    known = {f"{p.parent.name}.{p.stem}" for p in FILES} | {"passes", "mnet_fx"}
    return found & known


GRAPH = {f"{p.parent.name}.{p.stem}": imports(p) for p in FILES}


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
        ("mnet_fx.tape", {"mnet_fx.steps", "mnet_fx.region", "mnet_fx.momentumize", "passes"}),
        ("mnet_fx.steps", {"mnet_fx.fixed_point", "mnet_fx.region", "mnet_fx.momentumize", "passes"}),
        ("mnet_fx.region", {"mnet_fx.momentumize", "mnet_fx.report"}),
    ],
)
def test_the_lower_layers_do_not_know_the_upper_ones(module, forbidden):
    assert not GRAPH[module] & forbidden


def test_only_the_backend_and_graph_modules_rewrite():
    """The files that call both halves: they alone give `passes.rewrite` the module of a region."""
    calls = {path for path in ROOT.glob("mnet_fx/*.py") if "passes.rewrite(" in path.read_text()}
    assert {path.stem for path in calls} == {"compile_backend", "graph_modules"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= LONGEST
