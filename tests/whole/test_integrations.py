"""mnet_fx.integrations, each in the library that it is for."""

import pytest
import torch
import zoo
from captures import tiny
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore", "error::mnet_fx.MnetWarning")


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def language_model(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return tiny("gpt2")[0]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def train(model, folder, callbacks=(), model_init=None, **options):
    """Two steps of the real Trainer; the model."""
    from mnet_fx.integrations.transformers import MomentumCallback

    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), **(arguments | options), learning_rate=0.5, optim="sgd")
    callbacks = [MomentumCallback(**options) for options in callbacks]
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=callbacks, model_init=model_init)
    torch.manual_seed(0)
    trainer.train()
    return trainer.model


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_callback_in_the_trainer_of_hugging_face(name, tmp_path):
    """The original for gamma = 0; as stored; a checkpoint that the original loads, and whose config says what it was."""
    original = values(train(language_model(name), tmp_path / "plain"))
    zoo.assert_near(values(train(language_model(name), tmp_path / "zero", [{"gamma": 0.0}])), original, 1e-4)
    nets = [train(language_model(name), tmp_path / b, [{"gamma": 0.5, "backward": b}]) for b in ("stored", "reversible")]
    zoo.assert_identical(*map(values, nets))
    assert mnet_fx.report(nets[1]).regions[0].steps == 3
    assert max((a - original[key]).abs().max() for key, a in values(nets[1]).items()) > 1e-3
    again = type(nets[1]).from_pretrained(tmp_path / "reversible" / "checkpoint-2")
    zoo.assert_identical(values(again), values(nets[1]))
    kept = {key: again.config.mnet_fx[key] for key in ("gamma", "regions", "backward")}
    assert kept == {"gamma": 0.5, "regions": ["bert.encoder.layer" if name == "bert" else "transformer.h"], "backward": "reversible"}
    ids = Texts()[0]["input_ids"][None]
    from mnet_fx.integrations.transformers import prepare

    again = prepare(again.eval(), **mnet_fx.saved_options(again.config))
    assert torch.equal(again(input_ids=ids).logits, nets[1].eval()(input_ids=ids).logits)


def test_models_that_the_trainer_makes(tmp_path):
    net = train(None, tmp_path, [{"gamma": 0.5}], model_init=lambda: language_model("gpt2"))
    assert mnet_fx.report(net).regions[0].path == "transformer.h"


def test_checkpointing_is_switched_off_and_said(tmp_path):
    from mnet_fx.integrations.transformers import prepare

    name = "activation_checkpointing" if hasattr(transformers.TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
    with pytest.warns(mnet_fx.MnetWarning, match="activation checkpointing is switched off"):
        net = train(language_model("gpt2"), tmp_path, [{}], **{name: True})
    assert not any(getattr(module, "gradient_checkpointing", False) for module in net.modules())
    model = language_model("gpt2")
    model.gradient_checkpointing_enable()
    with pytest.warns(mnet_fx.MnetWarning, match="activation checkpointing is switched off"):
        prepare(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_prepare_switches_caches_off_but_text_is_generated_with_them(name):
    from mnet_fx.integrations.transformers import prepare

    torch.manual_seed(0)
    model, call = tiny(name)
    ids = {"input_ids": call["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    expected = model.eval().generate(**ids, **({"decoder_start_token_id": 0} if name == "t5" else {}))
    assert prepare(model, gamma=0.0) is model
    assert not any(getattr(module.config, "use_cache", False) for module in model.modules() if hasattr(module, "config"))
    assert torch.equal(model.generate(**ids, **({"decoder_start_token_id": 0} if name == "t5" else {})), expected)
    call.pop("use_cache")
    model.train()(**call).logits.sum().backward()  # with a cache, a rerun would add to it


def test_what_prepare_says_of_other_options():
    from mnet_fx.integrations.transformers import prepare

    model = prepare(language_model("gpt2"), gamma=lambda t, steps: 0.5)
    noted = model.config.mnet_fx
    assert noted["gamma"]["values"] == {"3": [0.5, 0.5, 0.5]}
    with pytest.raises(mnet_fx.SettingsError, match="rewritten already"):
        prepare(model)
    assert not hasattr(mnet_fx.restore(model).config, "mnet_fx")
    model.config.mnet_fx = noted
    with pytest.warns(mnet_fx.MnetWarning, match="the config says that the weights were trained with gamma"):
        prepare(model, gamma=0.1)
    with pytest.raises(mnet_fx.SettingsError, match="works in place"):
        prepare(model, inplace=False)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order):
    """Adapters put on before and after; gradients of the adapters alone, as stored."""
    peft = pytest.importorskip("peft")
    from mnet_fx.integrations.transformers import prepare

    def gradients(backward):
        model = language_model("gpt2")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.2, init_lora_weights=False)
        if order == "after":
            prepare(model, backward=backward)
        torch.manual_seed(1)
        net = peft.get_peft_model(model, config)
        if order == "before":
            assert prepare(net, backward=backward) is net
            assert mnet_fx.report(net).regions[0].path == "base_model.model.transformer.h"
        assert (model.config.mnet_fx["backward"], model.config.mnet_fx["regions"]) == (backward, ["transformer.h"])
        ids = Texts()[0]["input_ids"][None]
        torch.manual_seed(2)
        net.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    stored = gradients("stored")
    zoo.assert_identical(gradients("reversible"), stored)
    assert len(stored) == 6
    assert all("lora" in name and g.any() for name, g in stored.items())


def lit(name="net"):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, rate=0.5):
            super().__init__()
            self.save_hyperparameters()
            setattr(self, name, language_model("gpt2"))

        def training_step(self, batch, index):
            return getattr(self, name)(**batch, use_cache=False).loss

        def validation_step(self, batch, index):
            self.log("loss", self.training_step(batch, index))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)  # AdamW makes steps of gradients that are rounding

    return Lit()


def fit(callback, folder, steps=2, resume=None):
    """Fit and validate; the LightningModule, and the path of a checkpoint."""
    import lightning

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", callbacks=callback, default_root_dir=folder, **options)
    data, model = torch.utils.data.DataLoader(Texts(), batch_size=2), lit()
    torch.manual_seed(0)
    trainer.fit(model, data, data, ckpt_path=resume)
    trainer.validate(model, data, verbose=False)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return model, folder / f"{steps}.ckpt"


@pytest.mark.parametrize("attribute", [None, "net"])
def test_the_callback_in_lightning(attribute, tmp_path):
    pytest.importorskip("lightning")
    from mnet_fx.integrations.lightning import MomentumCallback

    plain, _ = fit([], tmp_path)
    zero, _ = fit(MomentumCallback(attribute, gamma=0.0), tmp_path)
    zoo.assert_near(values(zero), values(plain), 1e-4)
    stored, _ = fit(MomentumCallback(attribute, gamma=0.5, backward="stored"), tmp_path)
    net, path = fit(MomentumCallback(attribute, gamma=0.5), tmp_path)
    zoo.assert_identical(values(net), values(stored))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert max((a - values(plain)[key]).abs().max() for key, a in values(net).items()) > 1e-3
    resumed, _ = fit(MomentumCallback(attribute, gamma=0.5), tmp_path, 4, path)
    assert not torch.equal(values(resumed)["net.transformer.wte.weight"], values(net)["net.transformer.wte.weight"])


class Rows(torch.utils.data.DataLoader):
    """Of 300 random rows, to be learnt."""

    def __init__(self, batch):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(300, 32, 16, generator=generator), torch.randint(10, (300, 32), generator=generator)
        super().__init__(torch.utils.data.TensorDataset(x, y), batch_size=batch, shuffle=True)


def classifier(batch=4, optimizers=1, values=False):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.batch_size, self.seen = batch, []
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.net = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.nn.Linear(16, 10))

        def training_step(self, batch, index):
            x, y = batch
            self.seen += [len(x)]
            loss = torch.nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten())
            self.log("loss", float(loss) if values else loss)
            return loss

        def train_dataloader(self):
            return Rows(self.batch_size)

        def configure_optimizers(self):
            return [torch.optim.AdamW(self.parameters()) for _ in range(optimizers)]

    return Classifier()


def find(model, *callbacks, **options):
    import lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(0)
    lightning.Trainer(max_steps=1, accelerator="cpu", callbacks=[*callbacks], **quiet, **options).fit(model)
    return model


def step_bytes(callbacks, batch):
    """What a training step really takes, with everything that is there besides."""
    model = classifier()
    for callback in callbacks:
        callback.setup(None, model, "fit")
    model.log = lambda *_: None
    optimizer = torch.optim.AdamW(model.parameters())
    data = next(iter(Rows(batch)))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        model.training_step(data, 0).backward()
        optimizer.step()
    there = [*model.parameters(), *(p.grad for p in model.parameters()), *data]
    there += [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in there) + mnet_fx.measure(lambda: model.training_step(data, 0).backward()).peak


@pytest.mark.parametrize("options", [None, {"gamma": 0.9}, {"regions": None}], ids=["plain", "layers", "captured"])
def test_lightning_finds_the_batch_size_by_an_estimate(options):
    pytest.importorskip("lightning")
    from mnet_fx.integrations.lightning import EstimatedBatchSizeFinder, MomentumCallback

    def callbacks():
        return [] if options is None else [MomentumCallback("net", **options)]

    memory = 6 << 20
    finder = EstimatedBatchSizeFinder(memory, margin=0.0)
    model = find(classifier(), *callbacks(), finder)
    found = finder.optimal_batch_size
    assert model.batch_size == found
    assert model.seen == [found]
    assert 8 < found < 300
    assert step_bytes(callbacks(), found - 1) <= 1.001 * memory < 1.002 * step_bytes(callbacks(), found + 1)


def test_the_batch_size_finder_of_lightning_changes_nothing_else():
    """Data, dropout and weights are those of a run that was given the number; the data are the most, and a margin stays free."""
    pytest.importorskip("lightning")
    from mnet_fx.integrations.lightning import EstimatedBatchSizeFinder

    torch.manual_seed(1)
    model, twin = classifier(), classifier(50)
    twin.load_state_dict(model.state_dict())
    find(model, EstimatedBatchSizeFinder("1GiB", max_val=50))
    find(twin)
    assert model.batch_size == 50
    zoo.assert_identical(values(model), values(twin))
    assert find(classifier(), EstimatedBatchSizeFinder("1GiB")).batch_size == 300
    whole, half = (find(classifier(), EstimatedBatchSizeFinder("6MiB", margin=part)).batch_size for part in (0.0, 0.5))
    assert half < 0.55 * whole
    assert find(classifier(), EstimatedBatchSizeFinder("6MiB", margin=0.0), precision="bf16-mixed").batch_size > whole


def test_what_the_batch_size_finder_of_lightning_refuses():
    pytest.importorskip("lightning")
    from mnet_fx.integrations.lightning import EstimatedBatchSizeFinder

    with pytest.raises(mnet_fx.SettingsError, match="how much memory is there on cpu"):
        find(classifier(), EstimatedBatchSizeFinder())
    with pytest.raises(mnet_fx.MnetError, match=r"not one row fits in 1\.00 KiB: a training step with 4 takes"):
        find(classifier(), EstimatedBatchSizeFinder(1024, margin=0.0))
    with pytest.raises(mnet_fx.SettingsError, match="margin"):
        EstimatedBatchSizeFinder(margin=1.0)
    with pytest.raises(mnet_fx.MnetError, match=r"asks for the values of tensors[^$]*or use Lightning's BatchSizeFinder"):
        find(classifier(values=True), EstimatedBatchSizeFinder("1GiB"))
    several = classifier(optimizers=2)
    several.automatic_optimization = False
    with pytest.raises(mnet_fx.SettingsError, match="Classifier has 2, and manual optimization"):
        find(several, EstimatedBatchSizeFinder("1GiB"))


def test_what_the_callback_of_lightning_refuses():
    import lightning

    from mnet_fx.integrations.lightning import MomentumCallback

    with pytest.raises(mnet_fx.SettingsError, match=r"Lit has no module 'model' when setup is called; its modules are \['net'\]"):
        MomentumCallback("model").setup(None, lit(), "fit")
    with pytest.raises(mnet_fx.SettingsError, match="no list of layers is found in LightningModule: name the attribute"):
        MomentumCallback().setup(None, lightning.LightningModule(), "fit")
    with pytest.raises(mnet_fx.SettingsError, match="works in place"):
        MomentumCallback(inplace=True)
    model = lit()
    mnet_fx.momentumize(model.net, regions="auto", inplace=True)
    with pytest.raises(mnet_fx.SettingsError, match="rewritten already"):
        MomentumCallback("net").setup(None, model, "fit")
