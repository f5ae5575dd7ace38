"""Models that are not what a compiler hopes for: each is handled, or refused with a sentence, never with a stray traceback.

One row for each: the model, a call of it, and either the lengths of its chains, with gamma = 0 the same outputs and gradients, or what the
refusal says.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from passes_models import linears, program
from torch import nn
from torch.utils._pytree import tree_leaves

import mnet_fx

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
NO_CHAIN = "no residual chain was rewritten"
LEFT_TO_PYTHON = r"left the whole forward to Python.*so the original network ran.*name its list of layers with regions="


def residual(self, x):
    for f in self.f:
        x = x + torch.tanh(f(x))
    return x


def chain(depth=3, **parts):
    return program(residual, f=linears(depth), **parts)


@dataclass
class Row:
    """A model and what must come of it.

    Attributes:
        model: makes the model.
        call: its arguments.
        steps: lengths of the chains that are rewritten; [] with a warning that there are none.
        refused: what the error or the warning says, of momentumize or of the call.
        why: codes of the refusals in the report of a model without chains.
        example: whether momentumize gets the call as example_inputs too.
        tolerance: of the comparison with the original.
    """

    model: Callable[[], nn.Module]
    call: tuple[Any, ...] = (X,)
    steps: tuple[int, ...] = ()
    refused: str | None = None
    why: tuple[str, ...] = ()
    example: bool = False
    tolerance: float = 1e-5


def branches_on_values(self, x):
    return self.inner(x) if x.sum() > 0 else self.inner(-x)


def loops_on_values(self, x):
    while x.abs().max() > 0.1:
        x = self.f(x) * 0.01
    return x


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    forward = loops_on_values


class Doubled(torch.autograd.Function):
    """A gradient that is not that of the forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def custom_gradient(self, x):
    return Doubled.apply(self.f(x))


def custom_gradient_in_the_root(self, x):
    for f in self.f:
        x = x + Doubled.apply(f(x))
    return x


def quantised():
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(chain(), {nn.Linear}, dtype=torch.qint8)


def statically_quantised():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.sum = nn.Linear(4, 4), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            return self.sum.add(x, self.f(x))

    from torch.ao import quantization as q

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(q.QuantStub(), Block(), Block(), q.DeQuantStub()).eval()
        model.qconfig = q.get_default_qconfig("onednn" if "onednn" in torch.backends.quantized.supported_engines else "qnnpack")
        q.prepare(model, inplace=True)(X)
        return q.convert(model)


def complex_branch(self, x):
    for f in self.f:
        x = x + torch.fft.fft(f(x)).real
    return x


def no_parameters(self, x):
    for _ in range(3):
        x = x + torch.tanh(x @ x.T @ x)
    return x


def with_arguments(number):
    """A forward of that many arguments, all of them used."""
    names = [f"a{i}" for i in range(number)]
    scope: dict[str, Any] = {"torch": torch}
    exec(
        f"def forward(self, {', '.join(names)}):\n"
        f"    for f in self.f: a0 = a0 + torch.tanh(f(a0 * ({' + '.join(names[1:])})))\n"
        "    return a0",
        scope,
    )
    return program(scope["forward"], f=linears(3))


def keywords_only(self, x, *rest, scale=1.0, **more):
    for f in self.f:
        x = x + scale * torch.tanh(f(x))
    return x


def takes_a_dict(self, batch):
    x = batch["x"]
    for f in self.f:
        x = x + torch.tanh(f(x))
    return {"out": x, "label": batch["label"]}


Pair = namedtuple("Pair", ["first", "second"])


def returns_a_tuple(self, x):
    return Pair(residual(self, x), x)


def returns_nothing(self, x):
    self.seen = residual(self, x)


def counts(self, x):
    self.calls = self.calls + 1
    return {"x": x, "calls": self.calls}


def takes_nothing(self):
    return residual(self, self.start)


def asks_the_type(self, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("a tensor, please")
    return residual(self, x)


def without_gradients(self, x):
    with torch.no_grad():
        return residual(self, x)


def recurrent(self, x):
    x = x[:, None]
    for f in self.f:
        x = x + f(x)[0]
    return x


def calls_itself(self, x):
    """One module as every block."""
    for _ in range(3):
        x = x + self.block(x)
    return x


def python_numbers(self, x, n=3):
    for i in range(int(n)):
        x = x + torch.tanh(self.f[i](x))
    return x


def complex_numbers():
    return program(residual, f=[nn.Linear(4, 4, dtype=torch.complex64) for _ in range(3)])


def integers(self, x):
    for _ in range(3):
        x = x + x @ x
    return x


def half():
    return chain().to(torch.bfloat16)


def lazy():
    return program(residual, f=[nn.LazyLinear(4) for _ in range(3)])


def parametrised():
    f = [nn.utils.parametrizations.weight_norm(layer) for layer in linears(3)]
    f[0] = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    return program(residual, f=f)


def walks(self, x):
    for f in self.f:
        x = f(x)
    return x


class Empty(nn.Module):
    """A block that Python takes for nothing, as a container may be."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __len__(self):
        return 0

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def compiled_blocks():
    """As torchtitan compiles them; the wrapper asks the block for its length, which it has none of."""
    return program(walks, f=[torch.compile(chain(1), backend="eager") for _ in range(3)])


def locked():
    model = chain()
    model.lock = threading.Lock()
    return model


def already():
    return mnet_fx.momentumize(chain(), gamma=0)


def scripted(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(linears(3))

    @functools.wraps(residual)
    def forward(self, *args, **kwargs):
        return residual(self, *args, **kwargs)


class Everything(nn.Module):
    """Answers for any attribute."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(linears(3))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return 0.5

    def forward(self, x):
        return residual(self, x) * self.anything


ROWS = {
    "compiled blocks": Row(compiled_blocks, steps=(3,)),
    "compiled blocks, with an example": Row(compiled_blocks, steps=(3,), example=True),
    "blocks of length 0": Row(lambda: program(walks, f=[Empty() for _ in range(3)]), steps=(3,)),
    "branches on values": Row(lambda: program(branches_on_values, inner=chain()), steps=(3,)),
    "branches on values, captured at once": Row(
        lambda: program(branches_on_values, inner=chain()), example=True, refused="sees nothing beyond before the model runs"
    ),
    "loops on values in a block": Row(
        lambda: program(residual, f=[Loops() for _ in range(3)]),
        refused=r"Dynamo breaks its graph inside of a chain, at .*test_weird_models.py:\d+ in .*loops_on_values.*regions=\['f'\]",
    ),
    "loops on values": Row(lambda: program(loops_on_values, f=nn.Linear(4, 4)), refused=NO_CHAIN),
    "script": Row(lambda: scripted(lambda: torch.jit.trace(chain(), X)), refused="is a ScriptModule, whose code is not Python"),
    "script in a block": Row(
        lambda: program(residual, f=[scripted(lambda: torch.jit.trace(nn.Linear(4, 4), X)), *linears(2)]), refused=LEFT_TO_PYTHON
    ),
    "dynamically quantised": Row(quantised, refused=LEFT_TO_PYTHON),
    "statically quantised": Row(statically_quantised, refused=NO_CHAIN),
    "custom gradient": Row(lambda: program(residual, f=[program(custom_gradient, f=layer) for layer in linears(3)]), steps=(3,)),
    "custom gradient in the root": Row(lambda: program(custom_gradient_in_the_root, f=linears(3)), steps=(3,)),
    "custom gradient in the root, captured at once": Row(
        lambda: program(custom_gradient_in_the_root, f=linears(3)), steps=(3,), example=True
    ),
    "complex branch": Row(lambda: program(complex_branch, f=linears(3)), steps=(3,)),
    "complex stream": Row(complex_numbers, call=(X.to(torch.complex64),), refused=NO_CHAIN, why=("not_real",)),
    "complex stream, captured at once": Row(
        lambda: program(asks_the_type, f=complex_numbers().f),
        call=(X.to(torch.complex64),),
        refused=NO_CHAIN,
        why=("not_real",),
        example=True,
    ),
    "integer stream": Row(lambda: program(integers), call=(torch.eye(3).long(),), refused=NO_CHAIN, why=("not_real",)),
    "no parameters": Row(lambda: program(no_parameters), steps=(3,)),
    "nothing at all": Row(nn.Sequential, refused=NO_CHAIN),
    "thirty arguments": Row(lambda: with_arguments(30), call=(X,) * 30, steps=(3,)),
    "thirty arguments, captured at once": Row(lambda: with_arguments(30), call=(X,) * 30, steps=(3,), example=True),
    "keyword arguments only": Row(lambda: program(keywords_only, f=linears(3)), steps=(3,)),
    "a dict of inputs": Row(lambda: program(takes_a_dict, f=linears(3)), call=({"x": X, "label": "cat"},), steps=(3,)),
    "a named tuple": Row(lambda: program(returns_a_tuple, f=linears(3)), steps=(3,)),
    "returns nothing": Row(lambda: program(returns_nothing, f=linears(3)), steps=(3,)),
    "takes nothing": Row(lambda: program(takes_nothing, f=linears(3), start=nn.Parameter(X.clone())), call=(), refused=NO_CHAIN),
    "counts its calls": Row(lambda: program(counts, calls=0), refused=NO_CHAIN),
    "asks for the type": Row(lambda: program(asks_the_type, f=linears(3)), steps=(3,)),
    "asks for the type, captured at once": Row(lambda: program(asks_the_type, f=linears(3)), steps=(3,), example=True),
    "without gradients": Row(lambda: program(without_gradients, f=linears(3)), steps=(3,)),
    "LSTMs": Row(lambda: program(recurrent, f=[nn.LSTM(4, 4) for _ in range(3)]), steps=(3,)),
    "calls one module again": Row(lambda: program(calls_itself, block=nn.Linear(4, 4)), steps=(3,)),
    "numbers as arguments": Row(lambda: program(python_numbers, f=linears(3)), call=(X, 2), steps=(2,)),
    "half precision": Row(half, call=(X.bfloat16(),), steps=(3,), tolerance=0.05),
    "lazy": Row(lazy, refused="parameters of a lazy module"),
    "parametrised": Row(parametrised, steps=(3,)),
    "cannot be copied": Row(locked, refused="cannot be copied"),
    "rewritten before": Row(already, steps=(3,)),
    "rewritten inside": Row(lambda: program(residual, f=[already(), *linears(2)]), refused=LEFT_TO_PYTHON),
    "decorated forward": Row(Decorated, steps=(3,)),
    "answers for any attribute": Row(Everything, steps=(3,)),
    "empty batch": Row(chain, call=(X[:0],), steps=(3,)),
    "one number": Row(
        lambda: program(residual, f=[nn.Sequential(nn.Flatten(0), nn.Linear(1, 1), nn.Unflatten(0, (1, 1))) for _ in range(2)]),
        call=(X[:1, :1],),
        steps=(2,),
    ),
    "a sparse input": Row(
        lambda: program(lambda self, x: residual(self, torch.sparse.mm(x, self.w)), f=linears(3), w=nn.Parameter(X.T @ X)),
        call=(X.to_sparse(),),
        refused=LEFT_TO_PYTHON,
    ),
}


def outcome(net, call):
    """Outputs, and gradients of their sum."""
    torch.manual_seed(0)
    net.zero_grad()
    outputs = [leaf for leaf in tree_leaves(net(*call)) if isinstance(leaf, torch.Tensor)]
    wanted = [o.abs().float().sum() for o in outputs if o.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()
    return outputs, [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ROWS)
def test_weird_model(name):
    row = ROWS[name]
    torch.manual_seed(1)
    model = row.model()
    example = row.call if row.example else None
    if row.refused is not None:
        with pytest.raises((mnet_fx.MnetError, mnet_fx.MnetWarning), match=row.refused):
            mnet_fx.momentumize(model, example)(*row.call)
        return
    net = mnet_fx.momentumize(model, example, gamma=0)
    assert [p is q for p, q in zip(model.parameters(), net.parameters(), strict=True)] == [True] * len(list(model.parameters()))
    for expected, found in zip(outcome(model, row.call), outcome(net, row.call), strict=True):
        zoo.assert_agree(found, expected, row.tolerance)
    assert tuple(region.steps for region in mnet_fx.report(net).regions) == row.steps
    assert {part.front_end for part in mnet_fx.report(net).captured} == {"Dynamo"}


@pytest.mark.filterwarnings("ignore::mnet_fx.MnetWarning")
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.refused == NO_CHAIN])
def test_a_model_without_chains_works_as_before_and_says_why(name):
    row = ROWS[name]
    torch.manual_seed(1)
    model = row.model()
    net = mnet_fx.momentumize(model, row.call if row.example else None)
    for expected, found in zip(outcome(model, row.call), outcome(net, row.call), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    report = mnet_fx.report(net)
    assert {refusal.code for refusal in report.refusals} == set(row.why)
    assert bool(report.residual_adds) == bool(row.why)
    assert all(refusal.explanation and refusal.hint for refusal in report.refusals)


def early(self, x):
    return residual(self, x) if self.full else x


@pytest.mark.parametrize("first", [True, False])
def test_a_call_that_computes_nothing_is_no_error_and_decides_nothing(first):
    """Dynamo makes no graph of it; that no graph ran is otherwise a sign that the original network did."""
    model = chain()
    model = program(early, f=model.f, full=True)
    net, expected = mnet_fx.momentumize(model, gamma=0), model(X)
    net.full = first
    for _ in range(3):
        if net.full:
            zoo.assert_agree(net(X), expected)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", mnet_fx.MnetWarning)
                assert torch.equal(net(X), X)
        net.full = not net.full
    assert [region.steps for region in net.report.regions] == [3]
    assert net.report.captured[0].front_end == "Dynamo"


class Disabled(nn.Module):
    """A forward that Dynamo is told to keep out of, in a way that leaves it nothing at all to capture."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(linears(3))

    @torch.compiler.disable
    def forward(self, x):
        return residual(self, x)


@pytest.mark.parametrize("make", [Disabled, lambda: program(residual, f=[Disabled(), *linears(2)])], ids=["root", "block"])
def test_a_forward_that_is_left_to_python_is_an_error(make):
    net = mnet_fx.momentumize(make())
    for _ in range(2):
        with pytest.raises(mnet_fx.MnetError, match="so the original network ran and not the momentum network"):
            net(X)


@torch.compiler.disable
def outside(x):
    return torch.tanh(x)


def leaves_it_to_python_at_times(self, x):
    if self.full:
        for f in self.f:
            x = x + outside(f(x))
    return x


@pytest.mark.filterwarnings("ignore::mnet_fx.MnetWarning")
def test_a_call_that_is_left_to_python_is_an_error_after_one_that_computed_nothing():
    model = program(leaves_it_to_python_at_times, f=[Disabled() for _ in range(3)], full=False)
    net = mnet_fx.momentumize(model)
    for _ in range(2):
        net.full = False
        assert torch.equal(net(X), X)
        net.full = True
        with pytest.raises(mnet_fx.MnetError, match=LEFT_TO_PYTHON):
            net(X)
