"""`save`, `load` and `saved_options`: a net as it was trained, from its checkpoint.

A checkpoint is a state_dict of torch.save, alone or in a dictionary, or a safetensors file whose header holds the options. It is read with
weights_only=True, so that nothing of it is run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .api import momentumize
from .checkpoints import CHAINS, KEY, NETWORK, compare, expect, network_of, record_of
from .compiled.backend import check_compiled
from .errors import MnetError, SettingsError
from .named.momentum_net import MomentumNet, transform_to_momentumnet

__all__ = ["load", "save", "saved_options"]

LARGEST_HEADER = 80_000_000  # bytes; readers of safetensors refuse more than 100,000,000
TENSOR = "safetensors"
_HOLDERS = ("state_dict", "model_state_dict", "model")  # keys of a checkpoint under which people put the state_dict


def save(net: nn.Module, path: str | Path) -> None:
    """Writes the state_dict of a rewritten net, or of a module that holds some, with the options they were made with.

    Args:
        net: the module.
        path: a file; one that ends in .safetensors is of that format, with the options in its header; any other is of `torch.save`.

    Raises:
        SettingsError: the model is compiled by `torch.compile(model, backend="mnet_fx")`, which leaves no options with it.
        MnetError: the package safetensors is not installed, or read maps of more than 60 MB do not fit its header.
    """
    check_compiled(net)
    if Path(path).suffix != ".safetensors":
        torch.save(net.state_dict(), path)
        return
    records = _records(net.state_dict())
    header = {KEY: json.dumps(records, default=_encoded)} if records else {}
    if len(header.get(KEY, "")) > LARGEST_HEADER:
        raise MnetError("the read maps of this net are too large for the header of a safetensors file: write net.pt instead")
    _safetensors().save_model(net, str(path), metadata={"format": "pt"} | header)


def load(model: nn.Module, path: str | Path, **options: Any) -> nn.Module:
    """Rebuilds a net as it was trained: rewrites the model with the options that the checkpoint carries, and loads its weights.

    Args:
        model: the original model, which `momentumize` (or `transform_to_momentumnet`) was given, or a `MomentumNet`. As with
            `momentumize`, the net shares its parameters, which get the weights of the checkpoint.
        path: a file that `save` or `torch.save(net.state_dict(), path)` wrote, also of a net in DistributedDataParallel or in
            torch.compile, and with the state_dict under "state_dict", "model_state_dict" or "model".
        options: of `momentumize`, in place of those saved, such as backward="stored", or initial_velocity=module, which a net that had
            such a module needs. Those that make another network warn.

    Returns:
        The rewritten net, on the devices of the model.

    Raises:
        MnetError: the file holds no options (that of an original model; or of another tool that keeps only the tensors), or those of a
            part of the model.
        SettingsError: a module that gave v[0] is missing, or the options do not fit the model.
    """
    if Path(path).suffix == ".safetensors":
        record = _only(_records_of_header(path), path)
        net = _made(model, record, options)
        compare(record, _record(net), type(net).__name__, "the checkpoint")
        expect(record, network_of(net), type(net).__name__)
        _safetensors().load_model(net, str(path))
        return net
    state = _state_of(torch.load(path, map_location="cpu", weights_only=True), path)
    records = _records(state)
    if len(records) == 1 and (prefix := f"{next(iter(records))}.") != "." and all(key.startswith(prefix) for key in state):
        consume_prefix_in_state_dict_if_present(state, prefix)  # that of DistributedDataParallel, torch.compile and the like
        records = {"": records[prefix[:-1]]}
    net = _made(model, _only(records, path), options)
    net.load_state_dict(state)
    return net


def saved_options(source: Any, **options: Any) -> dict[str, Any]:
    """The options of a net as arguments of `momentumize`, from where they were saved.

    Args:
        source: a file as for `load`; a directory of `save_pretrained`, or its config.json; a state_dict, or a dictionary with one; or the
            config of a model of Hugging Face.
        options: those to take in place of the saved ones.

    Returns:
        A dictionary for `momentumize(model, **dictionary)`.

    Raises:
        MnetError: there are none, or those of a part of the model, or of `transform_to_momentumnet`.
        SettingsError: a module that gave v[0] is missing.
    """
    if isinstance(source, (str, Path)):
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        if Path(source).is_dir() and not path.exists():
            raise MnetError(
                f"{source} has no config.json, which would have the options: folders of adapters (LoRA) have none; keep mnet_fx_options "
                "beside it, or save the net itself by mnet_fx.save"
            )
        if path.suffix == ".json":
            records = {"": found} if (found := json.loads(path.read_text()).get(KEY)) else {}
        elif path.suffix == ".safetensors":
            records = _records_of_header(path)
        else:
            records = _records(_state_of(torch.load(path, map_location="cpu", weights_only=True), path))
    elif isinstance(source, Mapping):
        records = _records(_state_of(source, "the dictionary"))
    else:
        records = {"": found} if isinstance(found := getattr(source, KEY, None), dict) else {}
    return _keywords(_only(records, source if isinstance(source, (str, Path)) else type(source).__name__), options)


@dataclass(frozen=True)
class _Table:
    """A schedule of values that were saved."""

    schedule: str
    values: Mapping[str, list[float]]

    def __call__(self, t: int, steps: int) -> float:
        if str(steps) not in self.values:
            known = ", ".join(self.values) or "none"
            raise SettingsError(f"the checkpoint has the values of its schedule for chains of {known} steps: give gamma=the schedule")
        return self.values[str(steps)][t]


def _gamma(saved: Any) -> float | Callable[[int, int], float]:
    return _Table(saved.get("schedule", "saved"), saved["values"]) if isinstance(saved, dict) else saved


def _keywords(record: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of momentumize that a record stands for."""
    if record.get("by") != "momentumize" or record.get("transforms"):
        raise MnetError(f"these options are those of {record.get('by')}, and not of momentumize alone: use mnet_fx.load")
    found = {key: value for key, value in record.items() if key not in ("by", NETWORK)}
    found |= {"gamma": _gamma(found["gamma"]), "calibration": (found.get("calibration") or {CHAINS: None}).get(CHAINS, ...), **options}
    if found["calibration"] is ...:
        raise SettingsError(
            "the net was calibrated, and a config holds no read maps: give calibration=, from what mnet_fx.calibrate returned, or use "
            "mnet_fx.save and mnet_fx.load"
        )
    if isinstance(found["initial_velocity"], dict):
        kind = found["initial_velocity"].get("module")
        raise SettingsError(
            f"the net was trained with a module that gives v[0], a {kind}, of which the checkpoint holds the weights alone: give one of "
            "that kind as initial_velocity=module"
        )
    return found


def _made(model: nn.Module, record: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    if record.get("by") == "MomentumNet":
        if not isinstance(model, MomentumNet) or options:
            raise SettingsError(f"the checkpoint is that of a MomentumNet: give load one, without options; got a {type(model).__name__}")
        return model
    for transform in record.get("transforms", ()):
        model = transform_to_momentumnet(model, **(transform | {"gamma": _gamma(transform["gamma"])}))
    if record.get("by") == "transform_to_momentumnet":
        if options:
            raise SettingsError(f"the net was made by transform_to_momentumnet, which has no options {sorted(options)}")
        return model
    return momentumize(model, **_keywords({key: value for key, value in record.items() if key != "transforms"}, options))


def _record(net: nn.Module) -> dict[str, Any]:
    return net.mnet_fx_options if isinstance(net, MomentumNet) else record_of(net)


def _records(state: Any) -> dict[str, Any]:
    """The records of a state_dict, by the paths of the nets."""
    return dict(getattr(state, "_metadata", {}).get("", {}).get(KEY) or {})


def _records_of_header(path: str | Path) -> dict[str, Any]:
    _safetensors()
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads((file.metadata() or {}).get(KEY, "{}"), object_hook=_decoded)


def _encoded(tensor: Any) -> dict[str, str]:
    """A tensor in JSON."""
    return {TENSOR: base64.b64encode(_safetensors().save({"": tensor.contiguous()})).decode()}


def _decoded(found: dict[str, Any]) -> Any:
    return _safetensors().load(base64.b64decode(found[TENSOR]))[""] if TENSOR in found else found


def _only(records: Mapping[str, Any], source: Any) -> dict[str, Any]:
    if "" in records:
        return records[""]
    if records:
        raise MnetError(
            f"{source}: the options are those of a part of the model, {', '.join(sorted(records))}: momentumize that part with "
            "the options it had (they are in state_dict._metadata['']['mnet_fx']), put it in its place, and use load_state_dict"
        )
    raise MnetError(
        f"{source} has no options of mnet_fx: it is of an original model, or was written by something that keeps the tensors alone (write "
        "it with mnet_fx.save). Momentumize the model with the options that the weights were trained with, and use load_state_dict"
    )


def _state_of(found: Any, source: Any) -> Any:
    """The state_dict in what a file held."""
    if not isinstance(found, Mapping):
        raise MnetError(f"{source} holds a {type(found).__name__} and no state_dict")
    return next((found[key] for key in _HOLDERS if isinstance(found.get(key), Mapping)), found)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MnetError("this file needs the package safetensors: pip install safetensors") from error
    return safetensors.torch
