"""What the second run of a step must see so that it computes what the first run computed.

`Conditions` records it around the first run and restores it around every later one:

- torch's switches: see `surroundings`;
- random numbers: the states of the default generators, of attributes, and of Python and NumPy, kept only if the step draws from them;
- parameters: the very tensors the first run used, also if the module has others by now (swapped in for the time of the rerun, as by
  `torch.func.functional_call`); a fingerprint shows whether their values changed since, whatever changed them;
- side inputs: likewise; lists and dictionaries of them hold what they held before the step;
- side inputs and buffers that are overwritten after the step: copies, in named regions (`own_copies`);
- which of these tensors require gradients;
- the Python attributes of the step's modules: see `attributes`;
- buffers, and tensors that are attributes, that the step changed, in place or by assignment: the values before the step. A later run works
  on copies of them and leaves no trace, so batch statistics move once. The others must still have their values, as parameters must.

Not covered, as under `torch.utils.checkpoint`: forward hooks fire again, and other hidden state (global variables, what functions close
over) is not restored; if that changes a result, the proof says so, also of what the step does not return (`unreturned`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.utils.stateless import _reparametrize_module

from ..arithmetic.kernels.eager import is_freed
from ..arithmetic.valueless import Drawn, Effects, valueless
from .attributes import STANDARD, Attributes, without_traces
from .generators import generators, moved
from .guise import is_ordinary
from .noted import Known, fingerprints, graphs, version
from .own_copies import OwnCopies, is_copyable
from .proofs import Proofs
from .sides import leaves, rebuilt
from .surroundings import around, surrounded, untuned
from .turns import Turns

__all__ = ["Conditions", "undisturbed"]

_TURNS = Turns()
SMALL = 1 << 18  # bytes of a buffer on a device whose copy is kept whether or not the step changed it: to know, one would have to wait


class Conditions:
    """Everything but its stream input that determines what one step computes, as it was at the step's first run.

    Args:
        module: the step, called as `module(x, *sides)`; `module.stateless` says that it has no attributes that matter, `module.is_pure`
            that it draws no random numbers, writes to no tensor, and leaves torch's switches as they are.
        sides: the side inputs of this call.
        device: device of the stream.
        proof: whether `look` is to compare; without it, it finds nothing.
        own: what the region has learnt about writes after its steps; None: nothing is copied.
        known: what `noted` found as the chain began.
        then: what `around` gave as the chain began, if its steps have left that as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        sides: Sequence[Any],
        device: torch.device,
        proof: bool = True,
        own: OwnCopies | None = None,
        known: Known = MappingProxyType({}),
        then: tuple[Any, ...] | None = None,
    ) -> None:
        self.module, self.device, self.forward = module, device, module.forward
        self.live: Sequence[Any] = sides  # for the first run, whose caller sees what it does to lists and dictionaries
        self.sides = rebuilt(sides)
        self.path_of: Callable[[str], str] = getattr(module, "path_of", str)
        self.is_pure: bool = getattr(module, "is_pure", False)
        stateless = getattr(module, "stateless", False)  # a graph, whose modules are ours and have nothing that a run changes
        self.tree = graphs(module) if stateless else list(_modules(module, "", set()))
        self.attributes = None if stateless else Attributes([m for _, m in self.tree], sides=sides)
        self.surroundings = around(device) if then is None else then
        self.parameters: dict[str, Tensor] = dict(self._members("_parameters"))
        found = [] if self.attributes is None else self.attributes.tensors
        self.reached = {f"(tensor {i} in its attributes)": t for i, t in enumerate(found)}
        self.buffers: dict[str, Tensor] = {}  # and other attributes: those that the step changed, as they were before
        self.before = self._tensors()  # for the first run
        self.random: list[tuple[Any, Any]] = []
        named = self._named()
        flagged = named | {self._title(name): t for name, t in self.before.items() if t.is_leaf}
        self.requires_grad = {name: (t, t.requires_grad) for name, t in flagged.items()}
        self.proven = named if proof else None  # what must not change, and its fingerprints
        self.prints = fingerprints(self.proven or {}, known)
        self.own = own if proof else None
        self.layer = "" if self.own is None else self.path_of("")
        self.copies = self._own_copies()
        self.buffer_of: dict[str, str] = {}  # of those names in `copies` that are buffers
        self.written: set[str] = set()  # the names in `copies` whose originals the first run wrote to
        self.overwritten: set[str] = set()  # those, and the others whose originals had changed at the last look

    def _own_copies(self) -> dict[str, Tensor]:
        """Copies of side inputs, which other steps of the chain share."""
        own = self.own
        if own is None:
            return {}
        sides = {name: t for name, t in self._sides().items() if is_copyable(t) and own.wanted(self.layer, name)}
        return {name: own.shared(t, self.prints[name]) for name, t in sides.items()}

    def first_run(self, x: Tensor) -> Any:
        """Runs the step on the live module, and notes what it drew and which buffers it changed.

        While it runs, all are noted, as a step that differentiates within itself is rerun before that ends; afterwards what it used.
        """
        with _TURNS, untuned(self.device):
            sides, self.live = self.live, ()
            if self.is_pure and self.attributes is None and not self.before:
                return self.forward(x, *sides)
            fake = valueless(x)
            self.random = [] if fake or self.is_pure else [(source, source.get_state()) for source in self._generators()]
            before, self.before = self.before, {}
            self.buffers = copies = _copied(before)
            was, versions = {} if fake else fingerprints(before), {name: version(t) for name, t in before.items()}
            with Effects() if fake else nullcontext() as effects:
                result = self.forward(x, *sides)  # no hooks: who tracks modules by them would take the step for a parent of theirs
            if self.attributes is not None:
                self.attributes.let_go()
            if effects is not None:
                self.random = [(source, source.get_state()) for source in map(Drawn, effects.drew)]
                self.buffers = {n: c for n, c in copies.items() if effects.wrote(before[n]) or self._tensors().get(n) is not before[n]}
                return result
            self.random = [(source, state) for source, state in self.random if moved(state, source.get_state())]
            if before:
                self._note_buffers(before, copies, was, versions)
            return result

    def _note_buffers(self, before: dict[str, Tensor], copies: dict[str, Tensor], was: dict[str, Any], versions: dict[str, Any]) -> None:
        self.buffers = {}
        after, now, proof = self._tensors(), fingerprints(before), self.proven is not None  # batch_norm's statistics get no new _version
        for name, copy in copies.items():
            if after.get(name) is not before[name] or _may_differ(before[name], was[name], now[name], versions[name], proof):
                self.buffers[name] = copy
            elif self.proven is not None:
                key = self._title(name)
                self.proven[key], self.prints[key] = _without_history(before[name]), was[name]
                if self.own is not None and self.own.wanted(self.layer, key):
                    self.copies[key], self.buffer_of[key] = copy, name

    def forget_histories(self) -> None:
        """After the first run: keeps side inputs apart from their graphs, which lead back here where they are overwritten."""
        found = {name: t for name, t in self._sides().items() if t.grad_fn is not None}
        twins = {name: t.detach().requires_grad_(self.requires_grad[name][1]) for name, t in found.items()}
        apart = {id(t): twins[name] for name, t in found.items()}
        self.sides = rebuilt(self.sides, apart)
        self.requires_grad |= {name: (twin, twin.requires_grad) for name, twin in twins.items()}
        if self.proven is not None:
            self.proven |= twins
        if self.own is not None:
            self.own.copies.clear()  # by originals

    def suppose(self) -> None:
        """After the first run on fake tensors, whose values nobody compares: copies what it wrote to, and proves no other side input."""
        sides = self._sides()
        self.copies = {name: sides[name].detach().clone().requires_grad_(self.requires_grad[name][1]) for name in self.written}
        self.proven = {name: t for name, t in (self.proven or {}).items() if name not in sides or name in self.written}

    def look(self, proofs: Proofs, report: Callable[[str], None]) -> None:
        """Reports which parameter, buffer or side input no longer is what the first run saw, and cannot be made so.

        The values of those on a device are compared when the backward pass ends; till then, what has a copy is read from that.
        """
        for name, t in self._flagged():
            if not t.is_leaf and name not in self.copies:
                report(f"whether {name} requires a gradient")
                return
        proven = self.proven or {}
        if (freed := next((name for name, t in proven.items() if is_ordinary(t) and is_freed(t) and t.numel() > 0), None)) is not None:
            report(
                f"{freed}, whose memory was freed (under fully_shard around single layers, a second or partial backward needs layers that "
                "are sharded again by then: use fully_shard on the root alone),"
            )
            return
        names, now = list(proven), fingerprints(proven)
        if self.copies:
            changed = {name for name in self.copies if isinstance(now[name], Tensor) or now[name] != self.prints[name]}
            self.overwritten = changed | self.written

        learn, copied = None if self.own is None else self.own.lesson(self.layer, self.copies), set(self.copies)

        def conclude(places: list[int]) -> None:  # keeps no tensors, see `Proofs`
            differing = {names[i] for i in places}
            if learn is not None:
                learn({name for name in differing if not name.startswith("parameter")})
            if (first := next((name for name in names if name in differing and name not in copied), None)) is not None:
                report(first)

        proofs.compare([now[name] for name in names], [self.prints[name] for name in names], conclude)

    def run(self, x: Tensor) -> Any:
        """Runs the step again, as the first time."""
        with _TURNS, self._restored():
            live = dict(self._members("_parameters"))
            swapped: dict[str, Tensor] = {name: p for name, p in self.parameters.items() if live.get(name) is not p}
            own = {name: self.copies[name] for name in self.overwritten}
            swapped |= _copied(self.buffers | {self.buffer_of[name]: copy for name, copy in own.items() if name in self.buffer_of})
            named = self._sides() if own else {}
            sides = rebuilt(self.sides, {id(t): own[name].clone() for name, t in named.items() if name in own})
            lent = [(self.reached[name], swapped.pop(name)) for name in swapped.keys() & self.reached.keys()]
            if not swapped and not lent:
                return self.forward(x, *sides)
            with _reparametrize_module(self.module, swapped), _lent(lent):  # no tie_weights: each of several names is in `swapped`
                return self.forward(x, *sides)

    def _members(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors in the dictionaries `kind` of the step's modules, each once: what is swapped twice would not be put back."""
        for prefix, owner in self.tree:
            for name, tensor in getattr(owner, kind).items():
                if tensor is not None:
                    yield prefix + name, tensor

    def _tensors(self) -> dict[str, Tensor]:
        """The buffers, and the tensors that are attributes."""
        own = {}
        for prefix, module in self.tree if self.attributes is not None else ():
            for name in module.__dict__.keys() - STANDARD:
                if isinstance(value := module.__dict__[name], Tensor):
                    own[prefix + name] = value
        return dict(self._members("_buffers")) | own | {name: t for name, t in self.reached.items() if not _is_parameter(t)}

    def _title(self, name: str) -> str:
        """What messages call a buffer or another tensor of the step's."""
        return f"buffer '{self.path_of(name)}'" if name not in self.reached else f"buffer {name}"

    def _generators(self) -> list[Any]:
        """The generators that the step may draw from: the default ones of its devices, and its own."""
        own = [leaf for leaf in leaves(self.sides) if isinstance(leaf, torch.Generator)]
        return generators(self.device, own if self.attributes is None else own + self.attributes.generators)

    def _named(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {f"parameter '{self.path_of(name)}'": p for name, p in self.parameters.items()}
        named |= {f"parameter {name}": t for name, t in self.reached.items() if _is_parameter(t)}
        return named | self._sides()

    def versions(self) -> dict[str, Any]:
        """How often each side input was written to, by name; None of what is not counted."""
        return {name: version(t) for name, t in self._sides().items()}

    def _sides(self) -> dict[str, Tensor]:
        return {f"side input {i}": s for i, s in enumerate(leaves(self.sides)) if isinstance(s, Tensor)}

    def _flagged(self) -> list[tuple[str, Tensor]]:
        """The tensors whose requires_grad is another one than in the first run."""
        return [(name, t) for name, (t, needed) in self.requires_grad.items() if t.requires_grad != needed]

    def _restored(self) -> AbstractContextManager[None]:
        if self.attributes is None and not self.random and not self._flagged():
            return surrounded(self.surroundings, not self.is_pure)
        return self._all_restored()

    @contextmanager
    def _all_restored(self) -> Iterator[None]:
        with surrounded(self.surroundings), ExitStack() as stack:
            if self.attributes is not None:
                stack.enter_context(self.attributes.put_back())
                stack.enter_context(without_traces(self.attributes.modules))
            for source, state in self.random:
                stack.callback(source.set_state, source.get_state())
                source.set_state(state)
            for t, needed in self.requires_grad.values():
                if t.requires_grad != needed and t.is_leaf:
                    stack.callback(t.requires_grad_, not needed)
                    t.requires_grad_(needed)
            yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """One thread at a time, outside of the inference mode and every vmap around a backward pass, which concern gradients alone."""
    levels = torch._C._vmapmode_increment_nesting()  # those of torch.autograd.grad(..., is_grads_batched=True), and one
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    calm = levels == 1 and not torch.is_inference_mode_enabled() and torch._C._functorch.peek_interpreter_stack() is None
    try:
        with (
            _TURNS,
            nullcontext() if calm else torch.inference_mode(False),
            nullcontext() if calm else temporarily_clear_interpreter_stack(),
        ):
            yield
    finally:
        for _ in range(levels - 1):
            torch._C._vmapmode_increment_nesting()


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of some tensors; those that are one tensor by several names stay so."""
    copies = {id(t): t.detach().requires_grad_(t.requires_grad).clone() for t in tensors.values()}
    return {name: copies[id(t)] for name, t in tensors.items()}


@contextmanager
def _lent(tensors: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Meanwhile tensors have the values of others; nobody counts it as a write."""
    kept = [(t, t.detach().clone()) for t, _ in tensors]
    try:
        for t, then in tensors:
            t.data.copy_(then)
        yield
    finally:
        for t, now in kept:
            t.data.copy_(now)


def _is_parameter(t: Tensor) -> bool:
    """Whether a tensor is there to be learnt, and not to be changed by a step."""
    return isinstance(t, nn.Parameter) or t.requires_grad


def _without_history(t: Tensor) -> Tensor:
    """The tensor, or one that shares its memory and does not keep its graph alive."""
    return t if t.grad_fn is None else t.detach()


def _modules(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` with a dot after each name, but quick."""
    seen.add(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and child not in seen:
            yield from _modules(child, f"{prefix}{name}.", seen)


def _may_differ(t: Tensor, was: Any, now: Any, then: Any, proof: bool) -> bool:
    """Whether a step may have changed a buffer, of which these are the fingerprints before and after. A write of equal values counts as a
    change: a later step may write others.

    On a device nobody reads them: small buffers count as changed, others where autograd saw a change; unless nobody will prove that.
    """
    if not isinstance(was, Tensor):
        return was != now or then != version(t)
    return t.untyped_storage().nbytes() <= SMALL or then != version(t) or not (proof or torch.equal(was, now))
