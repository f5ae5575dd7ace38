"""`rest="checkpoint"` where the rest ends in a linear layer and its cross entropy: chunks of tokens, never all logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mnet_fx
from mnet_fx import InversionError, momentumize

D, V, T, B = 16, 300, 40, 3


class LM(nn.Module):
    def __init__(self, form="flat", bias=True, **loss):
        super().__init__()
        self.form, self.loss = form, loss
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=bias)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh()) for _ in range(3))
        self.register_buffer("classes", torch.rand(V) + 0.5)

    def forward(self, tokens, target):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        loss = dict(self.loss)
        if loss.pop("weighted", False):
            loss["weight"] = self.classes
        if self.form == "flat":
            return F.cross_entropy(logits.view(-1, V), target.reshape(-1), **loss)
        if self.form == "shifted":
            return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V), target[..., 1:].reshape(-1), **loss)
        if self.form == "returned":
            return F.cross_entropy(logits.view(-1, V), target.reshape(-1), **loss), logits
        if self.form == "shifted and returned":
            return F.cross_entropy(logits[..., :-1, :].reshape(-1, V), target[..., 1:].reshape(-1), **loss), logits
        if self.form == "as Hugging Face does":
            wide = logits.float().view(-1, V)
            shifted = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
            return F.cross_entropy(wide, shifted, ignore_index=-100, reduction="sum") / 50, logits
        if self.form == "twice converted":
            return F.cross_entropy(logits.half().float().view(-1, V), target.reshape(-1), **loss), logits
        if self.form == "overwritten":
            return F.cross_entropy(logits.view(-1, V), target.reshape(-1), **loss), logits.mul_(2)
        if self.form == "scaled":
            return F.cross_entropy(logits.view(-1, V) * 0.5, target.reshape(-1), **loss)
        return F.cross_entropy(logits.transpose(1, 2), target, **loss)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    target = torch.randint(V, (B, T))
    target[0, :7] = -100
    return torch.randint(V, (B, T)), target


def step(net, batch):
    for p in net.parameters():
        p.grad = None
    out = net(*batch)
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


OPTIONS = [
    {},
    {"bias": False},
    {"form": "shifted"},
    {"reduction": "sum"},
    {"ignore_index": 5},
    {"weighted": True, "label_smoothing": 0.1},
    {"label_smoothing": 0.2},
    {"form": "returned"},
    {"form": "shifted and returned", "weighted": True},
    {"form": "as Hugging Face does", "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_and_its_gradients(batch, options):
    torch.manual_seed(1)
    batch = (batch[0], batch[1].where(batch[1] >= 0, torch.tensor(options.get("ignore_index", -100))))
    model = LM(**options).double()
    stored, chunked = (momentumize(copy.deepcopy(model), batch, gamma=0.5, rest=rest) for rest in ("store", "checkpoint"))
    assert chunked.report.heads == ("head",)
    assert "chunks of tokens" in str(chunked.report)
    exact = {"rtol": 1e-6, "atol": 1e-8} if options.get("form") == "as Hugging Face does" else {"rtol": 1e-10, "atol": 1e-12}
    for a, b in zip(step(stored, batch), step(chunked, batch), strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("form", ["overwritten", "twice converted", "scaled", "transposed"])
def test_other_heads_are_left_as_they_are(batch, form):
    torch.manual_seed(1)
    model = LM(form)
    stored, chunked = (momentumize(copy.deepcopy(model), batch, gamma=0.5, rest=rest) for rest in ("store", "checkpoint"))
    assert chunked.report.heads == ()
    for a, b in zip(step(stored, batch), step(chunked, batch), strict=True):
        assert torch.equal(a, b)


def test_no_more_than_a_chunk_of_logits_is_ever_there(batch):
    model = LM()
    peaks = {}
    for rest in ("store", "checkpoint"):
        net = momentumize(copy.deepcopy(model), gamma=0.5, rest=rest)
        step(net, batch)
        peaks[rest] = mnet_fx.measure(lambda net=net: net(*batch), lambda loss: loss.backward())
    logits = 4 * B * T * V
    assert peaks["store"].kept > logits
    assert peaks["checkpoint"].kept < logits / 4
    assert peaks["checkpoint"].peak < 0.6 * peaks["store"].peak


def test_no_gradients_and_nothing_that_counts(batch):
    tokens, target = batch
    net = momentumize(LM(), gamma=0.0, rest="checkpoint")
    loss = step(net, batch)[0]
    with torch.no_grad():
        assert net(tokens, target).item() == pytest.approx(loss.item(), rel=1e-6)
        assert net(tokens, torch.full_like(target, -100)).isnan()


def test_a_weight_that_changes_in_between_is_an_error(batch):
    net = momentumize(LM(), gamma=0.5, rest="checkpoint")
    loss = net(*batch)
    with torch.no_grad():
        net.head.weight.mul_(2)
    with pytest.raises(InversionError, match="the head"):
        loss.backward()


def test_bfloat16_and_sizes_that_vary(batch):
    tokens, target = batch
    model = LM().bfloat16()
    stored, chunked = (momentumize(copy.deepcopy(model), gamma=0.5, rest=rest) for rest in ("store", "checkpoint"))
    for size in (3, 2, 1):
        a, b = (step(net, (tokens[:size], target[:size])) for net in (stored, chunked))
        for s, t in zip(a, b, strict=True):
            torch.testing.assert_close(s.float(), t.float(), rtol=0.03, atol=0.03 * s.float().abs().max().item())


def test_arguments_by_name(batch):
    class Named(LM):
        def forward(self, tokens, target):
            x = self.embed(tokens)
            for block in self.blocks:
                x = x + block(x)
            return F.cross_entropy(target=target.reshape(-1), input=self.head(x).view(-1, V))

    net = momentumize(Named(), batch, gamma=0.5, rest="checkpoint")
    assert net.report.heads == ("head",)
    step(net, batch)
    taken = mnet_fx.measure(lambda: net(*batch), lambda loss: loss.backward())
    assert taken.kept < B * T * V  # a quarter of the logits


RETURNED = ("returned", "as Hugging Face does")


def both(form, batch, dtype=torch.float64):
    torch.manual_seed(1)
    model = LM(form).to(dtype)
    return [momentumize(copy.deepcopy(model), batch, gamma=0.5, rest=rest) for rest in ("store", "checkpoint")]


def assert_alike(batch, results, rtol=1e-10, atol=1e-12):
    """What `results` gives of a net is the same for logits that are kept and for chunks."""
    for a, b in zip(*map(results, both("returned", batch)), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_gradients_pass_through_logits_that_are_returned(batch):
    def results(net):
        seen = []
        loss, logits = net(*batch)
        logits.retain_grad()
        logits.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
        (loss + logits.sin().mean()).backward()
        return [*seen, logits.grad, *(p.grad for p in net.parameters()), torch.autograd.grad(*net(*batch))[0]]

    assert_alike(batch, results)


def test_the_gradient_of_a_gradient(batch):
    def results(net):
        loss, _ = net(*batch)
        first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [p.grad for p in net.parameters()]

    assert_alike(batch, results, rtol=1e-8, atol=1e-10)


def test_the_caller_may_overwrite_them(batch):
    def results(net):
        loss, logits = net(*batch)
        with torch.no_grad():
            logits.zero_()
        loss.backward()
        return [p.grad for p in net.parameters()]

    assert_alike(batch, results)


@pytest.mark.parametrize("form", ["flat", "returned"])
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_transforms_and_what_records_a_program_see_one_piece(batch, form):
    """Under torch.func, torch.export and torch.jit.trace."""

    def loss_of(out):
        return out if form == "flat" else out[0]

    net = momentumize(LM(form).double(), batch, gamma=0.5, backward="stored", rest="checkpoint")
    assert net.report.heads == ("head",)
    wanted = torch.autograd.grad(loss_of(net(*batch)), list(net.parameters()))
    got = torch.func.grad(lambda given: loss_of(torch.func.functional_call(net, given, batch)))(dict(net.named_parameters()))
    for a, b in zip(wanted, got.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    expected = loss_of(net.eval()(*batch))
    for program in (torch.export.export(net, batch).module(), torch.jit.trace(net, batch, check_trace=False)):
        torch.testing.assert_close(loss_of(program(*batch)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", RETURNED)
def test_logits_that_are_returned_are_not_kept_by_us_and_have_one_gradient(batch, form):
    size, taken = 4 * B * T * V, {}
    for net, rest in zip(both(form, batch, torch.float32), ("store", "checkpoint"), strict=True):
        step(net, batch)
        taken[rest] = mnet_fx.measure(lambda net=net: net(*batch)[0], lambda loss: loss.backward())
    assert taken["store"].kept > size
    assert taken["checkpoint"].kept < size / 4
    assert taken["checkpoint"].peak < 1.7 * size < 2.9 * size < taken["store"].peak


@pytest.mark.parametrize("form", ["flat", "returned", "as Hugging Face does"])
def test_where_there_is_memory_logits_are_kept(batch, form):
    """Then all is as with rest="store", bit for bit; below what they take they are computed in chunks as before."""
    torch.manual_seed(1)
    model = LM(form)
    stored, kept, little = (momentumize(copy.deepcopy(model), gamma=0.5, **options) for options in ({}, *KEPT))
    for a, b in zip(step(stored, batch), step(kept, batch), strict=True):
        assert torch.equal(a, b)
    step(little, batch)
    taken = [mnet_fx.measure(lambda net=net: net(*batch), lambda out: None).kept for net in (kept, little)]
    logits = 4 * B * T * V
    assert taken[0] - taken[1] > logits * 0.9


KEPT = ({"rest": "checkpoint", "keep": 10**9}, {"rest": "checkpoint", "keep": 4 * B * T * V // 2})
