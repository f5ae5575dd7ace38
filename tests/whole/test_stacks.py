"""Training stacks around rewritten models, each run for a few steps with activations stored and without: the same weights, bit for bit.

Processes that share the work are in test_distributed.py; copies, checkpoints and functional_call in test_everyday.py.
"""

import copy

import pytest
import torch
import transformers
import zoo
from captures import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

FORMS = ("reversible", "stored")
quiet = pytest.mark.filterwarnings("ignore")  # the stacks warn of their own future


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.fc(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(4, 8), nn.Sequential(*(Block() for _ in range(4))), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)))


KINDS = {"traced": {}, "named": {"regions": ["layers"]}}


@pytest.fixture(params=KINDS)
def forms(request):
    """The reversible and the stored form of one model, which share nothing."""
    return zoo.twins(Model(), gamma=0.9, **KINDS[request.param])


def samples(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_training(run, forms):
    """Weights after run(net), the same bits for both forms and not those of before."""
    before = weights(forms[0])
    found = []
    for net in forms:
        zoo.seeded(run, net)
        found.append(weights(net))
    zoo.assert_identical(*found)
    assert not any(torch.equal(found[0][name], before[name]) for name in before if "fc" in name)


# ---- plain torch


OPTIMIZERS = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimisers_with_clipping_and_accumulation(forms, optimizer):
    def train(net):
        chosen = OPTIMIZERS[optimizer](net.parameters())
        for _ in range(3):
            for x, y in zip(*(t.chunk(2) for t in samples()), strict=True):
                nn.functional.mse_loss(net(x), y).backward()
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            chosen.step()
            chosen.zero_grad()

    assert_same_training(train, forms)


def test_autocast_and_grad_scaler_skip_a_step_that_overflows(forms):
    def train(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales = []
        for spike in (1.0, torch.inf, 1.0):
            x, y = samples()
            with torch.autocast("cpu", torch.bfloat16):
                out = net(x)
                loss = nn.functional.mse_loss(out.float(), y) * spike
            assert out.dtype is torch.bfloat16
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [2.0**10, 2.0**9, 2.0**9]

    assert_same_training(train, forms)


def test_an_average_of_the_weights(forms):
    averages = []

    def train(net):
        average, optimizer = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5)), torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(samples()[0]), samples()[1]).backward()
            optimizer.step()
            average.update_parameters(net)
        averages.append(average)

    assert_same_training(train, forms)
    zoo.assert_identical(*map(weights, averages))
    x, other = samples()[0], copy.deepcopy(forms[0]).eval()
    other.load_state_dict(averages[0].module.state_dict())
    assert torch.equal(averages[0].eval()(x), other(x))
    assert not torch.equal(other(x), forms[0].eval()(x))


def test_hooks_on_saved_tensors_outside_meet_nothing_of_the_chain(forms):
    """Offloading by save_on_cpu, and what it has to move."""
    moved = {}

    def train(net):
        form, counted = FORMS[len(moved)], []
        with torch.autograd.graph.save_on_cpu():
            loss = nn.functional.mse_loss(net(samples()[0]), samples()[1])
        loss.backward()
        for p in net.parameters():
            p.data -= p.grad
        with torch.autograd.graph.saved_tensors_hooks(lambda t: counted.append(t.nbytes) or t, lambda t: t):
            net(samples()[0])
        moved[form] = sum(counted)

    assert_same_training(train, forms)
    assert moved["reversible"] < 0.3 * moved["stored"]


def test_safetensors_hold_a_rewritten_model_for_the_original_and_back(forms, tmp_path):
    net, original = forms[0], Model()
    save_model(net, tmp_path / "net.safetensors")
    assert not torch.equal(original.head.weight, net.head.weight)
    load_model(original, tmp_path / "net.safetensors")
    zoo.assert_identical(weights(original), weights(net))
    for p in net.parameters():
        p.data.zero_()
    load_model(net, tmp_path / "net.safetensors")
    zoo.assert_identical(weights(net), weights(original))


# ---- Hugging Face and Lightning


def gpt2(backward, wrapped=lambda model: model, path=""):
    torch.manual_seed(0)
    model = wrapped(tiny("gpt2")[0])
    return mnet_fx.momentumize(model, regions=[f"{path}transformer.h"], gamma=0.9, backward=backward)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def adapted(model, target="c_attn", fan_in_fan_out=True):
    """With LoRA whose second factors are not zero, so that the gradients of the first are not."""
    torch.manual_seed(1)
    net = get_peft_model(model, LoraConfig(r=2, target_modules=[target], lora_dropout=0.2, fan_in_fan_out=fan_in_fan_out))
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return net


def adapters(net, *args, **call):
    """Gradients of what LoRA adds; everything else has none."""
    out = zoo.seeded(lambda: net.train()(*args, **call))
    (out if isinstance(out, torch.Tensor) else out.loss).sum().backward()
    assert all((p.grad is None) == ("lora" not in name) for name, p in net.named_parameters())
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@quiet
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after_momentumizing_a_transformer(order):
    ids, found = Texts()[0]["input_ids"][None], []
    for backward in FORMS:
        net = gpt2(backward, adapted, "base_model.model.") if order == "before" else adapted(gpt2(backward))
        found.append(adapters(net, input_ids=ids, labels=ids, use_cache=False))
    zoo.assert_identical(*found)
    assert len(found[0]) == 6
    assert all(g.any() for g in found[0].values())


@quiet
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after_momentumizing_a_traced_model(order):
    found = []
    for backward in FORMS:
        torch.manual_seed(0)
        model = Model()
        if order == "before":
            net = mnet_fx.momentumize(adapted(model, "fc", False), backward=backward)
            assert [region.steps for region in net.report.regions] == [4]
        else:
            net = adapted(mnet_fx.momentumize(model, backward=backward), "fc", False)
        found.append(adapters(net, samples()[0]))
    zoo.assert_identical(*found)
    assert len(found[0]) == 8


@quiet
def test_lora_merges():
    ids, net = Texts()[0]["input_ids"][None], adapted(gpt2("reversible")).eval()
    expected = net(input_ids=ids, use_cache=False).logits
    merged = net.merge_and_unload()
    assert "lora" not in str(merged.state_dict().keys())
    zoo.assert_agree(merged(input_ids=ids, use_cache=False).logits, expected)


@quiet
@pytest.mark.parametrize(
    "options", [pytest.param({"bf16": True}, marks=pytest.mark.slow), {"gradient_checkpointing": True}], ids=lambda o: "-".join(o)
)
def test_the_trainer_of_hugging_face(options, tmp_path):
    """Its checkpoints are those of the original model."""

    def train(net):
        arguments = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
        arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3}
        trainer = transformers.Trainer(net, transformers.TrainingArguments(str(tmp_path), **arguments, **options), train_dataset=Texts())
        trainer.train()

    nets = [gpt2(backward) for backward in FORMS]
    before = weights(nets[0])
    for net in nets:
        zoo.seeded(train, net)
    zoo.assert_identical(*map(weights, nets))
    assert not torch.equal(nets[0].transformer.h[1].mlp.c_fc.weight, before["transformer.h.1.mlp.c_fc.weight"])
    original = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3")
    zoo.assert_identical(weights(original), weights(nets[1]))


@quiet
def test_lightning():
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return self.net(**batch, use_cache=False).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train(net):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=0.1, accumulate_grad_batches=2, **options
        )
        trainer.fit(Lit(net), torch.utils.data.DataLoader(Texts(), batch_size=2))
        assert trainer.global_step == 3

    nets = [gpt2(backward) for backward in FORMS]
    before = weights(nets[0])
    for net in nets:
        zoo.seeded(train, net)
    zoo.assert_identical(*map(weights, nets))
    assert not torch.equal(nets[0].transformer.h[1].mlp.c_fc.weight, before["transformer.h.1.mlp.c_fc.weight"])
