"""Models of Hugging Face, tiny and with random weights, in its Trainer with one more line: the callback."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore", "error::mnet_fx.MnetWarning")]

COMMON = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = COMMON | {"vocab_size": 50, "pad_token_id": 0}
GPT2 = {"n_layer": 4, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 32, "num_layers": 4, "num_heads": 2, "d_ff": 64, "d_kv": 16, "vocab_size": 50, "decoder_start_token_id": 0}
WHISPER = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "vocab_size": 50, "pad_token_id": 0}
WHISPER |= {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 4), ("attention_heads", 2), ("ffn_dim", 64))}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"num_key_value_heads": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig", COMMON | {"image_size": 32, "patch_size": 8, "num_labels": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"num_key_value_heads": 2}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
CAUSAL = ("gpt2", "llama", "qwen2")


def made(name):
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options))


class Data(torch.utils.data.Dataset):
    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 4

    def __getitem__(self, i):
        source = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 50, (7,), generator=source)
        if self.name == "vit":
            return {"pixel_values": torch.randn(3, 32, 32, generator=source), "labels": i}
        if self.name == "whisper":
            return {"input_features": torch.randn(8, 32, generator=source), "labels": ids}
        return {"input_ids": ids, "labels": ids}


def trained(name, folder, lora=False, **options):
    """The parameters after two steps, and the model."""
    from mnet_fx.integrations.transformers import MomentumCallback

    model = made(name)
    if lora:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        dropout = 0.0 if name == "mixtral" else 0.2  # peft has none around experts
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False))
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **arguments, learning_rate=0.2, optim="sgd", max_grad_norm=0.0)
    callbacks = [MomentumCallback(**options)] if options else []
    trainer = transformers.Trainer(model, arguments, train_dataset=Data(name), callbacks=callbacks)
    torch.manual_seed(0)
    trainer.train()
    return {key: p.detach().clone() for key, p in model.named_parameters()}, model


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_each_model(name, tmp_path):
    before = {key: p.detach().clone() for key, p in made(name).named_parameters()}
    original, _ = trained(name, tmp_path)
    zoo.assert_near(trained(name, tmp_path, gamma=0.0)[0], original, 1e-4)
    (stored, _), (reversible, net) = (trained(name, tmp_path, gamma=0.5, backward=backward) for backward in ("stored", "reversible"))
    zoo.assert_identical(reversible, stored)
    assert {region.storage for region in mnet_fx.report(net).regions} == {"reverse"}
    assert any(not torch.equal(reversible[key], p) for key, p in before.items())
    assert any(not torch.equal(reversible[key], p) for key, p in original.items())


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_lora(name, tmp_path):
    stored, reversible = (trained(name, tmp_path, lora=True, gamma=0.5, backward=backward)[0] for backward in ("stored", "reversible"))
    zoo.assert_identical(reversible, stored)
    first = made(name).state_dict()
    assert all(
        torch.equal(p, first[key.split("base_model.model.")[-1].replace(".base_layer", "")])
        for key, p in stored.items()
        if "lora" not in key
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_a_cache_is_what_the_forward_pass_made(name):
    """With a cache of keys and values, which `prepare` switches off, and a mask: two pieces of a text, one after the other."""
    found = {}
    for backward, gamma in ((None, 0.0), ("reversible", 0.0), ("stored", 0.5), ("reversible", 0.5)):
        net = made(name).double()
        if backward is not None:
            net = mnet_fx.momentumize(net, regions="auto", gamma=gamma, backward=backward)
        batch = {
            key: value.double() if value.is_floating_point() else value[None] for key, value in Data(name)[0].items() if key != "labels"
        }
        given = {"input_features": batch["input_features"][None]} if name == "whisper" else batch
        ids, cache, lengths = torch.arange(3, 11)[None], None, []
        for piece in (ids[:, :4], ids[:, 4:]):
            torch.manual_seed(0)
            length = piece.shape[1] if cache is None else 2 * piece.shape[1]
            if name in ("gpt2", "llama"):
                out = net(input_ids=piece, attention_mask=torch.ones(1, length).long(), labels=piece, past_key_values=cache, use_cache=True)
            else:
                out = net(**given, decoder_input_ids=piece, labels=piece, past_key_values=cache, use_cache=True)
            out.loss.backward()
            cache = detached(out.past_key_values)
            lengths.append(cache.get_seq_length())
        assert lengths == [4, 8]
        found[backward, gamma] = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    zoo.assert_near(found["reversible", 0.0], found[None, 0.0], 1e-9)
    zoo.assert_identical(found["reversible", 0.5], found["stored", 0.5])


def detached(cache):
    for part in (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")):
        if part is not None:
            detached(part)
    for layer in getattr(cache, "layers", ()):
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


@pytest.mark.long
@pytest.mark.parametrize("name", CAUSAL)
def test_captured_with_the_head_in_chunks(name, tmp_path):
    """Their models return their logits and compute the loss: it is computed in chunks of tokens, and the rest runs again."""
    options = {"gamma": 0.5, "regions": None}
    stored, _ = trained(name, tmp_path, **options, backward="stored")
    chunked, net = trained(name, tmp_path, **options, rest="checkpoint")
    zoo.assert_near(chunked, stored, 1e-5)
    assert mnet_fx.report(net).heads == ("lm_head",)


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_trainer import trained
import accelerate, copy, mnet_fx, test_trainer
found = [trained({name!r}, sys.argv[1], gamma=0.5, backward=backward)[0] for backward in ("stored", "reversible")]
assert torch.distributed.get_world_size() == 2
assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
both = [torch.cat([p.flatten() for p in found[0].values()])] * 2
torch.distributed.all_gather(both, both[0].clone())
assert torch.equal(*both)

from mnet_fx.integrations.transformers import prepare  # a loop of one's own
accelerator = accelerate.Accelerator(cpu=True)
for backward in ("stored", "reversible"):
    model = prepare(test_trainer.made({name!r}), gamma=0.5, backward=backward)
    loader = torch.utils.data.DataLoader(test_trainer.Data({name!r}), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    torch.manual_seed(3)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    found.append({{key: p.detach().clone() for key, p in accelerator.unwrap_model(model).named_parameters()}})
assert all(torch.equal(found[2][key], found[3][key]) for key in found[2])
print("both agree")
torch.distributed.destroy_process_group()  # else its threads may outlive what they need, and the process ends by abort
"""


SHARDED = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
import accelerate, test_trainer
from accelerate.state import AcceleratorState, DistributedType, PartialState
from mnet_fx.integrations.transformers import prepare

def trained(options, **plugin):
    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin)
    for state in (AcceleratorState, PartialState):  # accelerate shards on accelerators alone
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    model = test_trainer.made({name!r})
    model = model if options is None else prepare(model, **options)
    loader = torch.utils.data.DataLoader(test_trainer.Data({name!r}), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    assert any("FSDP" in type(module).__name__ and module is not model for module in model.modules())
    torch.manual_seed(3)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.get_state_dict(model)

found = {{"plain": trained(None), "zero": trained({{"gamma": 0.0}})}}
for regions in ("auto", None):
    for backward in ("stored", "reversible"):
        found[regions, backward] = trained({{"gamma": 0.5, "regions": regions, "backward": backward}})
found["again"] = trained({{"gamma": 0.5}}, activation_checkpointing=True)
found["kept"] = trained({{"gamma": 0.5}}, cpu_ram_efficient_loading=False, reshard_after_forward=False)
if os.environ["RANK"] == "0":  # the others get nothing
    torch.save(found, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "gpt2" else pytest.mark.slow) for name in (*CAUSAL, "mixtral", "whisper")]
)
def test_fsdp2_of_accelerate(name, tmp_path):
    """Rewritten before `prepare`, which shards each layer. Of the families above, those that its FSDP2 takes without us."""
    in_two_processes(SHARDED, name, tmp_path / "found")
    found = torch.load(tmp_path / "found")
    zoo.assert_near(found["zero"], found["plain"], 1e-4)
    for regions in ("auto", None):
        zoo.assert_identical(found[regions, "reversible"], found[regions, "stored"])
    for key in ("again", "kept"):
        zoo.assert_identical(found[key], found["auto", "stored"])
    assert any(not torch.equal(found["kept"][key], p) for key, p in found["plain"].items())


def in_two_processes(script, name, *arguments):
    here = Path(__file__).parent
    path = arguments[0].parent / "script.py"
    path.write_text(script.format(name=name, paths=[str(here), str(here.parent), str(here.parent / "captured"), str(here.parent.parent)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name == "gpt2" else pytest.mark.slow) for name in MODELS])
def test_two_processes_under_the_trainer_and_accelerate(name, tmp_path):
    assert in_two_processes(SCRIPT, name, tmp_path / "trained").count("both agree") == 2
