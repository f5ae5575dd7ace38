"""The pages: every link leads somewhere, every path of a file is there, every block of Python is Python."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]


def prose(page):
    """The text without blocks of code and code in lines."""
    return re.sub(r"```.*?```|`[^`\n]*`|^    .*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)", prose(page)):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:mnet_fx|passes|tests|benchmarks|docs)/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_are_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)
