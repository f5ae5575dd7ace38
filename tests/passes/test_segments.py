"""Where what lies between regions may be cut, and what of it can be run again."""

import time

import pytest
import torch

from passes.graphs.effects import observed
from passes.rewriting import segments
from passes.rewriting.heads import heads
from passes.rewriting.segments import Memory, segmented


def captured(function, *inputs):
    """The graph that Dynamo makes of a function, with what its nodes do to memory."""
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*inputs)
    observed(graphs[0])
    return graphs[0].graph


def nodes_of(graph):
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def cut(graph, groups=None, floor=0):
    segments = segmented(groups or [nodes_of(graph)], Memory.of(graph, ()), floor)
    return [segment for group in segments for segment in group]


def wave(x, n):
    for _ in range(n):
        x = x.sin()
    return x


@pytest.fixture
def x():
    return torch.randn(8, 8, requires_grad=True)


def test_a_long_run_is_cut_where_little_crosses(x):
    def long(x):
        for _ in range(4):
            small = wave(torch.cat([x] * 8), 3).sum(0, keepdim=True)
            x = small.expand(8, 8)
        return x.sin().exp()

    graph = captured(long, x)
    found = cut(graph)
    assert [node for segment in found for node in segment.nodes] == nodes_of(graph)
    again = [segment for segment in found if segment.proof is not None]
    assert len(again) >= 3
    assert all(segment.proof in segment.nodes for segment in again)


def test_what_writes_to_memory_of_others_is_not_run_again(x):
    def writing(x):
        y = wave(x, 2) + 1
        z = wave(y, 4)
        y.add_(1)
        return wave(z, 4) + y

    graph = captured(writing, x)
    nodes = nodes_of(graph)
    write = next(node for node in nodes if node.name.startswith("add_") or node.target == "add_")
    last = nodes.index(next(node for node in nodes if node.name.startswith("y")))
    found = cut(graph, [nodes[: last + 1], nodes[last + 1 :]])
    assert all(segment.proof is None for segment in found if write in segment.nodes)
    assert any(segment.proof is not None for segment in found)


def test_who_writes_to_a_value_stays_with_who_made_it(x):
    def writing(x):
        y = torch.cat([x, x]) * 2
        y.relu_()
        return wave(wave(y, 8).sum(0), 3)

    graph = captured(writing, x)
    write = next(node for node in nodes_of(graph) if node.target == "relu_")
    for floor in (0, 10**9):
        (segment,) = [segment for segment in cut(graph, floor=floor) if write in segment.nodes]
        assert write.args[0] in segment.nodes


def test_a_proof_lies_in_memory_of_its_own(x):
    def viewing(x):
        y = x * 1
        a = wave(y, 6) + 1
        of_input, of_a = y.view(-1), a.view(-1)
        b = wave(a + 1, 2)
        a.relu_()  # so that all of this is one segment
        return of_input, of_a, a, b

    graph = captured(viewing, x)
    nodes = nodes_of(graph)
    write = next(node for node in nodes if node.target == "relu_")
    (segment,) = [segment for segment in cut(graph, [nodes[:1], nodes[1:]], floor=10**9) if write in segment.nodes]
    views = [node for node in segment.nodes if node.target == "view"]
    assert len(views) == 2
    assert segment.proof is not None
    assert segment.proof not in (*views, write, write.args[0])


def test_what_is_read_before_it_is_overwritten_is_stored(x):
    def writing(x):
        y = x * 1
        z = wave(y + 1, 4)
        y.mul_(2)
        return z.sum() + y.sum()

    graph = captured(writing, x)
    reader = next(node for node in nodes_of(graph) if any(source.name == "y" for source in node.all_input_nodes))
    groups = [nodes_of(graph)[:1], nodes_of(graph)[1:]]
    assert all(segment.proof is None or reader not in segment.nodes or reader.target == "mul_" for segment in cut(graph, groups))


def test_what_cannot_be_run_again_is_no_reason_for_longer_segments(x):
    def writing(x):
        big = torch.cat([x] * 64)
        big.add_(wave(big, 8))  # over what sin saved
        z = big[:8] * 1
        for _ in range(4):
            z = wave(torch.cat([z] * 4), 4).sum(0, keepdim=True).expand(8, 8)
        return z + big[:8]

    graph = captured(writing, x)
    nodes = nodes_of(graph)
    at = nodes.index(next(node for node in nodes if node.target == "add_")) + 1
    assert sum(segment.proof is not None for segment in cut(graph, [nodes[:at], nodes[at:]])) >= 3


def test_a_long_run_takes_no_longer_for_each_node(x):
    taken = {}
    for n in (300, 1200):
        graph = captured(lambda x, n=n: wave(x, n), x)
        start = time.perf_counter()
        found = cut(graph)
        taken[n] = time.perf_counter() - start
        assert [node for segment in found for node in segment.nodes] == nodes_of(graph)
        assert sum(segment.proof is not None for segment in found) > 5
    assert taken[1200] < 10 * taken[300]


def loss_of(logits, target):
    return torch.nn.functional.cross_entropy(logits, target)


WEIGHT, TARGET = torch.randn(50, 8), torch.randint(50, (8,))


def test_a_head_whose_hidden_values_are_overwritten_later_is_left(x):
    def kept(x, weight, target):
        h = x.sin()
        return loss_of(torch.nn.functional.linear(h, weight), target)

    def overwritten(x, weight, target):
        h = x + 1
        logits = torch.nn.functional.linear(h, weight)
        h.add_(1)
        return loss_of(logits, target) + h.sum()

    def renamed(x, weight, target):
        target = target + 0
        logits = torch.nn.functional.linear(x, weight)
        loss = loss_of(logits, target)
        target.zero_()
        return loss + target.sum()

    assert len(list(heads(captured(kept, x, WEIGHT, TARGET)))) == 1
    assert not list(heads(captured(overwritten, x, WEIGHT, TARGET)))
    assert not list(heads(captured(renamed, x, WEIGHT, TARGET)))


def test_logits_that_change_their_classes_or_twice_their_dtype_on_the_way_are_left(x):
    def halved(x, weight, target):
        return loss_of(torch.nn.functional.linear(x, weight).view(-1, 25), torch.cat([target, target]) % 25)

    def cast(x, weight, target):
        return loss_of(torch.nn.functional.linear(x, weight).half().double(), target)

    assert not list(heads(captured(halved, x, WEIGHT, TARGET)))
    assert not list(heads(captured(cast, x, WEIGHT, TARGET)))


def test_of_cuts_that_are_about_as_good_the_one_with_fewest_segments_is_taken(x, monkeypatch):
    graph = captured(lambda x: wave(x, 64), x)
    counts, peak = {}, segments._peak

    def noting(groups, memory, floor):
        counts[sum(map(len, groups))] = min(peak(groups, memory, floor), counts.get(sum(map(len, groups)), 10**9))
        return peak(groups, memory, floor)

    monkeypatch.setattr(segments, "_peak", noting)
    assert len(cut(graph)) == min(n for n, size in counts.items() if size <= 1.03 * min(counts.values()))
    assert len(counts) > 3


def test_a_peak_is_that_of_going_back_segment_by_segment(x):
    def skipping(x):
        a = wave(x, 3)
        b = wave(a.repeat(1, 4), 2).sum(1, keepdim=True) * a
        return wave(b, 3) + a

    graph = captured(skipping, x)
    nodes = nodes_of(graph)
    memory = Memory.of(graph, ())
    edges = [(source, node) for node in nodes for source in node.all_input_nodes if source in nodes]

    def weigh(values):
        return memory.weigh({number for value in values for number in memory.of_node(value)})

    for width in (2, 3, 5):
        groups = [[segments.Segment(nodes[i : i + width], nodes[i])] for i in range(0, len(nodes), width)]
        number, most = {node: i // width for i, node in enumerate(nodes)}, 0
        for now, (segment,) in enumerate(groups):
            kept = {source for source, reader in edges if number[source] < number[reader] <= now}
            waiting = {source for source, reader in edges if number[source] <= now < number[reader]}  # their gradients
            inside = set(segments.saved_by(segment.nodes, memory)) - {n for source in kept for n in memory.of_node(source)}
            most = max(most, weigh(kept) + memory.weigh(inside) + weigh(waiting))
        assert segments._peak(groups, memory, 0) == most
