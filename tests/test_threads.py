"""Two threads that train one model at once do not mix tapes, and lose no statistics."""

import sys
import threading

import pytest
import torch
from torch import nn

from mnet_fx import momentumize
from mnet_fx import turns as turns_module
from mnet_fx.runtime.turns import Turns

ROUNDS = 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


@pytest.mark.parametrize("options", [{}, {"regions": [""]}], ids=["traced", "named"])
def test_two_threads_on_one_model(options):
    torch.set_num_threads(1)
    net = momentumize(nn.Sequential(*(Block() for _ in range(8))), gamma=0.9, **options).train()
    batches = torch.randn(2, ROUNDS, 16, 8)

    def gradients(x):
        return torch.autograd.grad(net(x).square().sum(), [net[3].linear.weight, net[0].norm.bias])

    expected = [[gradients(x) for x in batch] for batch in batches]
    found, errors = [[], []], []

    def work(i):
        try:
            found[i] = [gradients(x) for x in batches[i]]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ours, alone in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for g, e in zip(ours, alone, strict=True) for a, b in zip(g, e, strict=True))
    assert [block.norm.num_batches_tracked.item() for block in net] == [4 * ROUNDS] * 8


def test_a_thread_that_works_for_another_takes_its_turn_within_and_strangers_wait():
    turns, order, inside = Turns(), [], threading.Event()

    def helper(turn):
        torch._C._stash_obj_in_tls(turns_module._KEY, turn)  # as autograd does for its threads
        with turns:
            order.append("helper")

    def stranger():
        inside.wait()
        with turns:
            order.append("stranger")

    other = threading.Thread(target=stranger)
    other.start()
    with turns:
        inside.set()
        for _ in range(2):
            with turns:
                thread = threading.Thread(target=helper, args=(turns.turns[-1],))
                thread.start()
                thread.join(timeout=20)
                assert not thread.is_alive()
        order.append("owner")
    other.join(timeout=20)
    assert order == ["helper", "helper", "owner", "stranger"]
    assert not turns.turns


def test_what_a_thread_keeps_is_counted():
    """Torch 2.11 lets go of one reference more than it takes: turns were freed while they went on."""
    kept, other = object(), object()
    before = sys.getrefcount(kept)
    turns_module._stash("mnet_fx.test", kept)
    assert sys.getrefcount(kept) == before + 1
    assert torch._C._get_obj_in_tls("mnet_fx.test") is kept
    turns_module._stash("mnet_fx.test", other)
    assert sys.getrefcount(kept) == before
