"""Named layers that torch.compile compiles: each by itself, whole, and the same in both of its runs."""

import copy
import pickle

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import zoo
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x, scale=1.0):
        return x + self.dropout(self.b(torch.tanh(self.a(x)))) * scale


class Blocks(nn.Module):
    def __init__(self, depth=10):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self, name="eager"):
        self.graphs, self.inner = [], lookup_backend(name)

    def __call__(self, gm, inputs):
        self.graphs.append(sum(node.op == "call_function" for node in gm.graph.nodes))
        return self.inner(gm, inputs)


def named(**options):
    return mnet_fx.momentumize(Blocks(), regions=["blocks"], gamma=0.5, **options)


def run(net, seed=1):
    x = torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_()
    torch.manual_seed(seed)
    y = net(x)
    net.zero_grad()
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in net.named_parameters()}


def compiled_by_hand(**how):
    net = named()
    for block in net.blocks:
        block.compile(**how)
    return net


def test_inner_compiles_each_layer_once():
    """One graph for all ten layers (one more for the first, whose input may want no gradient); nothing else is in it."""
    backend = Counting()
    found = run(net := named(inner=backend))
    assert 1 <= len(backend.graphs) <= 2
    assert min(backend.graphs) >= 5
    zoo.assert_identical(found, run(named()))
    assert net.mnet_fx_options["inner"] is backend


def test_layers_are_compiled_by_hand_after():
    """As torchtitan does: `layer.compile(...)`; whole graphs, of the layer alone."""
    backend = Counting()
    found = run(compiled_by_hand(backend=backend, fullgraph=True, dynamic=False))
    assert 1 <= len(backend.graphs) <= 2
    zoo.assert_identical(found, run(named()))


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_reversible_is_stored_to_the_bit(inner):
    zoo.assert_identical(run(named(inner=inner)), run(named(inner=inner, backward="stored")))


def test_nothing_is_recomputed_inside_of_a_layer():
    """AOTAutograd under a budget of memory would draw other numbers for dropout in the backward pass."""
    with functorch_config.patch(activation_memory_budget=0.0):
        found = run(named(inner="aot_eager_decomp_partition"))
    torch._dynamo.reset()
    zoo.assert_identical(found, run(named(inner="aot_eager_decomp_partition")))


def test_the_budget_would_do_harm_else():
    """That the test above can fail: the same outputs, and other gradients."""
    found = []
    for budget in (0.0, 1.0):
        model = Blocks()
        for block in model.blocks:
            block.compile(backend="aot_eager_decomp_partition")
        with functorch_config.patch(activation_memory_budget=budget):
            found.append(run(model))
        torch._dynamo.reset()
    assert torch.equal(found[0]["y"], found[1]["y"])
    assert max((found[0][key] - found[1][key]).abs().max() for key in found[0]) > 1e-2


def test_copies_compile_for_themselves():
    backend = Counting("eager")
    net = compiled_by_hand(backend=backend)
    run(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.blocks[0].a.weight.mul_(2)
    eager = named()
    with torch.no_grad():
        eager.blocks[0].a.weight.mul_(2)
    zoo.assert_identical(run(twin), run(eager))
    again = pickle.loads(pickle.dumps(compiled_by_hand(backend="aot_eager")))
    zoo.assert_near(run(again), run(named()), 1e-6)


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}], ids=str)
def test_cuda_graphs_are_refused(how):
    with pytest.raises(mnet_fx.SettingsError, match="have CUDA graphs, which overwrite what a recomputed step has saved"):
        named().blocks[0].compile(**how)
    named().blocks[0].compile(mode="max-autotune-no-cudagraphs")


def test_cuda_graphs_that_are_on_for_all_are_off_here():
    class Looking(Counting):
        def __call__(self, gm, inputs):
            self.graphs.append(inductor_config.triton.cudagraphs)
            return self.inner(gm, inputs)

    backend, net = Looking(), named(inner="eager")
    mnet_fx.errors._TOLD.clear()
    for block in net.blocks:
        block.compile(backend=backend)
    with inductor_config.patch({"triton.cudagraphs": True}), pytest.warns(mnet_fx.MnetWarning, match="cudagraphs is on"):
        run(net)
    assert set(backend.graphs) == {False}


def test_layers_that_are_compiled_already_are_refused():
    wrapped, inside = Blocks(), Blocks()
    wrapped.blocks = nn.ModuleList([torch.compile(block) for block in wrapped.blocks])
    inside.blocks[2].compile()
    for model in (wrapped, inside):
        with pytest.raises(mnet_fx.SettingsError, match="a layer of 'blocks' is compiled already: momentumize the model before that"):
            mnet_fx.momentumize(model, regions=["blocks"], inplace=True)


def test_this_package_is_no_inner_compiler():
    with pytest.raises(mnet_fx.SettingsError, match="cannot be mnet_fx itself"):
        named().blocks[0].compile(backend="mnet_fx")


def test_restored_layers_compile_as_before():
    model = Blocks()
    mnet_fx.momentumize(model, regions=["blocks"], inner="aot_eager", inplace=True)
    mnet_fx.restore(model)
    assert not {"forward", "compile"} & set(vars(model.blocks[0]))
    model.blocks[0].compile(backend="eager")
    assert model.blocks[0]._compiled_call_impl is not None


class WithoutGradient(nn.Module):
    """A scale that is computed without gradients, as a norm of weights by power iteration is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            scale = self.linear.weight.norm()
        return x + torch.tanh(self.linear(x)) / scale


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(net):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8).requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("inner", ["aot", "inductor", "own"])
@pytest.mark.parametrize("layer", [WithoutGradient, lambda: nn.utils.spectral_norm(nn.Linear(8, 8))], ids=["no_grad", "spectral"])
def test_a_layer_that_switches_gradients_off_and_on_is_right_in_the_call_that_compiles_it(layer, inner):
    torch.manual_seed(0)
    model = Around(layer).double()
    net = mnet_fx.momentumize(model, gamma=0, regions=["layers"], inner={"aot": "aot_eager", "own": "eager"}.get(inner, inner))
    if inner == "own":
        for one in net.layers:
            one.compile(backend="aot_eager")
    reference = copy.deepcopy(model)
    for found, expected in zip(gradients(net), gradients(reference), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inner", ["eager", "aot"])
def test_hooks_inside_of_a_compiled_layer_have_their_effect(inner):
    model = Blocks().double()
    model.blocks[1].a.register_forward_hook(lambda module, args, result: 1.5 * result)
    net = mnet_fx.momentumize(model.eval(), gamma=0, regions=["blocks"], inner="aot_eager" if inner == "aot" else inner)

    def check():
        for found, expected in zip(gradients(net), gradients(model), strict=True):
            torch.testing.assert_close(found, expected)

    check()
    later = [one.blocks[2].b.register_forward_pre_hook(lambda module, args: (2 * args[0],)) for one in (net, model)]
    check()
    for handle in later:
        handle.remove()
    check()
