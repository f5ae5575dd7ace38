"""What a user could pick to train a model with less memory: each way makes something to call in the model's place, with its parameters.

original     the network itself                                 checkpoints, compilers, rockmate
momentum     v' = gamma v + (1 - gamma) f(x);  x' = x + v'      momentumnet, mnet_fx
coupling     x1' = x1 + f(x2);  x2' = x2 + g(x1')               memcnn, RevTorch, revlib: x1 = x2 = x at first, and their mean at last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from typing import Any

import torch
import trust_peers
from compare_works import LanguageModel, Work
from compiled import thrifty
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import mnet_fx
from mnet_fx.captured.copies import copied

__all__ = ["WAYS", "Task", "Unfit", "Way", "plainly"]

GAMMA = trust_peers.GAMMA
MATMULS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
MATMULS |= {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


CHANGES = "a block of a container changes the shape"
UNKNOWN = "what a checkpoint per block takes is not known"


class Unfit(Exception):
    """A way cannot express a work; the message says why."""


@dataclass(frozen=True)
class Task:
    """What a way is given.

    Attributes:
        work: what is trained.
        model: its model.
        inputs: those of a training step.
        room: bytes of a whole step with a checkpoint around each block, parameters and gradients included; None where that is not known.
        static: how many of these are there before a step.
    """

    work: Work
    model: nn.Module
    inputs: tuple[Tensor, ...]
    room: int | None = None
    static: int = 0


@dataclass(frozen=True)
class Way:
    """One row of each work.

    Attributes:
        name: as the table shows it.
        network: what it computes: "original", "momentum" with a step for each residual function, "momentum of blocks", "coupling".
        build: a task -> what is called in the place of the model. Raises Unfit.
        stored: the same with activations stored by autograd; None where that is the original.
        package: the module to import; the way is left out where it is not installed.
        compiles: it goes through inductor.
        planned: it is made for one batch, of which its bytes are no line.
    """

    name: str
    network: str
    build: Callable[[Task], Callable[..., Any]]
    stored: Callable[[Task], Callable[..., Any]] | None = None
    package: str = "torch"
    compiles: bool = False
    planned: bool = False

    @property
    def installed(self) -> bool:
        return util.find_spec(self.package) is not None


# ---- parts of a model


def blocks(work: Work, model: nn.Module) -> dict[str, nn.Module]:
    """By path."""
    return {f"{path}.{name}": block for path in work.lists for name, block in model.get_submodule(path).named_children()}


def with_forwards(model: nn.Module, paths: Iterable[str], around: Callable[..., Any]) -> nn.Module:
    """A copy that shares its tensors, where `around(forward, *args, **kwargs)` runs in the place of the forward of some modules."""
    net = copied(model)
    for path in paths:
        module = net.get_submodule(path)
        module.__dict__["forward"] = partial(around, module.forward)
    return net


def with_chains(task: Task, joined: Callable[[Sequence[nn.Module]], nn.Module], stays: bool = False) -> nn.Module:
    """A copy that shares its tensors, where one module stands for the blocks of each container.

    Args:
        task: whose blocks take the stream alone.
        joined: blocks -> that module.
        stays: leave the first block of a container as it is, where it may change the shape.
    """
    if not task.work.chain:
        raise Unfit("blocks take more than the stream")
    net = copied(task.model)
    for path in task.work.lists:
        container = net.get_submodule(path)
        first = list(container)[: int(stays and not task.work.stays)]
        rest = list(container)[len(first) :]
        elements = [*first, joined(rest)]
        net.set_submodule(path, nn.ModuleList(elements) if isinstance(container, nn.ModuleList) else nn.Sequential(*elements))
    return net


class Joined(nn.Module):
    """Several modules, and a function that runs them."""

    def __init__(self, modules: Iterable[nn.Module], run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.modules_, self.run = nn.ModuleList(modules), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def functions(work: Work, layers: Iterable[nn.Module]) -> nn.ModuleList:
    """The residual functions of blocks."""
    if not work.residual:
        raise Unfit("residual functions are no modules")
    return nn.ModuleList(block.get_submodule(name) for block in layers for name in work.branches)


# ---- ways that keep the network


def plain(task: Task) -> nn.Module:
    return task.model


def by_block(task: Task, **options: Any) -> nn.Module:
    return with_forwards(task.model, blocks(task.work, task.model), partial(checkpoint, use_reentrant=False, **options))


def by_branch(task: Task) -> nn.Module:
    if not task.work.branches:
        raise Unfit("residual functions are no modules")
    paths = [f"{path}.{name}" for path in blocks(task.work, task.model) for name in task.work.branches]
    return with_forwards(task.model, paths, partial(checkpoint, use_reentrant=False))


def in_segments(task: Task) -> nn.Module:
    def joined(layers: Sequence[nn.Module]) -> nn.Module:
        segments = max(1, round(math.sqrt(len(layers))))
        return Joined(layers, lambda x: checkpoint_sequential(list(layers), segments, x, use_reentrant=False))

    return with_chains(task, joined)


def _saves_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def selective(task: Task) -> nn.Module:
    return by_block(task, context_fn=partial(create_selective_checkpoint_contexts, _saves_matmuls))


def chunked_head(task: Task) -> nn.Module:
    """With torch's own chunks of a linear layer and its cross entropy, of torch 2.14."""
    net = by_block(task)
    if not isinstance(net, LanguageModel):
        raise Unfit("the model does not end in a loss of its own that could be put in its place")
    net.head = partial(nn.functional.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())
    return net


def rockmate(task: Task) -> nn.Module:
    """Within what a checkpoint per block takes at its peak."""
    from rockmate import Rockmate

    if task.room is None:
        raise Unfit(UNKNOWN)
    return Rockmate(copied(task.model), task.inputs, task.room - task.static)


def inductor(task: Task, budget: float | None = None) -> Callable[..., Any]:
    return torch.compile(task.model, backend="inductor" if budget is None else thrifty(budget), dynamic=False)


# ---- momentum networks


def ours(task: Task, **options: Any) -> nn.Module:
    return mnet_fx.momentumize(task.model, gamma=GAMMA, **options)


def named(task: Task, **options: Any) -> nn.Module:
    if not task.work.stays:
        raise Unfit(CHANGES)
    return ours(task, regions=list(task.work.lists), **options)


def within(task: Task, **options: Any) -> nn.Module:
    """In as much as a checkpoint around each block takes."""
    if task.room is None:
        raise Unfit(UNKNOWN)
    plan = mnet_fx.plan(task.model, task.inputs, memory=task.room, loss=task.work.loss, gamma=GAMMA)
    return mnet_fx.momentumize(task.model, **plan.options)


def momentumnet(task: Task, use_backprop: bool = False) -> nn.Module:
    """Of residual functions where a work has them; else its transform of whole blocks."""
    from momentumnet import MomentumNet, transform_to_momentumnet

    how = {"gamma": GAMMA, "use_backprop": use_backprop}
    work = task.work
    if not work.chain:
        how |= {"sub_layers": list(work.lists), "keep_first_layer": not work.stays, "is_residual": False}
        return transform_to_momentumnet(copied(task.model), **how)
    if work.residual:
        return with_chains(task, lambda layers: MomentumNet(list(functions(work, layers)), **how))
    return with_chains(task, lambda layers: MomentumNet(list(layers), is_residual=False, **how), stays=True)


# ---- couplings


def coupled(task: Task, network: Callable[[nn.ModuleList], trust_peers.Network]) -> nn.Module:
    """Two streams, side by side in the first dimension after the batch."""

    def joined(layers: Sequence[nn.Module]) -> nn.Module:
        fs = functions(task.work, layers)
        if len(fs) % 2:
            raise Unfit("couples functions in pairs, and their number is odd")
        net = network(fs)

        def run(x: Tensor) -> Tensor:
            streams = torch.cat([x, x], 1)
            y, _ = net(streams if streams.requires_grad else streams.requires_grad_())  # without it, RevTorch gives no gradients
            return (y[:, : x.shape[1]] + y[:, x.shape[1] :]) / 2

        return Joined(fs, run)

    return with_chains(task, joined)


def peer(build: Callable[[nn.ModuleList, bool, str], trust_peers.Network]) -> Callable[[Task], nn.Module]:
    return lambda task: coupled(task, lambda fs: build(fs, False, ""))


# ---- in plain autograd


def plainly(network: str, task: Task) -> nn.Module:
    """A network in nothing but plain autograd; on a model in float64 this is what gradients are compared with. Raises Unfit."""
    if network == "original":
        return task.model
    if network == "coupling":
        return coupled(task, trust_peers.coupling)

    if network == "momentum" and task.work.nested:
        raise Unfit("there are residual adds around the chains")
    if network == "momentum of blocks" and not task.work.stays:
        raise Unfit(CHANGES)

    def joined(layers: Sequence[nn.Module]) -> nn.Module:
        steps = functions(task.work, layers) if network == "momentum" else [_difference(block) for block in layers]
        recurrence = trust_peers.momentum(steps)
        return Joined(layers, lambda x: recurrence(x)[0])

    return with_chains(task, joined)


def _difference(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: block(x) - x


STORED: dict[str, Any] = {"backward": "stored"}
WAYS = {
    way.name: way
    for way in (
        Way("plain", "original", plain),
        Way("checkpoint per block", "original", by_block),
        Way("checkpoint per function", "original", by_branch),
        Way("checkpoint_sequential", "original", in_segments),
        Way("selective checkpoint", "original", selective),
        Way("checkpoint per block, chunked head", "original", chunked_head),
        Way("rockmate", "original", rockmate, package="rockmate", planned=True),
        Way("inductor", "original", inductor, compiles=True),
        Way("inductor, budget 0.5", "original", partial(inductor, budget=0.5), compiles=True),
        Way("inductor, budget 0.1", "original", partial(inductor, budget=0.1), compiles=True),
        Way("momentumnet", "momentum", momentumnet, partial(momentumnet, use_backprop=True), package="momentumnet"),
        Way("revlib", "coupling", peer(trust_peers.revlib), package="revlib"),
        Way("memcnn", "coupling", peer(trust_peers.memcnn), package="memcnn"),
        Way("RevTorch", "coupling", peer(trust_peers.revtorch), package="revtorch"),
        Way("mnet_fx", "momentum", ours, partial(ours, **STORED)),
        Way("mnet_fx, named", "momentum of blocks", named, partial(named, **STORED)),
        Way("mnet_fx, rest='checkpoint'", "momentum", partial(ours, rest="checkpoint"), partial(ours, **STORED)),
        Way("mnet_fx, memory=", "momentum", within, partial(ours, **STORED), planned=True),
        Way("mnet_fx over inductor", "momentum", partial(ours, inner="inductor"), partial(ours, inner="inductor", **STORED), compiles=True),
    )
}
