"""Random programs as Python source, one for each seed: what people write in a forward, and what they should not.

    flat        straight-line code, residual steps among other things, writes, state, loops, other outputs
    layered     the same in the layers of a ModuleList, with code between them
    chain       x = x + b[t](x, s) for t = 0, 1, ..., T - 1, in many spellings, where each b[t] is a method: the chain is known
    sums        residual steps, and a running sum of what comes out of them, or two, which others look at or write to at times

Written apart from `strategies`: nothing here knows what the passes can read.
"""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Source", "written"]

UNARY = """
self.f{i}({a})
self.f{i}({a}.tanh())
self.f{i}(self.norm({a}))
torch.tanh({a})
F.gelu({a})
F.softmax({a}, -1)
torch.sin({a})
{a}.abs().add(1).log()
{a}.cumsum(-1).tanh()
{a}.flip(-1)
{a}.roll(1, 0)
{a}.sort(-1).values
{a}.topk(4, -1)[0]
({a} @ {a}.t()).tanh() @ {a}
torch.einsum("ij,kj,kl->il", {a}, {a}, {a}).tanh()
{a}.clamp(-1, 1)
F.layer_norm({a}, (4,))
F.normalize({a}, dim=-1, eps=0.1)
self.norm({a})
self.bn({a})
torch.cat({a}.chunk(2, -1)[::-1], -1)
torch.cat([{a}[:, 1:], {a}[:, :1]], 1)
torch.stack({a}.unbind(0))
torch.hstack({a}.split([1, 3], -1))
{a}.reshape(2, 6).t().reshape(3, 4)
{a}.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)
{a}[:, [3, 1, 0, 2]]
{a}.index_select(1, self.order)
{a}.gather(1, self.order.expand(3, 4))
{a}.masked_fill({a} > 1, 0.5)
{a}.tril()
torch.fft.irfft(torch.fft.rfft({a}), 4)
{a}.logsumexp(-1, keepdim=True).expand_as({a})
{a}.mean(0, keepdim=True).expand(3, 4)
self.conv({a}.unsqueeze(1)).squeeze(1)
F.avg_pool1d({a}.unsqueeze(1), 3, 1, 1).squeeze(1)
F.pad({a}[:, :2], (1, 1))
{a}.repeat(1, 2)[:, 2:6]
self.gru({a}.unsqueeze(0))[0].squeeze(0)
F.scaled_dot_product_attention({a}[None], {a}[None], {a}[None])[0]
F.dropout({a}, 0.3, self.training)
self.drop({a})
F.rrelu({a}, 0.1, 0.3, self.training)
torch.special.erf({a})
F.prelu({a}, self.slope)
{a} * torch.rand_like({a})
{a}.clone()
{a}.contiguous()
{a}.detach().tanh()
checkpoint(self.f{i}, {a}, use_reentrant=False)
Doubled.apply({a})
torch.vmap(torch.tanh)({a})
torch.linalg.solve(9 * torch.eye(3, dtype={a}.dtype) - {a}.tanh() @ {a}.tanh().t(), {a})
{a}.as_strided((3, 4), (4, 1))
helper({a}, self.f{i})
quiet({a}, self.f{i})
{a}.t().contiguous().t()
{a}.clone().mul_(0.5)
F.relu(self.f{i}({a}), inplace=True)
self.f{i}({a}).tanh_()
""".strip().splitlines()
BINARY = """
torch.where({a} > 0, {a}, {b})
{a} * {b}.tanh()
torch.lerp({a}, {b}, 0.3)
torch.addcmul({a}, {a}.tanh(), {b}.tanh(), value=0.3)
torch.maximum({a}, {b})
torch.cat([{a}[:, :2], {b}[:, 2:]], 1)
{a} + {b}
{a} - 0.5 * {b}
{a} + self.f{i}({a})
torch.stack([{a}, {b}]).sum(0)
torch.stack([{a}, {b}], -1).mean(-1)
torch.addmm({a}, {b}.tanh(), self.f{i}.weight)
F.linear({a}, self.f{i}.weight, {b}[0])
{a}.scatter(1, self.order.expand(3, 4), {b})
{a}.index_add(0, self.rows, {b}, alpha=0.5)
torch.hypot({a}, {b}.abs() + 1)
{a}.where({a} > {b}, {b})
self.both({a}, {b})
""".strip().splitlines()
STEPS = """
{x} = {x} + {e}
{x} = {x} + {e}
{x} = {e} + {x}
{x} = torch.add({x}, {e}, alpha=0.5)
{x} = torch.add(input={x}, other={e})
{x} = {e}.add({x})
{x} = {x} - {e}
{x} = {x} + 0.3 * {e}
{x} = {x} + self.scale * {e}
{x} = {x}.sub({e})
{x} = torch.addcmul({x}, {e}, self.scale)
""".strip().splitlines()
LINKED = """
{x} = F.gelu({x} + {e})
{x} = self.norm({x} + {e})
{x} = ({x} + {e}) * 0.7
{x} = torch.stack([{x}, {e}]).sum(0)
{x} = sum([{x}, {e}])
{x} = {x}.t().add({e}.t()).t()
{x} = ({x}.unsqueeze(0) + {e}).squeeze(0)
{x} = {x} + {e} + {e2}
{x} = {x} + ({e} + ({x} + {e2}))
{v} = {e}; {v} = {v} + self.f{i}({v}); {v} = {v} + self.f{j}({v}); {x} = {x} + {v}
{v} = {x}; {x} = {x} + {e}; {x} = {x} + 0.5 * {v}
{x} = torch.cat([{x}[:, :2] + {e}[:, :2], {x}[:, 2:]], 1)
for f in (self.f0, self.f1, self.f2): {x} = {x} + f({x})
for _ in range(2): {x} = {x} + {e}
with torch.no_grad(): {x} = {x} + {e}
with torch.no_grad(): {v} = {x}.detach() + {e}; {x} = {x} + {v}
{x} = {x} + {e} if self.training else {x} + {e2}
{x} = {x}.where({x} > 9, {x} + {e})
{x} = ({x} + {e}) * (s > 0)
{x} = ({x} + {e}).masked_fill(s > 1, 0.5)
{x} = torch.where(s > 0, {x} + {e}, s)
{x} = ({x} + {e}) + s.tanh()
{x} = self.norm({x} + {e}) * {b}.sigmoid()
{x} = {x} + {e}; {x} = {x}.mul_(s.tanh())
""".strip().splitlines()
WRITING_STEPS = """
{x} += {e}
{x}.add_({e})
{x} = {x}.add_({e})
{x} -= {e}
{v} = {e}; {v} += {x}; {x} = {v}
{x} = {x}.clone(); {x} += {e}
{x}[:, :2] += {e}[:, :2]
{x}.copy_({x} + {e})
{x}.t().add_({e}.t())
""".strip().splitlines()
WRITES = """
{a}.mul_(0.5)
{a} += {b}
{a}[0] = 1.0
{a}[:, :2].add_(0.1)
{v} = {a}.view(-1); {v}.mul_(0.9)
F.relu_({a})
{a}.copy_({b})
{a}.clamp_(-1, 1)
{a}.t().add_(0.1)
{a}.diagonal().zero_()
{a}.unbind(0)[0].mul_(2)
{v}, {w} = {a}.chunk(2, -1); {v}.mul_(0.5)
{a}.masked_fill_({a} > 1, 0.5)
{a}.index_fill_(0, self.rows[:1], 0.5)
{a}.detach().mul_(0.9)
{a}.T.copy_({b}.T)
torch.tanh_({a})
{a}.data.mul_(0.9)
with torch.no_grad(): {a}.mul_(0.9)
""".strip().splitlines()
STATE = """
self.count.add_(1)
self.count += 1
self.mean.mul_(0.9).add_({a}.detach().mean(0), alpha=0.1)
self.mean = 0.9 * self.mean + 0.1 * {a}.detach().mean(0)
self.mean.copy_({a}.detach()[0])
self.calls += 1
self.last = {a}.detach().clone()
self.log.append({a}.detach().sum())
""".strip().splitlines()
READS = """
{a} * (1 + self.mean)
{a} * (0.5 + 0.1 * self.calls)
{a} + 0.1 * self.last
{a} * (1 + 0.01 * self.count)
{a} * 0.5 ** len(self.log)
""".strip().splitlines()

FIRST = """
total = 0
total = 0.0
total = torch.zeros_like(x)
total = torch.zeros(4, dtype=x.dtype)
total = torch.zeros_like(x, dtype=torch.float32)
total = s.tanh()
total = s
total = x
total = self.stem(x)
total = self.mean.clone()
total = torch.zeros_like(x); outs.append(total)
total = x.tanh() * 1; outs.append(total[:2])
""".strip().splitlines()
ADDED = """
{t} = {t} + {e}
{t} = {t} + {e}
{t} += {e}
{t} += {e}
{t} = {e} + {t}
{t} = {t} + {e} + {e2}
{t} = {t} + ({e} + {e2})
{t} = {t} + {e}.mean()
{t} = {t} + {e}.sum(0)
{t} = {t} + 0.5 * {e}
{t} = {t} + {e}.detach()
{t} = {t} - {e}
{t} = {t} + {v0}
{v} = {e}; {t} = {t} + {v}; {x} = {x} + self.f{i}({v}.tanh())
{v} = {e}; {t} = {t} + {v}; outs.append({v})
{v}, {w} = {e}.chunk(2, -1); {t} = {t} + torch.cat([{w}, {v}], -1)
with torch.no_grad(): {t} = {t} + {e}
""".strip().splitlines()
LOOKED = """
outs.append({t} * 1)
{t} = {t} + 0 * {x}; outs.append({t})
{t} = {t} + 0 * {x}; outs.append([{t}][0].t())
{x} = {x} * torch.sigmoid({t})
{t} = {t} * 0.5
{t} = torch.tanh({t} + 0 * {x})
{t} = {t} + 0 * {x}; {v} = {t}[:1]; outs.append({v})
{t} = {t} + 0 * {x}; {t}.mul_(0.5)
{t} = {t} + 0 * {x}; {v} = {t}.t(); {v}[0] = 0.5
{x} = {x} + F.dropout(self.f{i}({x}), 0.3, self.training)
outs.append(torch.rand_like({x}))
{x} = {x}.cumsum(-1).tanh()
""".strip().splitlines()

WHOLE = [STEPS[k] for k in (0, 1, 2, 4, 5)]  # those in which the residual is the branch itself
PURE = [e for e in UNARY if "+" not in e and "inplace" not in e and "as_strided" not in e and "helper" not in e]
MEMBERS = """
        self.stem, self.f0, self.f1, self.f2 = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.bn, self.drop = nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.conv, self.gru = nn.Conv1d(1, 1, 3, padding=1), nn.GRU(4, 4)
        self.scale, self.slope = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("rows", torch.tensor([1, 0, 2]))
        self.register_buffer("last", torch.zeros(3, 4))
        self.calls, self.log = 0, []

    def both(self, a, b):
        return self.f2(a.tanh() * b.tanh())
"""
HEAD = """
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def helper(x, f):
    y = x.tanh()
    return f(y) * 0.5


def quiet(x, f):
    with torch.no_grad():
        return f(x)

"""


@dataclass(frozen=True)
class Source:
    """One program.

    Attributes:
        text: Python, in which the class `Program` is called as (x, s) -> a tensor, a tuple or a dictionary.
        kind: "flat", "layered", "chain" or "sums".
        steps: length T of the chain, where it is known.
    """

    text: str
    kind: str
    steps: int = 0

    def without_random_numbers(self) -> Source:
        """The same program with every operation that draws random numbers replaced by one that draws none."""
        text = (
            self.text.replace("rand_like(", "ones_like(")
            .replace("0.3, self.training)", "0.3, False)")
            .replace("nn.Dropout(0.3)", "nn.Identity()")
        )
        return replace(self, text=text)

    def model(self) -> Any:
        """A new model; with the same parameters each time."""
        import torch
        import torch.nn.functional as F
        from torch import nn
        from torch.utils.checkpoint import checkpoint

        name = f"<program {hash(self.text)}>"
        scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "checkpoint": checkpoint, "__name__": "fuzzed"}
        linecache.cache[name] = (len(self.text), None, self.text.splitlines(True), name)
        exec(compile(self.text, name, "exec"), scope)
        torch.manual_seed(5)
        return scope["Program"]()


class Writer:
    """Writes the lines of one function, whose values x (the stream) and s are tensors (3, 4)."""

    def __init__(self, rng: random.Random, writes: float, state: float, pure: bool = False) -> None:
        self.rng, self.writes, self.state, self.pure = rng, writes, state, pure
        self.values, self.lines, self.made = ["x", "s"], list[str](), 0

    def names(self, **more: str) -> dict[str, Any]:
        self.made += 1
        pick = {key: self.rng.choice(self.values[-5:]) for key in "ab"}
        return pick | {"i": self.rng.randrange(3), "j": self.rng.randrange(3), "v": f"v{self.made}", "w": f"w{self.made}", "x": "x"} | more

    def expression(self, a: str, depth: int) -> str:
        """Of the value a and, at times, of others."""
        for _ in range(depth):
            a = f"({a})" if " " in a else a
            if self.pure:
                a = self.rng.choice(PURE).format(**self.names(a=a))
            elif self.rng.random() < self.state / 2:
                a = self.rng.choice(READS).format(**self.names(a=a))
            else:
                a = self.rng.choice(UNARY if self.rng.random() < 0.75 else BINARY).format(**self.names(a=a))
        return a

    def branch(self, x: str = "x") -> str:
        """Of moderate size, whatever is in it."""
        return f"self.f{self.rng.randrange(3)}(({self.expression(x, self.rng.randint(1, 2))}).tanh())"

    def step(self) -> None:
        chance = self.rng.random()
        kinds = WRITING_STEPS if chance < self.writes else LINKED if chance < 0.6 * self.writes + 0.4 else STEPS
        self.lines.append(self.rng.choice(kinds).format(**self.names(e=self.branch(), e2=self.branch())))

    def statement(self) -> None:
        chance = self.rng.random()
        if chance < 0.5:
            self.step()
        elif chance < 0.5 + 0.2 * self.writes:
            self.lines.append(self.rng.choice(WRITES).format(**self.names()))
        elif chance < 0.5 + 0.3 * max(self.writes, self.state) and self.state:
            self.lines.append(self.rng.choice(STATE).format(**self.names()))
        elif chance < 0.9:
            names = self.names()
            self.lines.append(f"{names['v']} = {self.expression(self.rng.choice(self.values[-5:]), self.rng.randint(1, 2))}")
            self.values.append(names["v"])
        else:
            self.lines.append(f"outs.append({self.rng.choice(self.values)})")


def written(seed: int, kind: str | None = None) -> Source:
    """The program of a seed.

    Args:
        seed: the same source each time.
        kind: default any.
    """
    rng = random.Random(seed)
    kind = kind or rng.choice(["flat", "flat", "layered", "chain"])
    if kind == "sums" or random.Random(f"sums {seed}").random() < 0.15:
        return _sums(rng)
    writes, state = rng.choice([0.0, 0.0, 0.3, 0.6]), rng.choice([0.0, 0.0, 0.5])
    if kind == "chain":
        return _chain(rng)
    text = HEAD
    if kind == "layered":
        layers = rng.randint(2, 4)
        more = rng.random() < 0.4
        for t in range(layers):
            text += _class(f"Layer{t}", _layer(rng, writes, state, more))
        return Source(text + _class("Program", _looped(rng, layers, writes, state, more), [f"Layer{t}()" for t in range(layers)]), kind)
    writer = Writer(rng, writes, state)
    for _ in range(rng.randint(4, 12)):
        writer.statement()
    ending = rng.choice(["x, *outs", "(x, *outs)", "{'x': x, 'outs': outs}", f"x, {rng.choice(writer.values)}, *outs"])
    return Source(text + _class("Program", ["x = self.stem(x)", "outs = []", *writer.lines, f"return {ending}"]), kind)


def _class(name: str, forward: list[str], layers: list[str] | None = None, methods: str = "") -> str:
    body = "".join(f"        {line}\n" for line in forward)
    listed = f"        self.layers = nn.ModuleList([{', '.join(layers)}])\n" if layers else ""
    head = f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{listed}"
    return head + MEMBERS.lstrip("\n") + methods + f"\n    def forward(self, x, s):\n{body}\n\n"


def _layer(rng: random.Random, writes: float, state: float, more: bool) -> list[str]:
    writer = Writer(rng, writes, state)
    for _ in range(rng.randint(0, 3)):
        writer.statement()
    writer.step()
    return ["outs = []", *writer.lines, f"return x, {rng.choice(writer.values)}" if more else "return x"]


def _looped(rng: random.Random, layers: int, writes: float, state: float, more: bool) -> list[str]:
    call = ["x, extra = layer(x, s)", "outs.append(extra)"] if more else ["x = layer(x, s)"]
    between = Writer(rng, writes, state)
    if rng.random() < 0.4:
        between.statement()
    loop = rng.choice(["for layer in self.layers:", f"for layer in [*self.layers, self.layers[{rng.randrange(layers)}]]:"])
    inside = [f"    {line}" for line in [*call, *between.lines]]
    return ["x = self.stem(x)", "outs = []", loop, *inside, "return x, *outs"]


def _sums(rng: random.Random) -> Source:
    writer, names = Writer(rng, rng.choice([0.0, 0.0, 0.3]), 0.0), ["total"] + ["more"] * (rng.random() < 0.3)
    for name in names:
        writer.lines.append(rng.choice(FIRST).replace("total", name))
    for _ in range(rng.randint(3, 6)):
        writer.step()
        if rng.random() < 0.3:
            writer.lines.append(f"v0 = {writer.branch()}")
            writer.values.append("v0")
        if rng.random() < 0.9:
            terms = {"t": rng.choice(names), "e": writer.branch(), "e2": writer.branch(), "v0": "v0" if "v0" in writer.values else "s"}
            writer.lines.append(rng.choice(ADDED).format(**writer.names(**terms)))
        if rng.random() < 0.12:
            writer.lines.append(rng.choice(LOOKED).format(**writer.names(t=rng.choice(names))))
    if rng.random() < 0.2:  # all at the end
        terms = [(line.removeprefix("total += ").removeprefix("total = total + "), line) for line in writer.lines]
        closed = [line if term == line or ";" in term else f"found.append({term})" for term, line in terms]
        how = rng.choice(["sum(found)", "sum(found) + total", "torch.stack([f + 0 * x for f in found]).sum(0) if found else x"])
        writer.lines = ["found = []", *closed, f"total = {how}"]
    return Source(
        HEAD + _class("Program", ["x = self.stem(x)", "outs = []", *writer.lines, f"return x, {', '.join(names)}, *outs"]), "sums"
    )


def _chain(rng: random.Random) -> Source:
    steps, lines, methods = rng.randint(2, 6), ["x = self.stem(x)", "outs = []"], ""
    for t in range(steps):
        writer = Writer(rng, 0.0, 0.0, pure=True)
        branch = writer.branch("(x * s)" if rng.random() < 0.3 else "x")
        methods += f"\n    def b{t}(self, x, s):\n        return {branch}\n"
        lines.append(rng.choice(WHOLE).format(x="x", e=f"self.b{t}(x, s)"))
        if rng.random() < 0.2:
            lines.append("outs.append(x)")
    return Source(HEAD + _class("Program", [*lines, "return x, *outs"], methods=methods), "chain", steps)
