"""The ways to train with less memory that `trust.py` compares, each on a network of its own kind, and that network in plain autograd.

    residual     x' = x + f(x)                                   torch.utils.checkpoint, torch.compile
    coupling     x1' = x1 + f(x2);  x2' = x2 + g(x1')            memcnn, RevTorch, revlib
    momentum     v' = gamma v + (1 - gamma) f(x);  x' = x + v'   momentumnet, mnet_fx

Every network takes x and gives (its output, the extra outputs of its functions). Functions give y, or (y, an extra output).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnet_fx

__all__ = ["PEERS", "Peer", "version"]

GAMMA = 0.9
Network = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
ONE_OUTPUT = "one output"  # of each function; it takes no others
NO_OPTION = "no option"  # to leave random states alone
KEPT = "always kept"  # random states


@dataclass(frozen=True)
class Peer:
    """One column of the table.

    Attributes:
        name: heading of the column.
        package: distribution whose version the heading shows.
        build: functions, whether random states are kept, the compiler -> the network as its documentation says to build it.
        plain: functions -> the same network in plain autograd.
        streams: 2 for a coupling, whose input is two tensors side by side.
        compiles: whether it goes through a compiler, and so is run under a memory budget of 0.
        lacks: situation -> why it does not apply: "one output" of each function is all that it takes; there is "no option" to leave
            random states; they are "always kept".
    """

    name: str
    package: str
    build: Callable[[nn.ModuleList, bool, str], Network]
    plain: Callable[[nn.ModuleList], Network]
    streams: int = 1
    compiles: bool = False
    lacks: dict[str, str] = field(default_factory=dict)


def version(peer: Peer) -> str:
    """Of the package as it is installed; "" where it is not."""
    try:
        return metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return ""


def parted(result: Any) -> tuple[Tensor, list[Tensor]]:
    """(y, extra outputs) of what a function, or a network, returned."""
    return (result[0], list(result[1:])) if isinstance(result, (tuple, list)) else (result, [])


def gives_more(f: nn.Module) -> bool:
    """Whether a function has extra outputs, which it says by an attribute."""
    return getattr(f, "gives_more", False)


def chained(layers: nn.ModuleList) -> Network:
    """One layer after the other, each with its extra outputs."""

    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        extras: list[Tensor] = []
        for layer in layers:
            x, more = parted(layer(x))
            extras = extras + more
        return x, extras

    return forward


def beside(net: Network) -> Network:
    """A network of one stream on the first of two, which leaves the second as it is."""

    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x1, x2 = x.chunk(2, 1)
        y, extras = net(x1)
        return torch.cat([y, x2], 1), extras

    return forward


def one_output(net: Callable[[Tensor], Tensor]) -> Network:
    return lambda x: (net(x), [])


# ---- in plain autograd


def residual(fs: Sequence[nn.Module], call: Callable[[nn.Module, Tensor], Any] = lambda f, x: f(x)) -> Network:
    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        extras: list[Tensor] = []
        for f in fs:
            y, more = parted(call(f, x))
            x, extras = x + y, extras + more
        return x, extras

    return forward


def momentum(fs: Sequence[nn.Module]) -> Network:
    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        v, extras = torch.zeros_like(x), []
        for f in fs:
            y, more = parted(f(x))
            v = GAMMA * v + (1 - GAMMA) * y
            x, extras = x + v, extras + more
        return x, extras

    return forward


def coupling(fs: Sequence[nn.Module]) -> Network:
    def forward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x1, x2 = x.chunk(2, 1)
        for f, g in zip(fs[::2], fs[1::2], strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return torch.cat([x1, x2], 1), []

    return forward


# ---- the peers


def checkpointed(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    return residual(fs, lambda f, x: checkpoint(f, x, use_reentrant=False, preserve_rng_state=keeps_random_state))


def momentumnet(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    from momentumnet import MomentumNet

    return one_output(MomentumNet(list(fs), gamma=GAMMA, use_backprop=False))


def revlib(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    import revlib
    from revlib.utils import module_list_to_momentum_net

    if any(gives_more(f) for f in fs):  # its way for layers that return tuples, as those of Hugging Face do
        return beside(chained(module_list_to_momentum_net(nn.ModuleList(Layer(f) for f in fs), residual=True, beta=GAMMA)))
    return one_output(revlib.ReversibleSequential(*fs))


def memcnn(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    import memcnn

    couplings = [memcnn.AdditiveCoupling(Fm=f, Gm=g) for f, g in zip(fs[::2], fs[1::2], strict=True)]
    return one_output(nn.Sequential(*(memcnn.InvertibleModuleWrapper(c, preserve_rng_state=keeps_random_state) for c in couplings)))


def revtorch(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    import revtorch

    pairs = zip(fs[::2], fs[1::2], strict=True)
    blocks = nn.ModuleList(revtorch.ReversibleBlock(f, g, fix_random_seed=keeps_random_state) for f, g in pairs)
    return one_output(revtorch.ReversibleSequence(blocks))


class Layer(nn.Module):
    """x -> (x + f(x), *extra outputs of f), for the peers that rewrite a model."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, extras = parted(self.f(x))
        return x + y, *extras


class Model(nn.Module):
    """A residual network, as a user writes it."""

    def __init__(self, fs: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f) for f in fs)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return chained(self.layers)(x)


def compiled(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    return torch.compile(Model(fs), backend=compiler)


def captured(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    return mnet_fx.momentumize(Model(fs), gamma=GAMMA)


def named(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    return mnet_fx.momentumize(Model(fs), gamma=GAMMA, regions=["layers"])


def backend(fs: nn.ModuleList, keeps_random_state: bool, compiler: str) -> Network:
    return torch.compile(Model(fs), backend=mnet_fx.backend(gamma=GAMMA, inner=compiler))


STATE, EXTRAS = "dropout, random state not kept", "gradients through extra outputs"
ALWAYS = {STATE: KEPT}
PEERS = (
    Peer("checkpoint", "torch", checkpointed, residual),
    Peer("inductor", "torch", compiled, residual, compiles=True, lacks={STATE: NO_OPTION}),
    Peer("momentumnet", "momentumnet", momentumnet, momentum, lacks={STATE: NO_OPTION, EXTRAS: ONE_OUTPUT}),
    Peer("revlib", "revlib", revlib, coupling, 2, lacks={STATE: KEPT}),
    Peer("memcnn", "memcnn", memcnn, coupling, 2, lacks={EXTRAS: ONE_OUTPUT}),
    Peer("RevTorch", "revtorch", revtorch, coupling, 2, lacks={EXTRAS: ONE_OUTPUT}),
    Peer("mnet_fx", "mnet-fx", captured, momentum, lacks=ALWAYS),
    Peer("mnet_fx, named", "mnet-fx", named, momentum, lacks=ALWAYS),
    Peer("mnet_fx over inductor", "mnet-fx", backend, momentum, compiles=True, lacks=ALWAYS),
)
