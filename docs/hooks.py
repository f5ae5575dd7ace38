"""What the site holds beside docs/*.md: pages from elsewhere in the repository, the reference, read from the sources, and notebooks.

Links between pages are written as they hold in the repository, so that they work where it is browsed; here they become those of the site.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import notebook

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "examples/README.md": "examples.md",
    "passes/README.md": "passes.md",
    "tests/README.md": "tests.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/gpu/README.md": "benchmarks-gpu.md",
}
REFERENCES = {"reference.md": "mnet_fx", "reference-passes.md": "passes"}
TUTORIALS = ["tutorial.md", "tutorial-fine-tune.md"]  # are there as notebooks too
OWNERS = {page: path for path, page in ELSEWHERE.items()}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for page, package in REFERENCES.items():
        files.append(File.generated(config, page, content=reference(package)))
    for page in TUTORIALS:
        files.append(File.generated(config, _notebook_of(page), content=notebook((ROOT / "docs" / page).read_text())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the site's links in the place of the repository's."""
    here = page.file.src_uri
    folder = posixpath.dirname(OWNERS.get(here, f"docs/{here}"))

    def on_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).is_file():  # elsewhere in the web, or no link at all: f[t](x)
            return match[0]
        target = ELSEWHERE.get(path) or path.removeprefix("docs/")
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[2] or ''})"

    if here in TUTORIALS:
        markdown += f"\n[This page as a notebook]({_notebook_of(here)})\n"
    return LINK.sub(on_site, markdown)


def _notebook_of(page: str) -> str:
    return page.replace(".md", ".ipynb")


def reference(package: str) -> str:
    """The page of all public names of a package, each by its docstring, read without importing anything."""
    names = public_names(ROOT / package / "__init__.py")
    kinds = {"Functions": [], "Classes": [], "Errors and warnings": [], "Constants": []}
    for name in names:
        kinds[kind_of(name)].append(name)
    parts = [f"# Reference: {package}\n\nEverything in `{package}.__all__`, from the docstrings.\n"]
    for kind, found in kinds.items():
        if found:
            parts += [f"## {kind}\n", *(f"::: {package}.{name}\n" for name in found)]
    return "\n".join(parts)


def kind_of(name: str) -> str:
    if name.endswith(("Error", "Warning")):
        return "Errors and warnings"
    return "Constants" if name.isupper() else "Classes" if name[0].isupper() else "Functions"


def public_names(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"no __all__ in {path}")
