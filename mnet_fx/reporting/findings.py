"""What was found in a model, as data: its residual adds, the regions made of them, and what autograd keeps along the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from passes import Refusal, Stretch

__all__ = ["AddReport", "CapturedPart", "Findings", "RegionReport"]


@dataclass(frozen=True)
class RegionReport:
    """One rewritten chain.

    Attributes:
        name: attribute of the region in the module it was rewritten in.
        path: path of the module that contains the chain, "" for the whole model.
        steps: number of steps T.
        adds: number of residual adds in them.
        kind: "pre-activation", "post-activation", "post-norm", "block", or "named" (a layer of a named container is a step, and is
            counted as one add).
        gamma: the momentum where it is the same for all steps but perhaps the first, else the (smallest, largest).
        shape: shape of the stream, None where the capture recorded none.
        storage: "reverse" (the state X, U is kept), "inputs" (x[t] of each step is kept, fewer bytes for a short chain), "autograd"
            (backward="stored"), or "nested" (nothing is kept: it lies within a step of another region, which runs it again).
        state_bytes_per_element: bytes that the region keeps per element of the stream between forward and backward, by theory, for a
            stream of the model's parameter dtype; None for "autograd", which depends on what the steps save, and for "nested".
        copied: side inputs and buffers that the model overwrites after the chain has read them, of which the chain keeps copies.
        copied_bytes: bytes of these copies, None where sizes are not known.
        copied_later: of a named region, the side inputs and buffers that backward passes have found overwritten, with their bytes; calls
            after that keep copies of them. Empty until then.
    """

    name: str
    path: str
    steps: int
    adds: int
    kind: str
    gamma: float | tuple[float, float]
    shape: tuple[int, ...] | None
    storage: str
    state_bytes_per_element: float | None
    copied: tuple[str, ...] = ()
    copied_bytes: int | None = 0
    copied_later: Mapping[str, int] = field(default_factory=dict)

    @property
    def all_copied(self) -> tuple[str, ...]:
        """What the chain keeps copies of, by now."""
        return (*self.copied, *self.copied_later)

    @property
    def all_copied_bytes(self) -> int | None:
        """Bytes of these copies."""
        return None if self.copied_bytes is None else self.copied_bytes + sum(self.copied_later.values())

    @property
    def state_bytes(self) -> int | None:
        """Bytes that the region keeps between forward and backward, copies included; None where a size is not known."""
        if self.storage == "nested":
            return self.all_copied_bytes
        copied = self.all_copied_bytes
        if self.shape is None or min(self.shape, default=1) < 0 or self.state_bytes_per_element is None or copied is None:
            return None
        return round(self.state_bytes_per_element * math.prod(self.shape)) + copied


@dataclass(frozen=True)
class CapturedPart:
    """One part of the model that was captured.

    Attributes:
        path: path of the module, "" for the whole model.
        front_end: "Dynamo" (a graph that it captured, and will capture again after any change), "preview" (read without inputs; the first
            call decides), "GraphModule" (the graph that was given), "named" (layers of a named container), or "torch.compile" (a graph
            of the backend).
        residual_adds, rewritten_adds: number of residual-looking adds found in it, and of those rewritten.
    """

    path: str
    front_end: str
    residual_adds: int
    rewritten_adds: int


@dataclass(frozen=True)
class AddReport:
    """One residual-looking add.

    Attributes:
        node: name of its node in the captured graph; after a dot, in the body of a node; empty for a layer of a named container.
        path: path of the module that owns it, "" for the whole model.
        region: name of the region it was rewritten into; empty where it was left as it is.
        step: index of the step of that region; None where it was left.
        code: why it was left: a code of `passes.CODES`; empty where it was rewritten.
        explanation, hint: what was found, and what can be done about it, one sentence each; empty where it was rewritten.
        stretch: index of the stretch it lies in; None where there is none.
    """

    node: str
    path: str
    region: str = ""
    step: int | None = None
    code: str = ""
    explanation: str = ""
    hint: str = ""
    stretch: int | None = None

    @classmethod
    def left(cls, refusal: Refusal) -> AddReport:
        """One that was left as it is."""
        return cls(refusal.node, refusal.path, code=refusal.code, explanation=refusal.explanation, hint=refusal.hint)

    @property
    def rewritten(self) -> bool:
        return bool(self.region)


@dataclass(frozen=True)
class Findings:
    """All that is known of a rewrite.

    Attributes:
        residual_adds: number of residual-looking adds that were found.
        rewritten_adds: number of those that lie in a region.
        regions: the regions, in the order in which the model runs.
        refusals: why each other add, or a whole module, was left as it was.
        captured: which parts of the model were captured, and how.
        kept_outside: bytes that ordinary autograd saves for what lies outside of all chains, for the inputs of the capture: see
            `passes.planning.kept` for what is counted. None where that is not known, as in a preview, for named containers, and under
            rest="checkpoint", of which `mnet_fx.estimate` tells.
        adds: every residual-looking add, once, in the order in which the model runs.
        stretches: the model from input to output: each step, and what lies between regions, with what autograd saves for it in the
            original model (`saved`), and what is kept after the rewrite (`kept`: of a step, its share of the state of its region).
        rest: what becomes of what lies outside of chains, the option of that name.
        heads: paths of the linear layers whose cross entropy is computed in chunks of tokens, under rest="checkpoint".
        again: of named regions, paths of the modules outside of the chains that run again in the backward pass, under rest="checkpoint".
    """

    residual_adds: int
    rewritten_adds: int
    regions: tuple[RegionReport, ...]
    refusals: tuple[Refusal, ...]
    captured: tuple[CapturedPart, ...] = field(default_factory=tuple)
    kept_outside: int | None = None
    adds: tuple[AddReport, ...] = field(default_factory=tuple)
    stretches: tuple[Stretch, ...] = field(default_factory=tuple)
    rest: str = "store"
    heads: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    @property
    def saved(self) -> int | None:
        """Bytes that autograd saves for the original model, parameters and inputs apart; None where they are not known."""
        return _total([stretch.saved for stretch in self.stretches])

    @property
    def kept(self) -> int | None:
        """Bytes kept after the rewrite, by theory: the states of the regions and what lies outside of them; None where not known."""
        return _total([stretch.kept for stretch in self.stretches])


def _total(sizes: list[int | None]) -> int | None:
    return None if not sizes or None in sizes else sum(size or 0 for size in sizes)
