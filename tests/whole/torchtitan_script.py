"""Three steps of torchtitan's Llama as its trainer makes it (meta device, policy, compile, FSDP2, weights), in one process on the CPU.

python tests/whole/torchtitan_script.py OUT     writes what each policy trained, by name, as torch.save does
"""

import os
import sys

import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.parallelize import parallelize_llama

from mnet_fx import report
from mnet_fx.integrations.torchtitan import MomentumAC

torchtitan.distributed.parallel_dims.device_type = "cpu"  # it takes a build of torch for CUDA to have a GPU
POLICIES = {
    "none": (None, False),
    "zero": (MomentumAC.Config(gamma=0.0), False),
    "stored": (MomentumAC.Config(gamma=0.5, backward="stored"), False),
    "reversible": (MomentumAC.Config(gamma=0.5), False),
    "stored compiled": (MomentumAC.Config(gamma=0.5, backward="stored"), True),
    "reversible compiled": (MomentumAC.Config(gamma=0.5), True),
}


def trained(policy, compiled):
    sizes = model_registry("debugmodel", attn_backend="flex").model
    sizes.layers = sizes.layers[:3]
    with torch.device("meta"):
        model = sizes.build()
    for block in model.layers.values():  # FlexAttention has no backward on a CPU
        block.attention.inner_attention = ScaledDotProductAttention(ScaledDotProductAttention.Config())
    model = parallelize_llama(
        model,
        parallel_dims=ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1, spmd_backend="partial_dtensor"),
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        compile_config=CompileConfig(enable=compiled, backend="aot_eager"),
        ac_config=policy,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # what Gloo can
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    ids, positions = torch.randint(sizes.vocab_size, (2, 16)), torch.arange(16).expand(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(ids, positions=positions)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return model


def main():
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for name, (policy, compiled) in POLICIES.items():
        model = trained(policy, compiled)
        if policy is not None:
            assert report(model).rewritten_adds == 3
        found[name] = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
    torch.save(found, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
