"""Fingerprints: what they see, in C and in torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnet_fx.arithmetic import fingerprints as module
from mnet_fx.arithmetic.fingerprints import fingerprint, fingerprints
from mnet_fx.arithmetic.kernels import c as native

MASK = (1 << 64) - 1


@pytest.fixture(autouse=True, params=["c", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "_native", lambda: None)
    elif module._native() is None:
        pytest.skip("needs a C compiler")
    return request.param


def splitmix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1001, 8 << 15])
def test_the_loop_in_c_adds_up_mixed_words(size, threads, way):
    if way == "torch":
        pytest.skip("of the loop in C")
    torch.set_num_threads(threads)
    t = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)[3:]  # not aligned
    words = [int.from_bytes(bytes(t[i : i + 8].tolist()), "little") for i in range(0, size, 8)]
    expected = sum(splitmix((w + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, w in enumerate(words)) & MASK
    assert fingerprints([t]) == [expected]


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_torch_goes_on_where_there_is_no_compiler(monkeypatch, compiler, way):
    if way == "torch":
        pytest.skip("of the loop in C")
    t = torch.randn(9)
    expected = module._by_torch([t]).tolist()
    monkeypatch.setenv("CC", compiler)
    try:
        native.hashes.cache_clear()
        module._native.cache_clear()
        assert fingerprints([t]) == expected
    finally:
        monkeypatch.undo()
        native.hashes.cache_clear()
        module._native.cache_clear()


def test_memory_that_was_freed_is_an_error():
    for start in (0, 2):
        t = torch.randn(100)[start:]
        t.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            fingerprints([t])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the way is the same for all examples
@given(data=st.data())
def test_fingerprint_sees_one_changed_bit(data):
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    t = torch.randint(0, 100, (data.draw(st.integers(1, 20)),), dtype=dtype)
    view = t[data.draw(st.integers(0, len(t) - 1)) :]
    before = fingerprint(view)
    assert before == fingerprint(view.clone())
    view[data.draw(st.integers(0, len(view) - 1))] ^= 1 << data.draw(st.integers(0, 6))
    assert fingerprint(view) != before


@pytest.mark.parametrize("words", [100, 50_001, 1_200_003])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_fingerprint_sees_order_and_sign(words, dtype):
    t = torch.randint(1, 1 << 40, (words,)) if dtype is torch.int64 else torch.randn(2 * words + 1)  # no whole number of words
    apart = [1, 2, words // 3, *(d for d in (1056, 8224) if d < words // 2)]  # the last: one below the other in the table of words
    step, other = t.numel() // words, t.clone()
    other[-1] *= 2
    prints = {fingerprint(other)} | {
        fingerprint(t),
        fingerprint(-t),
        fingerprint(t.flip(0)),
        fingerprint(t.roll(step * apart[-1])),
    }
    for distance in apart:
        swapped, moved = t.clone(), t.clone()
        swapped[[7 * step, (7 + distance) * step]] = swapped[[(7 + distance) * step, 7 * step]]
        moved[: step * words].view(torch.int64)[7] += 1  # no change of the sum
        moved[: step * words].view(torch.int64)[7 + distance] -= 1
        prints |= {fingerprint(swapped), fingerprint(moved)}
    assert len(prints) == 5 + 2 * len(set(apart))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0, 1, 2])
def test_regular_changes_of_regular_tensors_do_not_cancel(dtype, value):
    for n in [*range(2, 340), 1024, 4096]:
        t = torch.full((n,), value, dtype=dtype)
        changed = [t.clone() for _ in range(6)]
        changed[0][n // 2 :] *= -1
        changed[1][: n // 2] *= -1
        changed[2][::2] *= -1
        changed[3][-2:] *= -1
        changed[4][n // 4 : n // 2] += 1
        changed[5][n // 2 :] += 1
        distinct = {tuple(other.view(torch.uint8).tolist()): fingerprint(other) for other in [t, *changed]}
        assert len(set(distinct.values())) == len(distinct)


def test_a_few_signs_of_many_ones_do_not_cancel():
    torch.manual_seed(0)
    prints = set()
    signs = torch.ones(3000, 64)
    signs[:, :4] = -1
    rows = torch.stack([row[torch.randperm(64)] for row in signs]).unique(dim=0)
    for row in rows:
        prints |= {fingerprint(row), fingerprint(row.double())}
    assert len(prints) == 2 * len(rows)


@pytest.mark.parametrize("lazy", [lambda z: z.conj(), lambda z: z.conj().imag, lambda z: torch._neg_view(z.real)])
def test_fingerprint_sees_conjugates_and_negatives_that_are_only_noted(lazy):
    z = torch.randn(50, dtype=torch.complex64)
    eager = lazy(z).resolve_conj().resolve_neg()
    assert fingerprint(lazy(z)) == fingerprint(eager)
    assert fingerprint(lazy(z)) != fingerprint(-eager if eager.is_floating_point() else z)


def test_fingerprints_of_a_list_are_those_of_its_tensors():
    tensors = [
        torch.randn(5),
        torch.zeros(0),
        torch.randn(3, 7).t(),
        torch.randn(9000),
        torch.tensor(True),
        torch.randn(3, dtype=torch.complex64),
    ]
    assert fingerprints(tensors) == [fingerprints([t])[0] for t in tensors]
    assert tuple(fingerprints(tensors[:1])) == fingerprint(tensors[0])
    assert fingerprint(*tensors[:4]) != fingerprint(*reversed(tensors[:4]))


def test_fingerprint_sees_the_elements_of_a_view_with_gaps_and_no_others():
    base = torch.randn(6, 8)
    view = base[:, ::2]
    before = fingerprint(view)
    assert before == fingerprint(view.clone())
    base[:, 1::2] += 1
    assert fingerprint(view) == before
    base[5, 6] += 1
    assert fingerprint(view) != before
