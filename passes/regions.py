"""The nouns: what the passes find, plan and refuse.

Everything here is frozen data that names graph nodes by name, so that a plan prints, compares, and survives a copy of the graph.

    x[0] = source of the first step
    |-- Step 0: nodes, adds --> x[1] = its target = source of step 1
    |-- Step 1 ...          --> x[2]
    ...
    Region = the whole run of steps, which `rewrite` replaces by one call
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.fx as fx

from passes.refusals import CODES

__all__ = ["Form", "Granularity", "Plan", "PlannedRegion", "Refusal", "RegionCode", "ResidualAdd", "Step", "StepCode", "Stretch", "Total"]

Form = Literal["branch", "block"]
Granularity = Literal["add", "module"] | int
"""What a step is: each add; each block that owns consecutive adds; or so many of these blocks."""


@dataclass(frozen=True)
class Refusal:
    """Why one residual-looking add, or one module, was not rewritten. Falsy, so that a failed match can be returned as a value.

    Attributes:
        code: one of the fixed codes of `passes.CODES`, such as "projection_shortcut".
        node: name of the add in the captured graph; empty where a whole module is refused.
        path: path of the module that owns the add, such as "layer1.0".
        explanation: what was found, in one sentence.
        hint: what the user can do about it, in one sentence.
    """

    code: str
    node: str
    path: str
    explanation: str
    hint: str

    @classmethod
    def of(cls, code: str, node: str, path: str, explanation: str) -> Refusal:
        """A refusal with the hint of its code."""
        return cls(code, node, path, explanation, CODES[code].hint)

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class ResidualAdd:
    """A sum `skip + branch(skip, *sides)`, found by dataflow.

    Attributes:
        add: name of the node that completes the sum.
        skip: name of the node that carries x.
        branch: name of the node that carries branch(x) where the sum is exactly `skip + branch`; None for any other form
            (three or more terms, `alpha=`), where only the whole sum is known.
        path: path of the module that owns the add.
    """

    add: str
    skip: str
    branch: str | None
    path: str


@dataclass(frozen=True)
class Step:
    """One step of a chain: the nodes that compute x[t+1] from x[t].

    Attributes:
        source: name of the node x[t].
        target: name of the node x[t+1]; it has the shape and dtype of x[t].
        nodes: names of the nodes computed inside the step, in graph order, target included, source not.
        adds: names of the residual adds inside (one, or several where steps are blocks).
        form: "branch" when x[t+1] = x[t] + branch exactly, so that f is the branch; "block" when only x[t+1] as a whole is known
            (post-activation, post-norm, several adds), so that f = x[t+1] - x[t].
        branch: name of the node that carries f when form is "branch" (None when form is "block").
        sides: names of the nodes outside the step that it reads besides `source`, in order of first use.
        extras: names of the nodes inside the step, other than target, that are read outside it.
        path: path of the module that owns the step.
        written: which term an in-place add of form "branch" writes to, and so gives the sum its dtype: "skip", "branch", or None.
        link: kinds of the operations behind its last sum, such as ("norm",).
    """

    source: str
    target: str
    nodes: tuple[str, ...]
    adds: tuple[str, ...]
    form: Form
    branch: str | None
    sides: tuple[str, ...]
    extras: tuple[str, ...]
    path: str
    written: Literal["skip", "branch"] | None = None
    link: tuple[str, ...] = ()


@dataclass(frozen=True)
class Total:
    """A running sum of extras, which the region forms as they come.

    Attributes:
        first: name of the node that it begins with, or a number.
        begins: index of the step of which that is an extra; -1 if it is from before the region, or a number.
        terms: of each term the index of its step, the name of its node, and whether the sum so far is the left operand.
        nodes: names of the sums, in order; the last one leaves the region, in place of the terms.
    """

    first: str | float
    begins: int
    terms: tuple[tuple[int, str, bool], ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRegion:
    """A run of two or more consecutive steps that will become one reversible region.

    Attributes:
        name: attribute name that the region module gets in the rewritten graph, such as "momentum_region_0".
        within: name of the region in a step of which this one lies, innermost; empty for most.
        backward: "stored" if autograd stores its activations in each run of the step that it lies in, as long as its gradients take.
        path: deepest module path that contains every step, such as "layer3"; empty for the root.
        kind: "pre-activation" (every link is the add itself), "post-activation", "post-norm", or "block" (granularity "module", mixed
            links).
        steps: the steps in order; steps[t].target == steps[t + 1].source.
        escapes: indices t with 1 <= t < len(steps) of stream values x[t] that are read outside the region.
        shape: shape of the stream (None where the capture recorded none; -1 for a dynamic dimension).
        dtype: name of the stream's dtype, such as "float32", or None.
        copied: names of the side inputs, of which the region is given copies, and of values x[t], of which others are, since the graph
            overwrites them after the region has read them.
        copied_bytes: bytes of these copies, None where the capture recorded no sizes.
        totals: running sums of extras that it forms.
    """

    name: str
    path: str
    kind: str
    steps: tuple[Step, ...]
    escapes: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    within: str = ""
    backward: Literal["reversible", "stored"] = "reversible"
    copied: tuple[str, ...] = ()
    copied_bytes: int | None = 0
    totals: tuple[Total, ...] = ()

    @property
    def adds(self) -> tuple[str, ...]:
        return tuple(add for step in self.steps for add in step.adds)

    @property
    def sides(self) -> tuple[str, ...]:
        """Side inputs of all steps, without repetition, in order of first use; then what totals begin with."""
        firsts = [total.first for total in self.totals if total.begins < 0 and isinstance(total.first, str)]
        return tuple(dict.fromkeys((*(side for step in self.steps for side in step.sides), *firsts)))

    @property
    def extras(self) -> tuple[str, ...]:
        """Extras of all steps that are in no total."""
        summed = {name for total in self.totals for name in (total.first, *(name for _, name, _ in total.terms))}
        return tuple(name for step in self.steps for name in step.extras if name not in summed)

    @property
    def nodes(self) -> tuple[str, ...]:
        """All that is computed inside: those of the steps, and the sums of totals."""
        return (*(name for step in self.steps for name in step.nodes), *(name for total in self.totals for name in total.nodes))


@dataclass(frozen=True)
class Stretch:
    """A part of a planned graph: one step of an outermost region, or nodes of one module between regions.

    Attributes:
        path: path of the module that owns it.
        region: name of the region; empty between regions.
        step: index of the step; None between regions.
        operations: number of its nodes.
        adds: names of the residual-looking adds in it, and of nodes that run a body with such adds.
        saved: bytes that autograd saves for it in the original model, each storage where it is saved first; None where not known.
        kept: likewise, without what the regions replace: 0 for a step.
        reads: indices of the stretches before whose values it reads; -1 for an input of the graph.
    """

    path: str
    region: str
    step: int | None
    operations: int
    adds: tuple[str, ...]
    saved: int | None
    kept: int | None
    reads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What will be rewritten and what will not; regions and refusals together account for every residual-looking add.

    Attributes:
        residual_adds: names of all residual-looking adds of the graph, in graph order.
        regions: the regions, in graph order of their first nodes; disjoint, or one within a step of another.
        refusals: one for each residual-looking add that lies in no region (module refusals of the capture are not in here).
        kept_outside: bytes that autograd keeps for what lies outside of all regions, see
            `passes.planning.kept`; None where they are not known.
        stretches: the graph from input to output, where `passes.with_stretches` has added it.
    """

    residual_adds: tuple[str, ...]
    regions: tuple[PlannedRegion, ...]
    refusals: tuple[Refusal, ...]
    kept_outside: int | None = None
    stretches: tuple[Stretch, ...] = ()

    @property
    def rewritten_adds(self) -> tuple[str, ...]:
        return tuple(add for region in self.regions for add in region.adds)


@dataclass(frozen=True)
class StepCode:
    """One step as `build_region` receives it: a body that it shares with all steps of the same structure, and what is particular to it.

    Attributes:
        body: graph `(self, x, *sides) -> (y, *extras)` always returning a tuple. y is the branch when form is "branch", else x[t+1].
            Modules are called as `self.m0, self.m1, ...` and attributes read as `self.a0, self.a1, ...`; steps of equal structure
            hold the *same* Graph object.
        form: as in `Step`.
        modules: path of each of m0, m1, ... from the root of the captured model, or the name of a region within the step.
        attributes: path of each of a0, a1, ... (parameters, buffers, constants) from that root.
        sides: for each side input of the body, its index in the region's side inputs.
        extras: number of extra outputs.
        path, written: as in `Step`.
    """

    body: fx.Graph = field(compare=False, repr=False)
    form: Form
    modules: tuple[str, ...]
    attributes: tuple[str, ...]
    sides: tuple[int, ...]
    extras: int
    path: str
    written: Literal["skip", "branch"] | None = None


@dataclass(frozen=True)
class RegionCode:
    """A planned region with the code of its steps.

    The module that `build_region` makes of it is called in the new graph as `region(x0, *sides)`, with copies of the sides that are
    overwritten later, and returns x[T] alone if there are
    neither escapes nor extras, else the tuple `(x[T], *escapes, *extras of step 0, *extras of step 1, ..., *totals)`, without the extras
    that are summed.
    """

    region: PlannedRegion
    steps: tuple[StepCode, ...]
