"""`momentumize`: the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .budget.planning import plan
from .errors import SettingsError
from .inner import Inner
from .rewrite import momentum_network
from .settings import Backward, Gamma, Granularity, OnDrift, Precision, Rest, Weights

__all__ = ["momentumize"]


def momentumize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    initial_velocity: str | nn.Module = "zero",
    weights: Weights = "momentum",
    granularity: Granularity = "add",
    regions: Sequence[str] | Literal["auto"] | None = None,
    backward: Backward = "reversible",
    min_steps: int = 2,
    on_drift: OnDrift = "raise",
    precision: Precision = "standard",
    rest: Rest = "store",
    inner: Inner = "eager",
    calibration: Any = None,
    keep: str | int = 0,
    memory: str | float | None = None,
    offload: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Rewrites the residual chains of a model into reversible momentum chains, which train without stored activations.

        x[t+1] = x[t] + f[t](x[t])   becomes   v[t+1] = g[t] * v[t] + b[t] * f[t](x[t]);  x[t+1] = x[t] + v[t+1]

    The result is another network that starts from the same weights, except with gamma=0, which computes the original one. Gradients are
    exact: bit for bit those that `backward="stored"` gives.

    Args:
        model: any module; left as it was. The result shares its parameters and buffers, and has the same `state_dict` keys.
        example_inputs: a call of the model, as a tuple of positional arguments or a dict (or other mapping) of keyword arguments, of which
            only structure, shapes, dtypes and constants count: tensors may be real, fake, or on the meta device. With them, the model is
            captured now, in train and in eval mode, without computing anything, and the report is complete. Without, each kind of call
            is captured when it first comes, and the report is a preview until then.
        gamma: momentum g[t] in [0, 1): a number, or a callable `(t, steps) -> number`. Near 1 a region keeps fewest bits; near 0 the
            network stays closest to the original.
        initial_velocity: "zero": v[0] = 0; "first": v[0] = 0 and g[0] = 0, so that the chain starts at the speed of its first residual; or
            a module that gives v[0] from x[0]. That module becomes `net.initial_velocity`; its parameters come last in the state_dict.
        weights: "momentum": b[t] = 1 - g[t], as in the paper; "matched": those with which the chain stays closest to the original network
            (needs v[0] = 0); "signed": the same, and after each step every channel of v gets a sign by a fair coin (always the same ones),
            so that errors add up less: at the same bits closer to some pretrained networks where gamma is small, or with `calibrate`.
            Steps then run without the kernels for CPUs and GPUs.
        granularity: "add": a step for each residual add; "module": a step for each repeated block (one for a transformer layer, not two);
            a number k: for every k of these blocks, where that leaves a chain two steps. Fewer, larger steps put aside fewer bits at the
            same gamma, and at equal total bits are closer to the original; the backward pass holds the activations of a whole step.
        regions: paths of containers (ModuleList, Sequential) whose layers the model calls one after the other, such as
            ["encoder.layers"]. Then nothing is captured: each of those layers becomes a step of a chain, f(x) = layer(x) - x, whatever
            Python is in it and around it, and the rest of the model stays as it is. A layer takes the stream as its first tensor and
            returns it, alone or first in a tuple. Layers may be skipped; elsewhere a chain starts anew. Layers that join the container
            later stay as they are. example_inputs, granularity and min_steps have no meaning then. "auto": the lists of layers that
            the model's own library marks (transformers, timm, torch.nn), or else its ModuleLists of equal blocks, with at least `min_steps`
            layers; `net.report` lists them, and a call in which a layer does not take what the one before it returned is a StreamError.
            Where there are none, the model is captured, as without regions.
        backward: "reversible"; or "stored": the same forward, bit for bit, with activations stored by autograd.
        min_steps: shorter chains are left alone.
        on_drift: what to do when a step does not repeat in the backward: "raise" InversionError, "warn", or "ignore" (no check is made).
        precision: "standard": the forward pass errs no more than one in the dtype of the stream, relative to its largest value; "high":
            also where elements never mix and small ones grow, for 16 bytes per element in place of 12 (8 for 16-bit streams).
        rest: what becomes of what lies outside of chains (stems, projections, decoders, heads): "store": autograd keeps what it needs;
            "checkpoint": it runs under checkpoints, in segments, cut where fewest bytes cross, proved as steps are; with
            regions, module by module, and `net.report` lists these.
        inner: what runs the steps and everything between the chains: "eager", as the model itself would; or "inductor", any backend of
            torch.compile by name, or a callable of that kind, which compiles each step once. With regions, it compiles their layers, as
            `layer.compile(...)` of each does afterwards, which takes more options.
        calibration: read maps that `calibrate` fitted for a net of this model and these options: what it returned, or the `maps` of that.
        keep: bytes of activations that may be kept, as a number or a text such as "2GiB", so that less is run again: the last steps of
            chains, and segments of a rest under "checkpoint", whichever saves most work for its bytes. Gradients are the same to the bit.
        memory: in place of rest and keep: the bytes that forward and backward may take at their peak, with parameters, gradients and
            inputs; or a number below 1, relative to what plain training takes. Then `plan` chooses both, for a call like example_inputs,
            which it needs.
        offload: whether a chain on CUDA that waits for its backward pass leaves its state in pinned memory of the host: x, u and what was
            spilled, copied beside what comes after the chain, and back when the backward pass comes to it. Saves memory while a head, or
            another chain, is at work. Chains that are short enough to keep their inputs keep those where they are, and so does a CPU.
        inplace: rewrite the model itself and return it, for code that cannot put another in its place. `mnet_fx.restore(model)` undoes
            it. After an error the model is as it was. For no GraphModule, and no model that is rewritten already.

    Returns:
        A module of the class of `model` whose `forward` is captured by Dynamo and rewritten; `net.report`, or `mnet_fx.report(net)` where
        the model has an attribute of that name, says what was done. A model without residual chains works as before, with a warning. A
        `torch.fx.GraphModule` is rewritten as it is, into one that prints, pickles and traces. `net.mnet_fx_options` has the options, by
        name; a state_dict carries them as metadata, `mnet_fx.load` rebuilds the net with them, and a net with others warns.

    Raises:
        SettingsError: an option cannot work, or example_inputs do not fit the model.
        MnetError: `memory` is less than it takes; or the model cannot be copied, is a ScriptModule, or has lazy parameters. Calls of the
            result raise it where they would compute the original network (Dynamo is switched off, or leaves the forward to Python), or
            another momentum network than the first call did.

    Source: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, eq. 2.
    """
    options: dict[str, Any] = {"gamma": gamma, "initial_velocity": initial_velocity, "weights": weights, "granularity": granularity}
    options |= {"backward": backward, "min_steps": min_steps, "on_drift": on_drift, "precision": precision, "calibration": calibration}
    options["offload"] = offload
    if memory is None:
        options |= {"rest": rest, "keep": keep}
    elif rest != "store" or keep != 0 or regions is not None or backward != "reversible":
        raise SettingsError("memory chooses rest and keep, for captured models with backward='reversible': leave these and regions out")
    else:
        options = plan(model, example_inputs, memory=memory, **options).options
    return momentum_network(model, example_inputs, regions=regions, inner=inner, inplace=inplace, **options)
