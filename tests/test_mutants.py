"""The mutants of `mutate.py` are those of the code as it is now."""

import ast

import pytest
from mutate import MUTANTS, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1].strip()[:40]}")
def test_a_mutant_applies_and_is_python(mutant):
    file, old, new = mutant
    ast.parse(mutated((ROOT / file).read_text(), old, new))
