"""Breaks the passes and the runtime on purpose, one condition at a time, and sees that a test notices. Run by hand:

    python tests/mutate.py [--only WORD] [--skip N] [--list]

Each mutant is one replacement of text in a temporary copy of the project, in which the tests of that file then run until the first one
fails. A mutant that no test notices is a test that is missing; it is printed, and the exit status is 1. About ten seconds for each mutant.
`test_mutants.py` sees that every replacement still applies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import mutants_runtime
import pytest
import torch
import torchvision  # noqa: F401  # takes seconds, which its children save
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
MATCHER = [
    f"tests/passes/test_{name}.py"
    for name in ("rules", "matching", "fills", "planner", "nesting", "hoisting", "rewriter", "passes_programs", "layouts")
]
CAPTURED = ["tests/captured/test_captured.py", "tests/captured/test_momentumize.py"]
PREVIEW = ["tests/passes/test_previewing.py", "tests/passes/test_torch_layers.py"]
NO_GRAD = "tests/captured/test_no_grad.py"
REACH = "tests/runtime/test_reach.py"
VALUE_SIZES = "tests/captured/test_value_sizes.py"
OVERWRITTEN = "tests/compiled/test_overwritten.py"
BACKEND = ["tests/compiled/test_backend.py"]
TOTALS = ["tests/passes/test_totals.py"]
EFFECTS = ["tests/passes/test_doubles.py", "tests/passes/test_effects.py", "tests/passes/test_side_outputs.py"]
TESTS = {
    "passes/capturing/layouts.py": ["tests/passes/test_layouts.py", "tests/compiled/test_backend_layouts.py"],
    "passes/capturing/layout_ops.py": ["tests/passes/test_layouts.py", "tests/compiled/test_backend_layouts.py"],
    "passes/capturing/torch_layers.py": PREVIEW,
    "passes/capturing/leftovers.py": ["tests/passes/test_leftovers.py"],
    "passes/graphs/writes.py": [*BACKEND, *EFFECTS],
    "passes/graphs/facts.py": [*MATCHER, *EFFECTS, "tests/captured/test_shared_sizes.py"],
    "passes/graphs/orders.py": ["tests/captured/test_orders.py"],
    "passes/capturing/grad_modes.py": [NO_GRAD, *BACKEND],
    "passes/capturing/attention_kernels.py": ["tests/captured/test_attention_kernels.py"],
    "passes/graphs/attention.py": ["tests/captured/test_attention_kernels.py"],
    "passes/capturing/sizes.py": ["tests/captured/test_shared_sizes.py"],
    "passes/planning/matching.py": [*MATCHER, NO_GRAD],
    "passes/planning/links.py": [*MATCHER, NO_GRAD],
    "passes/planning/planner.py": [*MATCHER, "tests/captured/test_shared_sizes.py"],
    "passes/rewriting/step_code.py": [*MATCHER, "tests/captured/test_orders.py"],
    "passes/rewriting/rewriter.py": [*MATCHER, *EFFECTS],
    "passes/graphs/effects.py": EFFECTS,
    "passes/graphs/doubles.py": EFFECTS,
    "passes/planning/overwritten.py": EFFECTS,
    "passes/planning/side_outputs.py": [*EFFECTS, *TOTALS],
    "passes/planning/totals.py": TOTALS,
    "mnet_fx/regions/totals.py": TOTALS,
    "passes/planning/kept.py": EFFECTS,
    "passes/capturing/checkpointed.py": BACKEND,
    "passes/rewriting/splitting.py": [OVERWRITTEN, *BACKEND],
    "mnet_fx/captured/calls.py": CAPTURED,
    "mnet_fx/captured/forward.py": [*CAPTURED, "tests/captured/test_left_out.py"],
    "mnet_fx/captured/configured.py": [VALUE_SIZES, *CAPTURED, "tests/captured/test_logging.py"],
    "mnet_fx/compiled/head.py": ["tests/captured/test_heads.py"],
    "mnet_fx/compiled/within.py": ["tests/compiled/test_within.py"],
    "mnet_fx/compiled/region.py": ["tests/compiled/test_within.py", NO_GRAD],
    "passes/rewriting/costs.py": ["tests/compiled/test_within.py"],
    "passes/rewriting/heads.py": ["tests/captured/test_heads.py", "tests/passes/test_segments.py"],
    "mnet_fx/captured/capturing.py": [VALUE_SIZES, *CAPTURED, "tests/captured/test_weird_models.py"],
    "mnet_fx/captured/value_sizes.py": [VALUE_SIZES],
    "mnet_fx/captured/network.py": [*CAPTURED, NO_GRAD],
    "mnet_fx/captured/graphs.py": [*CAPTURED, NO_GRAD],
    "mnet_fx/captured/doors.py": CAPTURED,
    "mnet_fx/captured/stand_ins.py": [*CAPTURED, "tests/runtime/test_transforms.py"],
    "mnet_fx/captured/unseen.py": CAPTURED,
    "mnet_fx/captured/left_out.py": ["tests/captured/test_left_out.py", *CAPTURED],
    "mnet_fx/api.py": CAPTURED,
    "mnet_fx/regions/region.py": ["tests/runtime/test_nested.py"],
    "mnet_fx/captured/copies.py": ["tests/captured/test_graph_modules.py", REACH],
    "passes/capturing/dynamo.py": [REACH, *BACKEND],
    "mnet_fx/inner.py": [VALUE_SIZES, OVERWRITTEN, "tests/named/test_compiled_layers.py", "tests/compiled/test_budget.py"],
    "mnet_fx/named/layers.py": ["tests/named/test_compiled_layers.py", "tests/named/test_named.py"],
    "mnet_fx/named/layer_step.py": [REACH, "tests/named/test_named.py"],
    "mnet_fx/runtime/start.py": ["tests/runtime/test_transforms.py", "tests/runtime/test_offload.py"],
    "mnet_fx/compiled/filling.py": [OVERWRITTEN],
    "mnet_fx/compiled/compiler.py": [OVERWRITTEN, "tests/runtime/test_transforms.py"],
    "mnet_fx/captured/graph_modules.py": ["tests/captured/test_graph_modules.py"],
    "mnet_fx/arithmetic/fake_state.py": ["tests/estimating/test_estimate.py"],
    "mnet_fx/budget/estimating.py": ["tests/estimating/test_estimate.py"],
    "mnet_fx/budget/counting.py": ["tests/estimating/test_estimate.py"],
    "mnet_fx/budget/faking.py": ["tests/estimating/test_estimate.py"],
    "mnet_fx/budget/seeing.py": ["tests/estimating/test_estimate.py"],
    **mutants_runtime.TESTS,
}
SLOW = "not thousand and not resnet"

# File, what stands there once, what the mutant has in its place.
MUTANTS: list[tuple[str, str, str]] = [
    # Estimates with values.
    ("mnet_fx/arithmetic/fake_state.py", "return next(self.seen, supposed)", "return supposed"),
    ("mnet_fx/arithmetic/fake_state.py", "return chains[-1 - place if rounds else place]", "return chains[0]"),
    ("mnet_fx/arithmetic/fake_state.py", "return chains[-1 - place if rounds else place]", "return chains[place]"),
    ("mnet_fx/arithmetic/fake_state.py", "return bool(next(self.seen, 0.0))", "return False"),
    ("mnet_fx/budget/counting.py", "self.peak, self._then, self._sum = self._sum.peak, self._sum.at_peak, None", "pass"),
    ("mnet_fx/budget/counting.py", 'return frame is None or frame.f_code.co_name == "_engine_run_backward"', "return True"),
    ("mnet_fx/budget/faking.py", "(*members, *reached(own, shared).tensors)", "members"),
    ("mnet_fx/budget/estimating.py", "return {name: copy(value) if isinstance(value, nn.Module) else value", "return {name: value"),
    ("mnet_fx/budget/seeing.py", "with undone(net, call), _uncast(), ", "with undone(net, call), "),
    ("mnet_fx/arithmetic/fake_state.py", "            SEEN.reset(token)\n", "            pass\n"),
    ("mnet_fx/budget/estimating.py", 'self.seen.told() if name == "momentum" else nullcontext()', "nullcontext()"),
    ("mnet_fx/budget/seeing.py", "with undone(net, call), _uncast(), ", "with _uncast(), "),
    ("mnet_fx/budget/seeing.py", "t.is_meta or isinstance(t, FakeTensor)", "isinstance(t, FakeTensor)"),
    # Heads.
    ("mnet_fx/compiled/head.py", "with saved_tensors_hooks(_same, _same) if self.head.shared else nullcontext():", "with nullcontext():"),
    ("mnet_fx/compiled/head.py", "logits, self.logits = self.logits, None\n", "logits = self.logits\n"),
    ("passes/rewriting/heads.py", "wide = logits if self.dtype is None else logits.to(self.dtype)", "wide = logits"),
    ("mnet_fx/compiled/head.py", "        if rows is None:\n", "        if False:\n"),
    ("passes/rewriting/heads.py", "*([linear] if shared else [])]", "]"),
    ("passes/rewriting/heads.py", "if len(dtypes) <= 2 else None", "if True else None"),
    ("passes/rewriting/heads.py", "        if head.shared:\n", "        if False:\n"),
    ("mnet_fx/compiled/head.py", "if self.stored or ", "if "),
    # Chains within steps.
    ("mnet_fx/compiled/within.py", "    if not peaks[best] < _WORTH * peaks[0]:\n", "    if True:\n"),
    ("mnet_fx/compiled/within.py", "sum(self.states[name] for name in reversible) + ", ""),
    ("mnet_fx/compiled/within.py", "return count * storage", "return 0 * storage"),
    ("mnet_fx/compiled/region.py", '        if code.region.backward == "stored":\n', "        if code.region.within:\n"),
    ("passes/rewriting/costs.py", "[named[name] for name in step.nodes if name not in hidden]", "[named[name] for name in step.nodes]"),
    (
        "passes/rewriting/costs.py",
        "hint(count) if isinstance(count, torch.SymInt) else count",
        "None if isinstance(count, torch.SymInt) else count",
    ),
    # Models that log.
    ("mnet_fx/captured/configured.py", "        root.debug_locals += tx.debug_locals[logged:]\n", ""),
    ("mnet_fx/captured/configured.py", "        del tx.debug_locals[logged:]\n", "        pass\n"),
    # GraphModules.
    ("mnet_fx/captured/copies.py", "            _constants_again(given, copy_)\n", "            pass\n"),
    ("mnet_fx/captured/graph_modules.py", "if plan.regions and (call", "if False and (call"),
    # The rules about single steps.
    (
        "passes/planning/rules.py",
        "RULES: tuple[Callable[[Span, Facts], Refusal | None], ...] = (\n    _overwrites_stream,",
        "RULES: tuple[Callable[[Span, Facts], Refusal | None], ...] = (",
    ),
    ("passes/planning/rules.py", "    _overwrites_side,\n    _ch", "    _ch"),
    ("passes/planning/rules.py", "    _changes_shape,\n", ""),
    ("passes/planning/rules.py", "    _changes_dtype,\n", ""),
    ("passes/planning/rules.py", "    _is_not_real,\n)", ")"),
    ("passes/planning/rules.py", "if node in facts.stale and node.target in OUT_OF_PLACE:", "if False:"),
    ("passes/planning/rules.py", "if target not in copied and not (node.target in OUT_OF_PLACE and target in shared):", "if False:"),
    ("passes/planning/rules.py", "not (node.target in OUT_OF_PLACE and target in shared)", "not (target in shared)"),
    ("passes/planning/rules.py", 'if target not in copied and memory.op in ("placeholder", "get_attr"):', "if False:"),
    (
        "passes/planning/rules.py",
        "copied if target in copied else shared if target in shared else set()",
        "shared if target in shared else set()",
    ),
    ("passes/planning/rules.py", "        copied.add(node)\n", ""),
    ("passes/planning/rules.py", "inside = {*span.nodes, facts.base[span.source]}", "inside = {*span.nodes}"),
    ("passes/planning/rules.py", "or before == after:\n        return None\n    found", "or True:\n        return None\n    found"),
    (
        "passes/planning/rules.py",
        '"broadcast" if shape_of(span.add) == after and not span.link else',
        '"broadcast" if shape_of(span.add) == after else',
    ),
    # Which adds are residual.
    ("passes/planning/matching.py", "if found.branch is None and is_add(found.add)}", "if False}"),
    ("passes/planning/matching.py", "for term, branch in (plain, plain[::-1])", "for term, branch in (plain,)"),
    ("passes/planning/matching.py", "for skip in _same_values(term, facts))", "for skip in [term])"),
    ("passes/planning/matching.py", "if len(terms) < 3 and plain is not None and all(", "if all("),
    ("passes/planning/matching.py", "key=lambda term: facts.index[skips[term]])", "key=lambda term: -facts.index[skips[term]])"),
    ("passes/planning/matching.py", "index[node] > index[term]]", "False]"),
    ("passes/planning/matching.py", "if not memory.isdisjoint(facts.writes.get(node, ()))]", "]"),
    ("passes/planning/matching.py", "visited[node] = (*visited[node], *filled)", "pass"),
    ("passes/graphs/facts.py", "not in moving]", "]"),
    ("passes/planning/matching.py", "mixes, readers = facts.kinds[add] in MIXING,", "mixes, readers = True,"),
    ("passes/planning/matching.py", "mixes, readers = facts.kinds[add] in MIXING,", "mixes, readers = False,"),
    (
        "passes/planning/matching.py",
        "return _whole(node, _unscaled(first, facts), terms, facts, sums)",
        "return _whole(node, first, terms, facts, sums)",
    ),
    (
        "passes/planning/matching.py",
        'len(terms) == 2 and add.kwargs.get("alpha", 1) == 1 else None',
        "len(terms) == 2 else None",
    ),
    ("passes/planning/matching.py", "and len(term.users) == 1 and _plain_terms(term)", "and _plain_terms(term)"),
    ("passes/planning/matching.py", 'if skip.op == "get_attr" or skip not in facts.varies or', "if"),
    (
        "passes/planning/matching.py",
        "return walk if branch in walk.between and mixes and not",
        "return walk if branch in walk.between and not",
    ),
    ("passes/planning/matching.py", "return walk if branch in walk.between and mixes and not", "return walk if mixes and not"),
    ("passes/planning/matching.py", "and mixes and not _enters(walk, skip, facts, sums) else None", "and mixes else None"),
    (
        "passes/planning/matching.py",
        "facts.kinds[node] in MIXING or node in sums for node in walk.between",
        "facts.kinds[node] in MIXING for node in walk.between",
    ),
    ("passes/planning/matching.py", "if longer and not any(node in sums for node in walk.between):", "if longer:"),
    ("passes/planning/matching.py", "if longer and not any(", "if not any("),
    # Links and chains.
    ("passes/planning/links.py", "if not _fits(node, facts) or shape_of(node) is None", "if shape_of(node) is None"),
    (
        "passes/planning/links.py",
        "if len(found) != 1 or shape_of(end := found.pop()) != shape_of(start) or",
        "if shape_of(end := found.pop()) != shape_of(start) or",
    ),
    (
        "passes/planning/links.py",
        "if len(found) != 1 or shape_of(end := found.pop()) != shape_of(start) or",
        "if len(found) != 1 or (end := found.pop()) is None or",
    ),
    ("passes/planning/links.py", "(facts.kinds[node] in LINKS and varying ==", "(varying =="),
    ("passes/planning/links.py", " and varying == {(operands(node) or (None,))[0]})", ")"),
    ("passes/planning/links.py", "if barred and alike else None", "if barred and end is not start else None"),
    ("passes/planning/planner.py", "longest = max(head, tail)", "longest = tail"),
    ("passes/planning/planner.py", "longest = max(head, tail)", "longest = head"),
    ("passes/planning/nesting.py", "if parent == i and not nodes_of(self.pieces[j]) <= kept}", "if False}"),
    ("passes/planning/planner.py", '.code == "too_short"}\n    return found', "}\n    return found"),
    ("passes/planning/planner.py", "left = set(adds_of(piece)).difference(*map(adds_of, parts))", "left = set()"),
    ("mnet_fx/captured/network.py", "if len(set().union(*owners)) < sum(map(len, owners)):", "if False:"),
    ("mnet_fx/captured/network.py", "if twice or any(", "if any("),
    (
        "mnet_fx/captured/network.py",
        'if twice or any(f"{chain[t]}.".startswith(f"{owner}.") for t in loose for owner in set().union(*owners)):',
        "if twice:",
    ),
    ("mnet_fx/captured/network.py", " or self._in_part(passes)", ""),
    ("mnet_fx/captured/network.py", "fresh = [t for t in loose if not _meets((chain[t],), self.ran, self.entered)]", "fresh = []"),
    ("mnet_fx/captured/capturing.py", "if left and torch.is_grad_enabled():", "if left:"),
    ("mnet_fx/captured/capturing.py", "graph.report = _with_break(graph.report, ", "graph.report = _with_break(report, "),
    ("passes/planning/links.py", "elif source in descended and source not in seen:", "elif source in facts.varies and source not in seen:"),
    (
        "passes/planning/links.py",
        "if node in sums or (node in facts.varies and not found.isdisjoint(facts.flow[node])):",
        "if node in sums:",
    ),
    ("passes/planning/links.py", "return plain and descended & set(facts.flow[node]) == {source}", "return plain"),
    ("passes/planning/links.py", "return tuple(found) if shape_of(node) == shape_of(end) else ()", "return tuple(found)"),
    ("passes/planning/matching.py", "or length[add] > length[successor[previous]]:", "or True:"),
    ("passes/planning/matching.py", "                length[previous] = length[add] + 1\n", ""),
    # Steps.
    ("passes/planning/spans.py", "if not exact or found.add in facts.stale:", "if not exact:"),
    (
        "passes/planning/spans.py",
        "exact = len(self.sums) == 1 and found.add is self.target and found.branch is not None",
        "exact = len(self.sums) == 1 and found.branch is not None",
    ),
    (
        "passes/planning/spans.py",
        "return found.branch if shape_of(found.add) == shape_of(found.branch or found.add) else None",
        "return found.branch",
    ),
    ("passes/planning/spans.py", "if node is not self.target and facts.users_outside(node, inside)", "if False"),
    ("passes/planning/spans.py", 'return "branch" if operands(self.target)[0] is self.sums[0].branch else "skip"', 'return "skip"'),
    (
        "passes/graphs/facts.py",
        "if node.target in OUT_OF_PLACE and memory in self.writes.get(node, ())}",
        "if node.target in OUT_OF_PLACE}",
    ),
    ("passes/planning/links.py", "links[-1] if len(kinds) == 1 else ()", "links[-1] if kinds else ()"),
    ("passes/planning/links.py", "if _alike(user, one, facts) and", "if"),
    ("passes/planning/spans.py", "private = node.users and all(user in cone or user in serving for user in node.users)", "private = True"),
    ("passes/planning/spans.py", "or node in sums or node in blocked or", "or node in blocked or"),
    ("passes/planning/spans.py", 'or facts.kinds[node] == "input")', ")"),
    ("passes/planning/spans.py", "if any(memory not in serving for memory in facts.writes.get(node, ()))}", "if False}"),
    ("passes/planning/spans.py", "if node in dead_ends and node not in cone and all(", "if node not in cone and all("),
    ("passes/planning/spans.py", 'and all(n in known or n.op == "get_attr" for n in facts.flow[node]):', ":"),
    # Memory and order.
    (
        "passes/graphs/facts.py",
        "facts.index[source] < facts.index[write] for",
        "False for",
    ),
    (
        "passes/graphs/facts.py",
        "facts.index[source] < facts.index[write] for",
        "True for",
    ),
    (
        "passes/graphs/facts.py",
        "facts.order[node] = (*facts.order[node], *readers.get(memory, ()))\n            last_write",
        "last_write",
    ),
    ("passes/graphs/facts.py", "if any(last_read[memory] > facts.index[node] for memory in targets):", "if False:"),
    ("passes/graphs/facts.py", '() if facts.kinds[node] in ("shape", "create") else facts.flow[node]', "facts.flow[node]"),
    ("passes/graphs/facts.py", "facts.shares[node] = memory or (node,)", "facts.shares[node] = (node,)"),
    ("passes/graphs/facts.py", "_find_memory(facts, observed(gm))", "_find_memory(facts, {})"),
    ("passes/graphs/facts.py", "facts.unknown.add(node)", "pass"),
    ("passes/graphs/effects.py", "self.written += [value for", "_ = [value for"),
    ("passes/graphs/effects.py", "return Effect(self.doubles.memory(node), overwritten", "return Effect((), overwritten"),
    ("passes/graphs/effects.py", "self.states += 1", "pass"),
    ("passes/graphs/effects.py", "self.doubles.make_waiting(given)", "pass"),
    ("passes/graphs/effects.py", "if key is not None and own and before ==", "if key is not None and before =="),
    ("passes/graphs/effects.py", "own and before == self.doubles.kinds(*node.all_input_nodes):", "own:"),
    ("passes/graphs/doubles.py", "return argument.kind, places[argument.number]", "return argument.kind"),
    ("passes/graphs/doubles.py", "return argument.kind, places[argument.number]", "return places[argument.number]"),
    ("passes/graphs/doubles.py", "double.version != self._version(double.number):", "False:"),
    ("passes/graphs/writes.py", "return () if _makes_fresh(node.target, word) else tuple(node.all_input_nodes)", "return ()"),
    # Copies of what is overwritten later, and what steps give to others.
    ("passes/planning/overwritten.py", "last.get(memory, -1) > when", "False"),
    ("passes/planning/overwritten.py", "last.get(memory, -1) > when", "memory in last"),
    ("passes/planning/overwritten.py", "read |= {span.source: facts.index[span.target] for span in piece[1:]}", "pass"),
    ("passes/rewriting/splitting.py", "if recorded(node) is None}", "}"),
    ("passes/rewriting/splitting.py", "later |= written_here", "later = written_here"),
    ("passes/rewriting/splitting.py", "for one in (node, *node.all_input_nodes)", "for one in (node,)"),
    ("passes/rewriting/splitting.py", " - set(() if own is None else own.written)", ""),
    ("passes/rewriting/rewriter.py", "if name in region.copied else", "if False else"),
    ("passes/planning/side_outputs.py", "self._weight(needed) > left:", "False:"),
    ("passes/planning/side_outputs.py", "return self._useful(self._tensors(found))", "return set()"),
    ("passes/planning/side_outputs.py", "return self._useful(self._tensors(found))", "return self._useful(found)"),
    ("passes/planning/side_outputs.py", " or takes_from_list(node)", ""),
    ("passes/planning/totals.py", "if node in taken or not", "if not"),
    ("passes/planning/totals.py", "so_far.step <= step_of.get(term, -2)", "term in step_of"),
    ("passes/planning/totals.py", "(total not in known if not so_far.nodes else len(total.users) == 1)", "True"),
    ("passes/planning/totals.py", "total not in known if not so_far.nodes else", ""),
    ("passes/planning/totals.py", "len(total.users) == 1)", "True)"),
    ("passes/planning/totals.py", "len(node.users) == 1}", "True}"),
    ("passes/planning/totals.py", " and found.is_unseen(facts)", ""),
    ("passes/planning/totals.py", "len(self.first.users) > 1:", "False:"),
    ("passes/planning/totals.py", "return alike or node not in facts.writes", "return True"),
    ("passes/planning/totals.py", 'node.kwargs.get("alpha", 1) != 1 or', ""),
    ("passes/graphs/schedule.py", "position |= {i: facts.index[node] for i, node in enumerate(ends)}", "pass"),
    ("passes/graphs/facts.py", ' if node.op not in ("placeholder", "get_attr")', ""),
    ("mnet_fx/regions/totals.py", "total + term if is_left else term + total", "total"),
    ("passes/planning/kept.py", "if node not in inside for", "for"),
    ("passes/planning/kept.py", "if number not in own]", "]"),
    ("passes/graphs/schedule.py", "facts.flow[node] if node in copied else facts.order[node]", "facts.flow[node]"),
    ("passes/graphs/schedule.py", "facts.flow[node] if node in copied else facts.order[node]", "facts.order[node]"),
    ("passes/graphs/schedule.py", "if len(part) > 1", "if len(part) > 2"),
    # Plans.
    ("passes/planning/planner.py", "if not inner or t == starts[-1]:", "if True:"),
    ("passes/planning/planner.py", "if newest.get(node, -1) >= starts[-1]]", "if newest.get(node, -1) >= 0]"),
    (
        "passes/planning/planner.py",
        "return [piece for piece in pieces if len(piece) >= graph.min_steps], reasons | cuts",
        "return pieces, reasons | cuts",
    ),
    ("passes/planning/planner.py", "            if step >= 0:\n                newest[node] = step\n", "            pass\n"),
    ("passes/planning/planner.py", "            nest.drop(worst)\n", "            break\n"),
    ("passes/planning/planner.py", "for level in nest.levels() if", "for level in nest.levels()[:1] if"),
    ("passes/planning/planner.py", "worst = min(stuck, key", "worst = max(stuck, key"),
    (
        "passes/planning/planner.py",
        'if (name := f"momentum_region_{number}") not in taken and not hasattr(gm, name):',
        'if (name := f"momentum_region_{number}"):',
    ),
    ("passes/planning/planner.py", "if facts.users_outside(piece[t].source, inside))", "if False)"),
    ("passes/planning/planner.py", '    if pieces or granularity == "add":', "    if True:"),
    ("passes/planning/planner.py", "granularity - 1 if isinstance(granularity, int) and granularity > 1 else", ""),
    ("passes/planning/spans.py", '1 if granularity == "module" else granularity', "1"),
    # Chains within chains, and chains that need each other.
    ("passes/planning/nesting.py", "if len(adds_of(self.pieces[i])) < most:", "if False:"),
    ("passes/planning/nesting.py", "if len(adds_of(self.pieces[i])) < most:", "if most:"),
    (
        "passes/planning/nesting.py",
        "step = steps.pop() if self.within and len(steps) == 1 else -1",
        "step = steps.pop() if len(steps) == 1 else -1",
    ),
    ("passes/planning/nesting.py", "if step < 0 else inside", "if False else inside"),
    ("passes/planning/nesting.py", "adds[step] +=", "adds[-1] +="),
    ("passes/planning/nesting.py", "self.parent |= {i: None} | dict.fromkeys(inside, i)", "self.parent[i] = None"),
    ("passes/planning/nesting.py", "if j in nest.parent} if len(nest.lost) > gone else owner", "} if len(nest.lost) > gone else owner"),
    ("passes/planning/nesting.py", "self.parent |= {j: above for j, parent in self.parent.items() if parent == i}", "pass"),
    ("passes/planning/nesting.py", "            self._lose(j, why)\n", "            pass\n"),
    ("passes/planning/hoisting.py", "if not early or early & ends or any(", "if not early or any("),
    ("passes/planning/hoisting.py", "(found.add, found.branch))}", "(found.add,))}"),
    ("passes/planning/hoisting.py", "(found.add, found.branch))}", "(found.branch,))}"),
    ("passes/planning/hoisting.py", "or any(node in facts.writes for node in early):", "or False:"),
    ("passes/planning/hoisting.py", " | (set(facts.flow[node]) & set(first.nodes))", ""),
    ("passes/planning/hoisting.py", "return None if check(rest, facts) is not None else (rest,", "return (rest,"),
    ("passes/planning/planner.py", "and not (nodes_of(before[i]) - nodes_of(found)) & held}", "}"),
    (
        "passes/planning/planner.py",
        "free = after.keys() - _stuck(level, [after.get(i, piece) for i, piece in enumerate(nest.pieces)], graph)",
        "free = after.keys()",
    ),
    ("passes/planning/planner.py", "[after[i] if i in free else piece", "[after.get(i, piece)"),
    ("passes/rewriting/invariants.py", "    _verify_nesting(plan)\n", ""),
    # Bodies and the new graph.
    ("passes/rewriting/step_code.py", "            self.units.sort(key=lambda unit: position[unit.name])\n", "            pass\n"),
    ("passes/rewriting/step_code.py", "if name not in held and (", "if ("),
    (
        "passes/rewriting/step_code.py",
        "inputs, orders = self.frozen(self.inputs(unit)), orders_of(unit, self.named)",
        "inputs, orders = (), ()",
    ),
    (
        "passes/rewriting/rewriter.py",
        "for i, unit in enumerate(_order(below, facts))}",
        "for i, unit in enumerate([*facts.nodes, *below])}",
    ),
    (
        "passes/rewriting/step_code.py",
        "self.frozen(self.outputs), len(self.step.sides), len(self.attributes)",
        "len(self.step.sides), len(self.attributes)",
    ),
    ("passes/rewriting/step_code.py", "OUT_OF_PLACE[node.target] if node in self.copied else node.target", "node.target"),
    ("passes/rewriting/step_code.py", "(*names, *region.extras, *(total.nodes[-1] for total in region.totals))", "names"),
    # Layouts.
    ("passes/capturing/layouts.py", "if any(map(self._is_written, (root, *path, branch, add))) or is_identity", "if is_identity"),
    ("passes/capturing/layouts.py", 'if root.meta.get("levelled") and is_identity(root, path):', "if is_identity(root, path):"),
    ("passes/capturing/layout_ops.py", "[dims.index(i) for i in range(len(dims))]", "dims"),
    ("passes/capturing/layout_ops.py", "return torch.equal(value, start) if value.shape == start.shape else False", "return True"),
    # Previews.
    ("passes/capturing/torch_layers.py", "x = x + block(norm(x)) if norm_first else norm(x + block(x))", "x = x + block(norm(x))"),
    ("passes/capturing/torch_layers.py", "src_mask=mask, is_causal=is_causal is True", "is_causal=is_causal is True"),
    ("passes/capturing/torch_layers.py", "memory_key_padding_mask=memory_key_padding_mask,\n            tgt", "tgt"),
    (
        "passes/capturing/torch_layers.py",
        "key_padding_mask=src_key_padding_mask, is_causal=is_causal)",
        "key_padding_mask=None, is_causal=is_causal)",
    ),
    # What a preview takes out of caches again.
    ("passes/capturing/leftovers.py", "                cache.cache_clear()\n", "                pass\n"),
    ("passes/capturing/leftovers.py", "if cache.cache_info().misses != misses:", "if True:"),
    ("passes/capturing/leftovers.py", "                    space[name] = before[name]\n", "                    pass\n"),
    ("passes/capturing/leftovers.py", "for value in list(vars(cls).values()):", "for value in ():"),
    ("passes/capturing/leftovers.py", " or (isinstance(item, tuple) and any(map(_is_standin, item)))", ""),
    ("passes/capturing/leftovers.py", "isinstance(value, dict) or hasattr(type(value), key)", "True"),
    (
        "passes/capturing/leftovers.py",
        'getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value',
        "value",
    ),
    ("passes/graphs/writes.py", '("torch", "_operator", "builtins", "math", "passes")', '("torch", "_operator", "builtins", "math")'),
    ("passes/graphs/facts.py", "before += [last_write[base]", "_ = [last_write[base]"),
    ("passes/graphs/facts.py", "before += [last_maybe[base]", "_ = [last_maybe[base]"),
    ("passes/graphs/facts.py", "[last_call[state] for state in states if state in last_call]", "[]"),
    ("passes/graphs/facts.py", "in bases | lent:", "in bases:"),
    # Captures.
    ("mnet_fx/captured/configured.py", '"fail_on_recompile_limit_hit": True', '"fail_on_recompile_limit_hit": False'),
    ("mnet_fx/captured/configured.py", '"skip_nnmodule_hook_guards": False', '"skip_nnmodule_hook_guards": True'),
    ("mnet_fx/captured/configured.py", '"allow_rnn": True', '"allow_rnn": False'),
    ("mnet_fx/captured/configured.py", '"capture_dynamic_output_shape_ops": True', '"capture_dynamic_output_shape_ops": False'),
    ("mnet_fx/captured/configured.py", '"use_numpy_random_stream": True', '"use_numpy_random_stream": False'),
    ("mnet_fx/rewrite.py", "            if not whole:\n                break", "            if False:\n                break"),
    ("mnet_fx/captured/forward.py", "        if not call.graphs and not", "        if False and not"),
    ("mnet_fx/captured/forward.py", 'and not self.network.none_ran(call.entered, passed_by(self.inside, [""])):', ":"),
    ("mnet_fx/captured/calls.py", "graph = graph.at(self.place)", "pass"),
    ("mnet_fx/captured/doors.py", "            call.within.pop()", "            pass"),
    ("mnet_fx/captured/forward.py", "    check_caller", "    lambda owner: None"),
    ("mnet_fx/captured/capturing.py", "call.ran(graph)", "pass"),
    ("mnet_fx/captured/doors.py", "if call is None and (path", "if False and (path"),
    ("mnet_fx/captured/doors.py", "        if self.path in closed:\n", "        if False:\n"),
    ("mnet_fx/captured/doors.py", "if isinstance(door, Door) and door.path in closed and", "if False and"),
    ("mnet_fx/captured/doors.py", "        if compiling:\n", "        if False:\n"),
    ("mnet_fx/captured/calls.py", "        self.graphs.append(graph)\n", ""),
    ("mnet_fx/captured/doors.py", "if len(call.graphs) == before and", "if False and"),
    ("passes/capturing/dynamo.py", "path if found[path] == 1 else name", "path"),
    ("passes/capturing/dynamo.py", "|buffers)(?:'\\])?\\['([^']*)'\\]\")", "|buffers)\\['([^']*)'\\]\")"),
    ("passes/capturing/dynamo.py", "(?:__dict__\\[')?", ""),
    ("mnet_fx/inner.py", "if torch.is_grad_enabled() and any(t.requires_grad for t in fakes):", "if True:"),
    ("mnet_fx/inner.py", "risky |= run.early | (run.apart - graded)", "risky |= run.apart - graded"),
    ("mnet_fx/inner.py", "risky |= run.early | (run.apart - graded)", "risky |= run.early | run.apart"),
    ("mnet_fx/inner.py", "risky |= run.early | (run.apart - graded)", "risky |= run.early"),
    ("mnet_fx/inner.py", "risky = _storages(run.run(*inputs))", "risky = _storages(run.run(*inputs) and ())"),
    ("mnet_fx/inner.py", "        if mistaken(gm, recorded):", "        if False:"),
    ("mnet_fx/inner.py", "self.apart |= given - written", "self.apart |= given"),
    ("mnet_fx/inner.py", "if written or not _storages(result) <= given:", "if not _storages(result) <= given:"),
    ("mnet_fx/inner.py", "if written or not _storages(result) <= given:", "if True:"),
    ("mnet_fx/inner.py", "with faking(mode), torch.no_grad():", "with faking(mode):"),
    ("mnet_fx/inner.py", "return recurrent(gm) or sized_by_values(gm) or", "return sized_by_values(gm) or"),
    ("mnet_fx/inner.py", "return recurrent(gm) or sized_by_values(gm) or", "return recurrent(gm) or"),
    ("mnet_fx/inner.py", '*(node.meta.get("unbacked_bindings") or ()), ', ""),
    ("mnet_fx/captured/configured.py", "    if not getattr(torch._dynamo.config, _SIZED):\n        return\n", ""),
    ("mnet_fx/captured/capturing.py", "            begin_anew_unsized()\n", "            pass\n"),
    ("mnet_fx/captured/capturing.py", "return frames.isdisjoint(own) and all(", "return all("),
    ("mnet_fx/captured/capturing.py", "inside, reason):\n            return None", "inside, reason):\n            pass"),
    ("mnet_fx/captured/configured.py", " or name == _SIZED", ""),
    ("mnet_fx/captured/value_sizes.py", "if _ASSERTION not in str(error):", "if True:"),
    ("mnet_fx/captured/value_sizes.py", "return bool(made) and not any(", "return bool(made) and all("),
    (
        "mnet_fx/inner.py",
        "with fake_mode, enable_python_dispatcher(), sizes, hidden:",
        "with fake_mode, enable_python_dispatcher(), sizes:",
    ),
    ("mnet_fx/inner.py", "dynamo_config.skip_nnmodule_hook_guards = False", "pass"),
    ("passes/capturing/attention_kernels.py", "_choose(values[node], held[-1])", "_choose(values[node], held[1])"),
    ("passes/capturing/attention_kernels.py", "if len(held) > 1:\n                _choose", "if False:\n                _choose"),
    ("passes/capturing/attention_kernels.py", "if len(held) > 1 else None", "if False else None"),
    ("passes/capturing/attention_kernels.py", "return own or isinstance", "return isinstance"),
    ("passes/graphs/attention.py", "set_priority=in_order", "set_priority=False"),
    ("mnet_fx/compiled/artifacts.py", " and not recurrent(body)", ""),
    ("mnet_fx/compiled/backend.py", "return gm if recurrent(gm) or sized_by_values(gm) else inner", "return inner"),
    ("mnet_fx/captured/forward.py", "        self.sized = False\n", ""),
    ("passes/capturing/sizes.py", "int_truediv = staticmethod(operator.truediv)", "pass"),
    ("passes/graphs/facts.py", '"identity" if _repeats', '"identity" if False and _repeats'),
    ("mnet_fx/inner.py", "    _forget_budgets(gm)\n    with", "    with"),
    ("mnet_fx/inner.py", "activation_memory_budget=1.0", "activation_memory_budget=0.0"),
    ("mnet_fx/inner.py", "        with all_kept(gm):\n", "        if True:\n"),
    ("mnet_fx/inner.py", 'if self.inner.config.get("triton.cudagraphs"):', "if False:"),
    ("mnet_fx/inner.py", "isinstance(other, WholeSteps) and self.inner == other.inner", "False"),
    ("mnet_fx/named/layers.py", 'self.__dict__ | {"compiled": None}', "self.__dict__"),
    ("mnet_fx/named/layers.py", "        del self.owner.compile\n", ""),
    ("mnet_fx/named/layers.py", " or layer._compiled_call_impl is not None:", ":"),
    ("mnet_fx/named/layer_step.py", "if value is x]", "if key == place]"),
    ("mnet_fx/captured/copies.py", "modules = [*own, *found.hidden]", "modules = own"),
    (
        "mnet_fx/runtime/start.py",
        "if reversible and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:",
        "if False:",
    ),
    ("mnet_fx/compiled/compiler.py", "(gm.meta.get(OVERWRITTEN) or mistaken(gm, inputs))", "mistaken(gm, inputs)"),
    ("mnet_fx/compiled/compiler.py", "(gm.meta.get(OVERWRITTEN) or mistaken(gm, inputs))", "gm.meta.get(OVERWRITTEN)"),
    ("mnet_fx/compiled/compiler.py", "if not _of_tracing(error):", "if True:"),
    ("mnet_fx/compiled/compiler.py", "if not _of_tracing(error):", "if False:"),
    ("mnet_fx/compiled/compiler.py", "(MnetError, TorchDynamoException)", "MnetError"),
    ("mnet_fx/compiled/filling.py", "run = piece if changed else self.compiler(piece, args)", "run = self.compiler(piece, args)"),
    ("mnet_fx/compiled/filling.py", " and not changed else None", " else None"),
    ("mnet_fx/inner.py", "if hooked else contextlib.nullcontext()", "if True else contextlib.nullcontext()"),
    ("mnet_fx/captured/network.py", "        if not lost and not new:\n", "        if True:\n"),
    ("mnet_fx/captured/network.py", "        if not lost and not new:\n", "        if not lost:\n"),
    ("mnet_fx/captured/network.py", "        if not lost and not new:\n", "        if not new:\n"),
    ("mnet_fx/captured/network.py", "end_of(steps[t + len(known) - 1][1]) not in self.chains[known]:", "False:"),
    ("mnet_fx/captured/network.py", "return alike and self._contradiction(chains, ran, ()) is None", "return alike"),
    ("mnet_fx/captured/network.py", "alike = all(self.chains[chain] == chains[chain] for", "alike = all(True for"),
    ("mnet_fx/checkpoints.py", "        expect(own, self.network, prefix[:-1] or self.name)\n", ""),
    ("mnet_fx/loading.py", "        expect(record, network_of(net), type(net).__name__)\n", ""),
    ("mnet_fx/captured/network.py", "                    graph.refused = reason\n", "                    pass\n"),
    ("mnet_fx/captured/network.py", "            self.entered |= set(entered)\n", ""),
    ("mnet_fx/captured/network.py", 'startswith(f"{path}.")', "startswith(path)"),
    ("mnet_fx/captured/graphs.py", " | {joined(prefix, path) for path in run}", ""),
    ("mnet_fx/captured/capturing.py", 'frozenset({"", *modules_run(gm)})', 'frozenset({""})'),
    ("mnet_fx/captured/capturing.py", "(*call.graphs, *call.new)}", "call.new}"),
    ("mnet_fx/captured/stand_ins.py", "special = any(map(_is_special, named.values()))", "special = False"),
    ("mnet_fx/captured/stand_ins.py", "return made.requires_grad_(t.requires_grad)", "return made"),
    ("mnet_fx/captured/stand_ins.py", "torch._dynamo.maybe_mark_dynamic(made, i)", "pass"),
    ("mnet_fx/captured/unseen.py", "if type(value) is random.Random:", "if False:"),
    ("mnet_fx/captured/unseen.py", "if value is os.getenv:", "if False:"),
    ("mnet_fx/captured/unseen.py", '{"vars", "__dict__"}', '{"vars"}'),
    ("mnet_fx/captured/unseen.py", '{"vars", "__dict__"}', '{"__dict__"}'),
    ("mnet_fx/captured/unseen.py", "one not in found and one.__module__ in files]", "False]"),
    ("mnet_fx/captured/unseen.py", "methods.get(name) or function.__globals__.get(name)", "methods.get(name)"),
    ("mnet_fx/captured/unseen.py", 'if not {"pop", "popleft"}.isdisjoint', "if False and not {0}.isdisjoint"),
    ("mnet_fx/captured/unseen.py", "any(value is one for one in drawn.values())", "False"),
    ("mnet_fx/captured/unseen.py", '{"CHECK_EXC_MATCH"}', "set()"),
    ("mnet_fx/captured/left_out.py", "call.entered - call.places if", "call.entered if"),
    ("mnet_fx/captured/left_out.py", " if not _is_rewritten(owner, path)", ""),
    ("mnet_fx/captured/left_out.py", "if add.path in left]", "]"),
    ("mnet_fx/captured/forward.py", "                forget(self.owner)  #", "                #"),
    ("mnet_fx/captured/masks.py", "            module.__dict__[_FAST] = 0\n", ""),
    # Checkpoints, and lists of tensors.
    ("passes/capturing/checkpointed.py", "    body, _ = written_out(body, checkpoints(body))\n", ""),
    ("mnet_fx/compiled/backend.py", "return found if len(used) == len(names) else", "return found if True else"),
    ("passes/rewriting/splitting.py", 'if isinstance(node.meta.get("example_value"), (list, tuple)):', "if False:"),
    (
        "passes/planning/spans.py",
        "outside |= {node for node in serving if takes_from_list(node)",
        "outside |= {node for node in serving if False",
    ),
    # The runtime.
    ("mnet_fx/regions/region.py", "_Within(module) if isinstance(module, MomentumRegion) else module", "module"),
    ("mnet_fx/regions/region.py", '.run(x, steps, "stored", sides)', ".run(x, steps, self._region[0].backward, sides)"),
    ("mnet_fx/regions/region.py", "        self.velocity = region.velocity\n\n    def path_of", "\n    def path_of"),
    ("mnet_fx/regions/region.py", "            return within.path_of(rest)\n", "            return rest\n"),
    *mutants_runtime.MUTANTS,
    # Orders of memory, blocks under no_grad, sizes, what the first step alone makes.
    ("passes/graphs/orders.py", "sorted(long, key=lambda i: -long[i])", "sorted(long)"),
    ("passes/rewriting/step_code.py", "if order and own[0] else x", "if False else x"),
    ("passes/rewriting/step_code.py", "value if order is None else laid(graph, value, order)", "value"),
    ("passes/rewriting/step_code.py", 'values["x", 0] = laid(graph, values["x", 0], self.order)', "pass"),
    ("passes/capturing/grad_modes.py", "if source in off or not needs_gradient(source):", "if True:"),
    ("passes/capturing/grad_modes.py", "if source not in known or is_attribute(source):", "if source not in known:"),
    ("passes/capturing/grad_modes.py", " or any(node.target in _FLIPS for node in graph.nodes)", ""),
    ("passes/capturing/grad_modes.py", "return not any(map(needs_gradient, read)) and", "return"),
    ("passes/capturing/grad_modes.py", "return off if enabled else set()", "return off"),
    ("mnet_fx/compiled/region.py", "torch.no_grad() if self.is_off else nullcontext()", "nullcontext()"),
    ("mnet_fx/captured/network.py", " or self._both(chains, left)", ""),
    ("mnet_fx/captured/network.py", "{*self.chains, *chains} & (self.left | left)", "{*chains} & left"),
    ("passes/planning/links.py", " or not _gradients_come(start, end, seen, facts):", ":"),
    ("passes/planning/links.py", 'if word_of(node.target) != "detach":', "if True:"),
    ("passes/planning/links.py", "return facts.kinds[node] in _WIDE\n", "return True\n"),
    ("passes/planning/links.py", "return all(abs(value) < _LARGE for value in numbers)", "return True"),
    ("passes/planning/links.py", "return a.target == b.target and _values(a) == _values(b)", "return True"),
    ("passes/planning/links.py", "or facts.kinds[a] in LINKS:", "or False:"),
    ("passes/planning/links.py", 'if facts.kinds[source] == "create"]', "if False]"),
    ("passes/graphs/facts.py", "if not _is_number(node) and (node.op ==", "if (node.op =="),
    ("passes/planning/planner.py", "if all(newest[node] == starts[-1] for node in inner) and (freed :=", "if False and (freed :="),
    ("passes/capturing/sizes.py", "            return value\n", "            return None\n"),
    ("passes/capturing/sizes.py", "if not expression.free_symbols or expression.free_symbols - self.inputs.keys():", "if True:"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file or text has this in it")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in "".join(mutant)][options.skip :]
    if options.list:
        print(*(describe(mutant) for mutant in chosen), sep="\n\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("passes", "mnet_fx", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        survivors = []
        for mutant in tqdm(chosen):
            if survives(mutant, copy):
                survivors.append(mutant)
                tqdm.write(f"\nNot noticed: {describe(mutant)}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were noticed")
    sys.exit(bool(survivors))


def describe(mutant: tuple[str, str, str]) -> str:
    file, old, new = mutant
    return f"{file}\n- {old.strip()}\n+ {new.strip()}"


def mutated(text: str, old: str, new: str) -> str:
    """The text with its one occurrence of `old` replaced."""
    if text.count(old) != 1:
        raise ValueError(f"stands there {text.count(old)} times, not once: {old}")
    return text.replace(old, new)


def survives(mutant: tuple[str, str, str], copy: Path) -> bool:
    """Whether all tests pass although the mutant is in place."""
    file, old, new = mutant
    path = copy / file
    original = path.read_text()
    path.write_text(mutated(original, old, new))
    child = os.fork()  # of a process that has imported torch, and nothing of ours
    if child == 0:
        _run_tests(copy, TESTS.get(file, MATCHER))
    _, status = os.waitpid(child, 0)
    path.write_text(original)
    return os.waitstatus_to_exitcode(status) == 0


def _run_tests(copy: Path, tests: list[str]) -> NoReturn:
    """The tests in the copy, in this process, which ends with their status, or by a signal after ten minutes."""
    signal.alarm(600)
    os.chdir(copy)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.path[:] = [str(copy), *(path for path in sys.path if path != str(Path(__file__).parent))]
    sys.dont_write_bytecode = True
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    torch.set_num_threads(1)
    os._exit(pytest.main(["-x", "-q", "-n", "0", "-m", "not slow", "-k", SLOW, "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    main()
