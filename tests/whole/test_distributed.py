"""Two processes of gloo: DistributedDataParallel and FSDP2 around rewritten models. Started once, they run every check of `CHECKS`.

The oracle is one process with activations stored, on the batch of both ranks.
"""

import datetime
import functools
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mnet_fx
from mnet_fx.budget.measured import measure

RANKS, BATCH, WIDTH = 2, 8, 16
KINDS = {"traced": {}, "named": {"regions": ["layers"]}}
TOLERANCE = 1e-6


class Block(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.norm, self.up, self.down, self.p = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), p

    def forward(self, x):
        return x + self.down(nn.functional.dropout(torch.tanh(self.up(self.norm(x))), self.p, self.training))


class Model(nn.Module):
    def __init__(self, depth=6, p=0.0):
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(WIDTH, WIDTH), nn.Sequential(*(Block(p) for _ in range(depth))), nn.Linear(WIDTH, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)))


def made(kind, backward="reversible", unused=False, **options):
    torch.manual_seed(0)
    model = Model(**options)
    if not unused:
        del model.unused
    return mnet_fx.momentumize(model, gamma=0.9, backward=backward, **KINDS[kind])


def batch():
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))


def mine(x, rank):
    return x.chunk(RANKS)[rank]


def step(net, x):
    """Gradients of a loss that is a mean over samples, from zero."""
    net.zero_grad()
    net(x).float().square().mean().backward()
    return net


def whole(t):
    return t.full_tensor() if isinstance(t, torch.distributed.tensor.DTensor) else t


def gradients(net):
    return {name.removeprefix("module."): None if p.grad is None else whole(p.grad).clone() for name, p in net.named_parameters()}


def assert_near(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a - b).abs().max() / b.abs().max()
            assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same_bits(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_ranks_agree(found):
    for name, t in ((name, t) for name, t in found.items() if t is not None):
        both = [torch.empty_like(t) for _ in range(RANKS)]
        dist.all_gather(both, t)
        assert torch.equal(*both), name


@functools.cache
def alone(kind, unused=False):
    """Gradients of one process on the joined batch."""
    return gradients(step(made(kind, "stored", unused), batch()))


# ---- the checks, as they run on each rank


def ddp(rank, kind, **options):
    unused = options.get("find_unused_parameters", False)
    net = DistributedDataParallel(made(kind, unused=unused), **options)
    for _ in range(3):
        step(net, mine(batch(), rank))
    assert_near(gradients(net), alone(kind, unused))
    assert_ranks_agree(gradients(net))


def ddp_no_sync(rank, kind):
    """Accumulation over two parts of a rank's batch, of which only the last is synchronised."""
    net = DistributedDataParallel(made(kind))
    step(net, mine(batch(), rank))
    net.zero_grad()
    first, second = mine(batch(), rank).chunk(2)
    with net.no_sync():
        (net(first).square().mean() / 2).backward()
    (net(second).square().mean() / 2).backward()
    assert_near(gradients(net), alone(kind))


def ddp_with_dropout(rank, kind):
    found = []
    for backward in ("reversible", "stored"):
        net = DistributedDataParallel(made(kind, backward, p=0.3))
        torch.manual_seed(rank)
        found.append(gradients(step(net, mine(batch(), rank))))
    assert_same_bits(*found)


def sharded(net, each_layer, **options):
    for layer in net.layers if each_layer else ():
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def fsdp(rank, kind, each_layer, **options):
    net = sharded(made(kind), each_layer, **options)
    for _ in range(3):
        step(net, mine(batch(), rank))
    assert_near(gradients(net), alone(kind))


def fsdp_with_dropout_and_mixed_precision(rank, kind, each_layer):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for backward in ("reversible", "stored"):
        net = sharded(made(kind, backward, p=0.3), each_layer, mp_policy=policy)
        seen = []
        net.layers[0].norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        torch.manual_seed(rank)
        found.append(gradients(step(net, mine(batch(), rank))))
        assert set(seen) == {torch.bfloat16}
    assert_same_bits(*found)


def fsdp_trains(rank, kind, each_layer):
    """Clipping and an optimiser, against one process."""
    net, single = sharded(made(kind), each_layer), made(kind, "stored")
    for model, x in ((net, mine(batch(), rank)), (single, batch())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            step(model, x)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    found, expected = ({name: whole(p).detach() for name, p in model.named_parameters()} for model in (net, single))
    assert_near(found, expected)
    assert not torch.equal(expected["head.weight"], made(kind).head.weight)
    assert sharded(made(kind), each_layer).load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(whole(net(batch())), single(batch()), rtol=1e-5, atol=1e-5)


def fsdp_gathers(rank):
    """Each layer's weights are gathered twice, for the forward pass and for the backward pass, in which it runs again; the root's once."""
    for backward in ("stored", "reversible"):
        net = sharded(made("named", backward), each_layer=True)
        step(net, mine(batch(), rank))  # the first call of FSDP2 does more
        with torch.profiler.profile() as seen:
            step(net, mine(batch(), rank))
        found = {event.key: event.count for event in seen.key_averages()}
        assert found["c10d::_allgather_base_"] == 2 * len(net.layers) + 1
        assert found["c10d::_reduce_scatter_base_"] == len(net.layers) + 1


def fsdp_around_layers_of_a_traced_region(rank):
    """The hooks of fully_shard break Dynamo's graph between the layers, and that is said; regions=[...] serve there."""
    net = sharded(made("traced"), each_layer=True)
    with pytest.warns(mnet_fx.MnetWarning, match="breaks its graph|no residual chain was rewritten"):
        net(batch())


def fsdp_backward_twice(rank):
    """Works with fully_shard on the root; around single layers, a layer that must run again may be sharded by then."""
    for kind in KINDS:
        net = sharded(made(kind), each_layer=False)
        loss = net(mine(batch(), rank)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        assert_near({name: g / 2 for name, g in gradients(net).items()}, alone(kind))
    net = sharded(made("named"), each_layer=True)
    loss = net(mine(batch(), rank)).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(mnet_fx.InversionError, match=r"layers\.0\.norm\.weight', whose memory was freed"):
        loss.backward()


def options_travel(rank, wrap):
    """A state_dict of a wrapped net carries the options, and a net with others warns."""
    state = wrap(made("named")).state_dict()
    wrap(made("named")).load_state_dict(state)  # no warning
    other = mnet_fx.momentumize(made("named"), regions=["layers"], gamma=0.25)
    with pytest.warns(mnet_fx.MnetWarning, match="gamma=0.25"):
        wrap(other).load_state_dict(state)


def memory(wrap, depth, x):
    """Bytes kept after the forward pass, and the peak."""
    net = wrap(made("named", depth=depth))
    for _ in range(2):
        step(net, x)
    return measure(lambda: net(x).square().mean(), torch.Tensor.backward)


def memory_saved(rank, wrap):
    """Neither kept bytes nor the peak grow with depth, but for parameters and gradients on their way between the ranks."""
    x, (shallow, deep) = batch().repeat(64, 1), (4, 16)
    few, many = memory(wrap, shallow, x), memory(wrap, deep, x)
    parameters = (deep - shallow) * sum(p.nbytes for p in Block().parameters())
    assert many.kept <= few.kept + parameters, (few, many)
    assert many.peak <= few.peak + parameters, (few, many)
    assert many.kept < deep * x.nbytes  # a checkpoint of each layer
    assert parameters < 0.2 * (deep - shallow) * x.nbytes  # so that this slack hides no activations


CHECKS = {
    **{
        f"ddp {kind} {' '.join(options)}": functools.partial(ddp, kind=kind, **options)
        for kind in KINDS
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True})
    },
    **{f"ddp no_sync {kind}": functools.partial(ddp_no_sync, kind=kind) for kind in KINDS},
    **{f"ddp dropout {kind}": functools.partial(ddp_with_dropout, kind=kind) for kind in KINDS},
    **{
        f"{check.__name__} {kind} {'each layer' if each_layer else 'root'}": functools.partial(check, kind=kind, each_layer=each_layer)
        for check in (fsdp, fsdp_with_dropout_and_mixed_precision, fsdp_trains)
        for kind, each_layer in (("traced", False), ("named", False), ("named", True))
    },
    "fsdp traced each layer": fsdp_around_layers_of_a_traced_region,
    "fsdp backward twice": fsdp_backward_twice,
    "fsdp gathers": fsdp_gathers,
    "options ddp": functools.partial(options_travel, wrap=DistributedDataParallel),
    "options fsdp": functools.partial(options_travel, wrap=functools.partial(sharded, each_layer=True)),
    "memory ddp": functools.partial(memory_saved, wrap=DistributedDataParallel),
    "memory fsdp": functools.partial(memory_saved, wrap=functools.partial(sharded, each_layer=True)),
}


def work(rank, folder):
    """One process: runs every check and writes down which failed, and how."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", mnet_fx.MnetWarning)
    store, limit = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
    failures = {}
    for name, check in CHECKS.items():
        try:
            check(rank)
        except Exception:
            failures[name] = traceback.format_exc()
        dist.barrier()
    dist.destroy_process_group()
    torch.save(failures, f"{folder}/{rank}")


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(failures, name):
    assert not any(name in found for found in failures), "\n".join(found[name] for found in failures if name in found)


def test_the_torchrun_example_of_the_documentation(tmp_path):
    page = (Path(__file__).parent.parent.parent / "docs" / "distributed.md").read_text()
    script = re.search(r"```python\n(# train\.py.*?)```", page, re.DOTALL)
    assert script is not None
    (tmp_path / "train.py").write_text(script[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    losses = [float(line) for line in found.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9 prints on stdout
    assert losses[-1] < losses[0]
