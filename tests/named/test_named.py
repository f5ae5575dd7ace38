"""Named regions: layers that the model's own Python calls, as steps of a chain."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import zoo
from captures import assert_same_model, run, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

import mnet_fx


class Layer(nn.Module):
    def __init__(self, d=6, p=0.0):
        super().__init__()
        self.norm, self.fc, self.drop = nn.LayerNorm(d), nn.Linear(d, d), nn.Dropout(p)

    def forward(self, x, memory=None, *, scale=1.0, flags=()):
        y = self.drop(torch.tanh(self.fc(self.norm(x)) + (0 if memory is None else memory)))
        return x + y * scale, y.mean(), {"flags": flags}


class Model(nn.Module):
    """No tracer can read it: it looks at values."""

    def __init__(self, depth=5, p=0.0):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer(p=p) for _ in range(depth)), nn.Linear(6, 2)

    def forward(self, x, memory=None, order=None, between=None, **options):
        means = []
        for i in range(len(self.layers)) if order is None else order:
            x, mean, kept = self.layers[i](x, memory, **options)
            assert kept == {"flags": options.get("flags", ())}
            means.append(mean)
            if between is not None and mean.item() > -1e9:
                x = between(i, x)
        return self.head(x), torch.stack(means)


def points(seed=0):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def twins(model, **options):
    return [mnet_fx.momentumize(model, regions=["layers"], backward=b, **options) for b in ("reversible", "stored")]


def assert_same_runs(nets, *args, **kwargs):
    (_, a, ga), (_, b, gb) = [run(net, *args, **kwargs) for net in nets]
    for s, t in zip([*a, *ga], [*b, *gb], strict=True):
        assert (s is None) == (t is None)
        assert s is None or torch.equal(s, t)


CALLS = {"plain": {}, "memory": {"memory": torch.randn(6)}, "keywords": {"scale": 0.5, "flags": (1, None, "a")}}


OPTIONS = [{"gamma": 0.9}, {"gamma": 0.05, "weights": "matched"}, {"initial_velocity": "first"}, {"initial_velocity": nn.Linear(6, 6)}]


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gamma_0_is_the_model_and_reversible_is_stored(call, training):
    model = Model(p=0.3)
    net = mnet_fx.momentumize(model, regions="layers", gamma=0)
    assert_same_model(model.train(training), net.train(training), points(), **call)
    for options in OPTIONS:
        assert_same_runs([n.train(training) for n in twins(model, **options)], points(), **call)


def test_the_recurrence_is_that_of_a_traced_region():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Block() for _ in range(4)))

        def forward(self, x):
            return self.layers(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.tanh(self.fc(x))

    model = Plain()
    traced, named = mnet_fx.momentumize(model, gamma=0.7), mnet_fx.momentumize(model, regions=["layers"], gamma=0.7)
    zoo.assert_agree(named(points()), traced(points()))


def test_a_side_input_gets_its_gradient():
    memory = torch.randn(6, requires_grad=True)
    grads = []
    for net in twins(Model()):
        memory.grad = None
        run(net, points(), memory)
        grads.append(memory.grad)
    assert torch.equal(*grads)


def test_what_people_do_with_the_layers():
    model = Model()
    net = mnet_fx.momentumize(model, regions=["layers"])
    assert list(net.state_dict()) == list(model.state_dict())
    assert net.layers[0].fc.weight is model.layers[0].fc.weight
    assert len(net.layers) == 5
    assert len(net.layers[1:3]) == 2
    assert [(r.path, r.kind, r.steps) for r in net.report.regions] == [("layers", "named", 5)]
    expected = run(net, points())[1]
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), mnet_fx.momentumize(net, regions=["layers"])):
        assert all(torch.equal(a, b) for a, b in zip(run(other, points())[1], expected, strict=True))
    seen = []
    net.layers[2].register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    run(net, points())
    assert seen == [(4, 6)]
    assert "forward" not in mnet_fx.momentumize(net).layers[0].__dict__
    assert "forward" not in model.layers[0].__dict__


def test_two_passes_before_a_backward_and_several_backwards():
    for net in twins(Model(), gamma=0.5):
        x, z = points(1).requires_grad_(), points(2).requires_grad_()
        a, b = net(x)[0].sum(), net(z)[0].sum()
        first = torch.autograd.grad(a, [x, net.layers[3].fc.weight], retain_graph=True)
        again = torch.autograd.grad(a, [x, net.layers[3].fc.weight])
        assert all(map(torch.equal, first, again))
        assert torch.autograd.grad(b, z)[0].isfinite().all()


def test_double_backward_is_that_of_stored():
    found = []
    for net in twins(Model(), gamma=0.5):
        x = points().requires_grad_()
        (g,) = torch.autograd.grad(net(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, net.layers[0].fc.weight]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("order", [(0, 1, 3, 4), (1, 2), (0, 2, 4), (0,)], ids=str)
def test_skipped_layers(order):
    """As LayerDrop does; a chain that starts late says so."""
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if order[0] else "error")
        net = mnet_fx.momentumize(model, regions=["layers"], gamma=0)
        assert_same_model(model, net, points(), order=order)
        assert_same_runs(twins(model, gamma=0.5), points(), order=order)


def test_passing_through_the_container_twice_starts_anew():
    model = Model(3)
    net = mnet_fx.momentumize(model, regions=["layers"], gamma=0)
    assert_same_model(model, net, points(), order=(0, 1, 2, 0, 1, 2))
    assert_same_model(model, net, points(), order=(0, 1, 0, 1, 2))
    assert_same_runs(twins(model, gamma=0.8), points(), order=(0, 1, 0, 1, 2))


def test_one_layer_many_times():
    class Tied(Model):
        def __init__(self):
            super().__init__(1)
            self.layers = nn.ModuleList([self.layers[0]] * 4)

    model = Tied()
    assert_same_model(model, mnet_fx.momentumize(model, regions=["layers"], gamma=0), points())
    assert_same_runs(twins(model, gamma=0.8), points())


def test_a_chain_that_breaks_warns_once_and_stays_right():
    model = Model()
    net = mnet_fx.momentumize(model, regions=["layers"], gamma=0)

    def between(i, x):
        return x * 2 if i == 2 else x

    with pytest.warns(mnet_fx.MnetWarning, match=r"layers\.3 was called with another tensor than layers\.2 returned") as caught:
        assert_same_model(model, net, points(), between=between)
    assert len(caught) == 1
    assert_same_model(model, net, points(), between=between)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_runs(twins(model, gamma=0.6), points(), between=between)


def test_a_stream_changed_in_place_is_an_error():
    net = mnet_fx.momentumize(Model(), regions=["layers"])
    with torch.no_grad(), pytest.raises(mnet_fx.StreamError, match="changed in place"):
        net(points(), between=lambda i, x: x.mul_(2))


class Alias(torch.autograd.Function):
    """What the hooks of FSDP2 make of a layer's inputs; this one shows that the gradient went through it."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *grads):
        return tuple(g * 3 for g in grads)


def test_an_alias_of_the_stream_goes_on_with_the_chain():
    """With a Function that scales gradients, as an oracle of where they go."""
    model = Model()
    found = []
    for net in twins(model, gamma=0.5):
        net.layers[2].register_forward_pre_hook(lambda module, args: Alias.apply(args[0]))
        found.append(run(net, points()))
    for a, b in zip([*found[0][1], *found[0][2]], [*found[1][1], *found[1][2]], strict=True):
        assert torch.equal(a, b)
    plain = run(twins(model, gamma=0.5)[0], points())
    assert torch.equal(found[0][1][0], plain[1][0])
    assert not torch.equal(found[0][2][0], plain[2][0])


@pytest.mark.parametrize(
    "odd",
    [torch.Tensor.detach, lambda x: x * 1, lambda x: x.flip(0).flip(0), lambda x: x.t().t()],
    ids=["detach", "copy", "flip", "2 views"],
)
def test_what_is_no_plain_alias_starts_a_new_chain(odd):
    net = mnet_fx.momentumize(Model(), regions=["layers"])
    net.layers[2].register_forward_pre_hook(lambda module, args: (odd(args[0]), *args[1:]))
    with pytest.warns(mnet_fx.MnetWarning, match=r"layers\.2 was called with another tensor"):
        net(points())


def test_a_layer_called_twice_on_one_tensor_is_an_error():
    net = mnet_fx.momentumize(Model(), regions=["layers"])
    x = net.layers[0](points())[0]
    net.layers[1](x)
    with pytest.raises(mnet_fx.StreamError, match=r"layers\.1 was called on a stream whose chain has gone on since"):
        net.layers[1](x)


class TakesDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, given):
        return {"x": given["x"] + torch.tanh(self.lin(given["x"]))}


class Dictionaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TakesDictionary() for _ in range(3))

    def forward(self, x):
        given = {"x": x}
        for layer in self.layers:
            given = layer(given)
        return given["x"]


def test_layers_that_take_a_dictionary_are_for_a_capture():
    named = mnet_fx.momentumize(Dictionaries(), regions=["layers"])
    with pytest.raises(mnet_fx.StreamError, match=r"without a tensor among its arguments.* leave regions out"):
        named(torch.randn(2, 4))
    captured = mnet_fx.momentumize(Dictionaries(), (torch.randn(2, 4),))
    assert [region.steps for region in captured.report.regions] == [3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_each_layer_is_an_error_and_around_all_is_right(reentrant):
    class Checkpointed(Model):
        def forward(self, x, whole=False):
            def all_layers(x):
                for layer in self.layers:
                    x = layer(x)[0]
                return x

            if whole:
                return checkpoint(all_layers, x, use_reentrant=reentrant)
            for layer in self.layers:
                x = checkpoint(lambda x, layer=layer: layer(x)[0], x, use_reentrant=reentrant)
            return x

    nets = twins(Checkpointed(), gamma=0.5)
    found = []
    for net in nets:
        x = points().requires_grad_()
        net(x, whole=True).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    for net in nets:
        x = points().requires_grad_()
        if reentrant or net is nets[1]:
            with pytest.raises(mnet_fx.StreamError, match="checkpoint"):
                net(x).square().sum().backward()
        else:  # the outer checkpoint has nothing to recompute, since the inner one keeps nothing
            net(x).square().sum().backward()
            assert torch.equal(x.grad, found[0])


class Wide(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], -1)


class Whole(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize(
    ("odd", "message"), [(Wide, r"shape \(4, 6\) into one of shape \(4, 12\)"), (Whole, "returned a dict")], ids=["shape", "dict"]
)
def test_a_layer_that_cannot_be_a_step_is_an_error(odd, message):
    net = mnet_fx.momentumize(nn.Sequential(nn.Linear(6, 6), odd()), regions=[""])
    with pytest.raises(mnet_fx.StreamError, match=message):
        net(points())


def test_names_that_do_not_fit_are_errors():
    with pytest.raises(mnet_fx.SettingsError, match=r"has no container 'blocks'; .*'layers'"):
        mnet_fx.momentumize(Model(), regions=["blocks"])
    with pytest.raises(mnet_fx.SettingsError, match="name each container once"):
        mnet_fx.momentumize(Model(), regions=["layers", "layers"])
    with pytest.raises(mnet_fx.SettingsError, match="holds no layers"):
        mnet_fx.momentumize(Model(), regions=["head"])
    compiled = nn.Sequential(*(torch.compile(nn.Linear(6, 6), backend="eager") for _ in range(2)))
    with pytest.raises(mnet_fx.SettingsError, match=r"is compiled already: .* inner='inductor'"):
        mnet_fx.momentumize(compiled, regions=[""])


@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_nothing_outlives_the_output(backward):
    """Also where no backward pass comes."""
    net = mnet_fx.momentumize(Model(), regions=["layers"], gamma=0.9, backward=backward)
    out = net(points())[0]
    region = net.layers[0].forward.region
    assert len(region.running) == (
        0 if backward == "reversible" else 4
    )  # every stream value but the last is gone, or kept by autograd alone
    x = net.layers[0](points())[0]
    tape = weakref.ref(region.running[x].held.tape)
    del x, out
    assert len(region.running) == 0
    assert tape() is None


HUGGING_FACE = {
    "gpt2": ["transformer.h"],
    "bert": ["encoder.layer"],
    "llama": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["layers"],
}


@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_a_layer_that_raises_leaves_nothing_behind(backward):
    """As memory that runs out, or Ctrl-C: the chain it was in goes, and another call is right."""
    net = mnet_fx.momentumize(Model(), regions=["layers"], backward=backward)
    twin, region, streams = copy.deepcopy(net), net.layers[0].forward.region, []

    def interrupted(module, args):
        streams.append(weakref.ref(args[0]))
        raise KeyboardInterrupt

    for i in (0, 3):
        handle = net.layers[i].fc.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            net(points())
        handle.remove()
        gc.collect()
        assert len(region.running) == 0
        assert streams[-1]() is None
        assert_same_model(net, twin, points())


@pytest.mark.parametrize(("name", "regions"), HUGGING_FACE.items(), ids=list(HUGGING_FACE))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_models(name, regions):
    model, call = tiny(name)
    net = mnet_fx.momentumize(model, regions=regions, gamma=0)
    for training in (True, False):
        assert_same_model(model.train(training), net.train(training), **call)
    assert_same_model(model, net, **call, output_hidden_states=True)
    nets = [mnet_fx.momentumize(model, regions=regions, gamma=0.9, backward=b).train() for b in ("reversible", "stored")]
    assert_same_runs(nets, **call)


def with_dropout(model):
    """Every probability that there is, also those that the tiny configurations leave at 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        for name in ("attention_dropout", "attn_pdrop", "dropout_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    return model


@pytest.mark.parametrize(("name", "regions"), HUGGING_FACE.items(), ids=list(HUGGING_FACE))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_models_in_training(name, regions):
    """With dropout, masks, hidden states and labels."""
    model, call = tiny(name)
    masks = {key: value for key, value in call.items() if "mask" in key}
    if name in ("gpt2", "llama", "t5"):
        call["labels"] = torch.randint(0, 50, (2, 7))
    if name == "t5":
        masks["decoder_attention_mask"] = call["decoder_attention_mask"] = torch.ones(2, 7).tril(5).flip(1).long()
    model = with_dropout(model).train()
    assert_same_model(model, mnet_fx.momentumize(model, regions=regions, gamma=0), **call, output_hidden_states=True)
    nets = [mnet_fx.momentumize(model, regions=regions, gamma=0.9, backward=b) for b in ("reversible", "stored")]
    assert_same_runs(nets, **call, output_hidden_states=True)
    net = nets[0]
    assert not torch.equal(net(**call)[0], net(**call)[0])
    for mask in masks:
        plain = call | {mask: None}
        assert not torch.equal(net.eval()(**call)[0], net(**plain)[0]), mask


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_cache_that_the_layers_append_to_holds_all_once(name):
    """As in the original; with a mask, which a rerun on twice as many keys would not fit."""
    model, call = tiny(name)
    del call["use_cache"]
    call["attention_mask"] = torch.ones(2, 7).long()
    caches = []
    for net in (model, *(mnet_fx.momentumize(model, regions=HUGGING_FACE[name], gamma=0, backward=b) for b in ("reversible", "stored"))):
        net.zero_grad()
        torch.manual_seed(0)
        out = net.train()(**call)
        out.logits.sum().backward()
        cache = getattr(out.past_key_values, "self_attention_cache", out.past_key_values)
        caches.append([t.detach() for layer in cache.layers for t in (layer.keys, layer.values)])
    for original, reversible, stored in zip(*caches, strict=True):
        zoo.assert_agree(reversible, original, 1e-5)
        assert torch.equal(reversible, stored)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_generation_with_and_without_a_cache(name):
    model, call = tiny(name)
    ids, options = call["input_ids"], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for gamma in (0, 0.9):
        net = mnet_fx.momentumize(model.eval(), regions=HUGGING_FACE[name], gamma=gamma)
        found = net.generate(ids, **options, use_cache=True)
        assert torch.equal(found, net.generate(ids, **options, use_cache=False))
        assert gamma or torch.equal(found, model.generate(ids, **options))


def test_the_velocity_module_is_not_run_as_a_layer():
    """It becomes a child of the model, and a Sequential runs all of its children."""
    for regions in ([""], None):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        with pytest.raises(mnet_fx.SettingsError, match="would run the module"):
            mnet_fx.momentumize(model, regions=regions, initial_velocity=nn.Linear(6, 6))


def steps_of(net):
    return [region.steps for region in net.report.regions]


class Adding(nn.Module):
    """Adds to a list and a dictionary of its caller's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, losses, counts=None):
        y = torch.tanh(self.linear(x))
        losses.append(y.square().mean())
        counts["calls"] = counts.get("calls", 0) + 1
        return x + y


class Collecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Adding() for _ in range(4))

    def forward(self, x):
        losses, counts = [], {}
        for layer in self.layers:
            x = layer(x, losses, counts=counts)
        return x.sum() + sum(losses), counts


@pytest.mark.parametrize("gamma", [0.0, 0.9], ids=["inputs", "reverse"])
def test_what_layers_add_to_lists_of_the_caller_arrives_once_with_its_gradient(gamma):
    model, x, found = Collecting(), torch.randn(5, 6), []
    for net in zoo.twins(model, gamma=gamma, regions=["layers"]):
        loss, counts = net(x)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        assert counts == {"calls": 4}
    assert all(map(torch.equal, *found))
    if gamma == 0:
        zoo.assert_agree(found[0][0], model(x)[0])


def test_errors_of_a_root_that_is_the_container_name_region_and_layer():
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    net = mnet_fx.momentumize(nn.Sequential(*layers), regions=[""])
    out = net(torch.randn(5, 6))
    with torch.no_grad():
        layers[2][0].weight.add_(1)
    with pytest.raises(mnet_fx.InversionError, match=r"^\(root\), step 2: parameter '2.0.weight' differs"):
        out.sum().backward()
