"""What is kept first, and that fewer bytes keep part of what more keep."""

from types import SimpleNamespace

from mnet_fx.compiled.keeping import Keeping
from passes import Cost


def test_most_work_for_its_bytes_first_and_of_a_chain_the_last_steps():
    chain, other = SimpleNamespace(stored=0), SimpleNamespace(stored=0, cost=Cost(4, 20))
    unknown = SimpleNamespace(stored=0, cost=None)
    keeping = Keeping([(chain, [Cost(2, 4), Cost(2, 100), Cost(0, 3)])], [other, unknown])
    assert [(keeper is chain, cost.size) for keeper, cost in keeping.items] == [(False, 4), (True, 2), (True, 2), (True, 0)]
    found = []
    for size in range(10):
        spent = keeping.spend(size)
        assert spent <= size
        found.append((other.stored, chain.stored))
    assert found == [(0, 0)] * 4 + [(1, 0)] * 2 + [(1, 1)] * 2 + [(1, 3)] * 2
    assert unknown.stored == 0


def test_nothing_is_kept_for_nothing_also_not_what_takes_no_bytes():
    chain = SimpleNamespace(stored=0)
    keeping = Keeping([(chain, [Cost(0, 4), Cost(0, 4)])], [])
    assert (keeping.spend(1), chain.stored) == (0, 2)
    assert (keeping.spend(0), chain.stored) == (0, 0)
