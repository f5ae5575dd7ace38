"""Options travel with the checkpoint: as metadata of the state_dict, never among its keys, and in the config of Hugging Face models.

    net.state_dict()._metadata[path of the net]      {"mnet_fx": {"": record}}          torch.save and torch.load keep it
                              [modules above it]     {"mnet_fx": {path below: record}}  so that any net on the way down meets it
                              [modules inside it]    {"mnet_fx_within": record}         likewise on the way up
    net.config.mnet_fx                               record                             what save_pretrained writes

A record is plain data, fit for JSON and for torch.load(weights_only=True). Nothing of a checkpoint is imported or run: a schedule is the
list of its values.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .errors import MnetWarning
from .read_maps import Maps, data_of, fingerprint
from .reporting.build import report_of
from .settings import Settings

__all__ = [
    "CHAINS",
    "KEY",
    "NETWORK",
    "OPTIONS",
    "OTHER",
    "attach",
    "check",
    "compare",
    "detach",
    "gamma_record",
    "note",
    "record_of",
    "remember_transform",
]

log = logging.getLogger("mnet_fx")

KEY, WITHIN = "mnet_fx", "mnet_fx_within"  # in metadata
OPTIONS = "mnet_fx_options"  # where a net keeps the arguments of momentumize
TRANSFORMS = "_mnet_fx_transforms"  # and those of transform_to_momentumnet
CHAINS = "chains"  # where the record of a calibration has its maps
NETWORK = "network"  # which chains its captures found
OTHER = (
    "the checkpoint says that the weights were trained in other chains, as of another kind of call, depth or graph break, than this net "
    "has: another network. Load them before the first call, make that in train mode, or name the layers with regions=[...]"
)
# These decide how a network is computed, not which:
INDIFFERENT = (NETWORK, "backward", "inner", "on_drift", "precision", "rest", "keep", "offload")


def attach(net: nn.Module, settings: Settings, regions: Sequence[str] | None, **more: Any) -> None:
    """Notes the options that a net was made with, has its state_dicts carry them, and its load_state_dict compare.

    Args:
        net: what `momentumize` made, with its report.
        settings: its options; and the others that had a meaning.
        regions: paths of containers, or None.
        more: further options.
    """
    without = () if regions is None else ("granularity", "min_steps", "keep")  # these have no meaning then
    options = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in without}
    net.__dict__[OPTIONS] = options | {"regions": None if regions is None else list(regions)} | more
    _hook(net)
    known = getattr(_config(net)[0], KEY, None)
    record = note_config(net)
    if isinstance(known, dict) and record is not None:
        compare(known, record, type(net).__name__, "the config")


def note_config(net: nn.Module) -> dict[str, Any] | None:
    """Puts the options of a net into the config of its model, if that is one of Hugging Face. The values of read maps have no place there.

    Returns:
        The record; None without a config.
    """
    config, path = _config(net)
    if config is None:
        return None
    record = {key: value for key, value in record_of(net).items() if key != NETWORK}
    if record.get("calibration"):
        record["calibration"] = {key: value for key, value in record["calibration"].items() if key != CHAINS}
    if record.get("regions"):
        record["regions"] = [region.removeprefix(path) for region in record["regions"]]
    config.mnet_fx = record
    return record


def remember_transform(net: nn.Module, **options: Any) -> None:
    """Notes a call of transform_to_momentumnet, likewise."""
    net.__dict__[TRANSFORMS] = [*net.__dict__.get(TRANSFORMS, ()), options]
    _hook(net)


def detach(net: nn.Module) -> None:
    """Takes back what `attach` did, where a net is momentumized again."""
    config, _ = _config(net)
    if net.__dict__.pop(OPTIONS, None) is not None and isinstance(getattr(config, KEY, None), dict):
        delattr(config, KEY)
    if TRANSFORMS not in net.__dict__:
        _unhook(net)


def _config(net: nn.Module) -> tuple[Any, str]:
    """The config of a model of Hugging Face, and the path of the module in `net` that has it, as in PEFT's wrappers."""
    config = getattr(net, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(config, "save_pretrained")):
        return None, ""
    path = next((path for path, module in net.named_modules() if vars(module).get("config") is config), "")
    return config, path and f"{path}."


def record_of(net: nn.Module) -> dict[str, Any]:
    """The options of a net as plain data."""
    options = net.__dict__.get(OPTIONS)
    lengths = {region.steps for region in report_of(net).regions} if options and callable(options["gamma"]) else set()
    network = getattr(network_of(net), "record", None)
    return _record(options, net.__dict__.get(TRANSFORMS), lengths) | ({} if network is None else {NETWORK: network})


def network_of(net: nn.Module) -> Any:
    """What the captures of a net found, where there is one that is captured."""
    return getattr(net.__dict__.get("forward"), "network", None)


def note(state_dict: Any, prefix: str, record: dict[str, Any]) -> None:
    """Puts the record of the net at `prefix` into the metadata of a state_dict."""
    path = prefix[:-1]
    for other, entry in getattr(state_dict, "_metadata", {}).items():
        if other == path or not other or path.startswith(f"{other}."):
            entry.setdefault(KEY, {})[path[len(other) :].lstrip(".")] = record
        elif other.startswith(prefix):
            entry.setdefault(WITHIN, record)


def check(metadata: Mapping[str, Any], prefix: str, record: dict[str, Any], name: str) -> None:
    """Compares what a checkpoint says of the module at `prefix` with the record of the net that is there."""
    found, within, where = metadata.get(KEY) or {}, metadata.get(WITHIN), prefix[:-1] or name
    if "" in found:
        compare(found[""], record, where, "the checkpoint")
    elif within is not None or found:
        what = f"a model whose {' and '.join(sorted(found))} alone was rewritten" if found else "a net of which this was but a part"
        _warn(f"{where}: the checkpoint is that of {what}, so this may be another network than was trained")
    else:
        log.info("%s: the checkpoint has no options of mnet_fx: weights of an original network, or saved without metadata", where)


def compare(saved: Mapping[str, Any], record: Mapping[str, Any], name: str, source: str) -> None:
    """Warns if two records are those of different networks.

    Args:
        saved: the record found.
        record: that of the net.
        name: of the net.
        source: where `saved` was found.
    """
    keys = [key for key in sorted({*saved, *record}) if key not in INDIFFERENT and not _same(key, saved.get(key), record.get(key))]
    if keys:
        then, now = (", ".join(f"{key}={_shown(options.get(key))}" for key in keys) for options in (saved, record))
        _warn(
            f"{name}: {source} says that the weights were trained with {then}; this net has {now}, which makes another network of them: "
            "rebuild it as it was with mnet_fx.load(model, path), or momentumize with the options it had"
        )


def expect(saved: Mapping[str, Any], network: Any, name: str) -> None:
    """Has a net find the chains that a record has; warns if it was captured before, and found others."""
    if network is not None and NETWORK in saved and not network.expect(saved[NETWORK]):
        _warn(f"{name}: {OTHER}")


def _warn(text: str) -> None:
    warnings.warn(text, MnetWarning, stacklevel=6)


def _record(options: Mapping[str, Any] | None, transforms: Any, lengths: set[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"by": "transform_to_momentumnet" if options is None else "momentumize"}
    if options is not None:
        found |= {key: _plain(value) for key, value in options.items()}
        found["gamma"] = gamma_record(options["gamma"], lengths)
        found["calibration"] = _calibration_record(options["calibration"])
        found["regions"] = None if options["regions"] is None else sorted(options["regions"])
    return found | ({"transforms": transforms} if transforms else {})


def _calibration_record(maps: Maps) -> dict[str, Any] | None:
    return {"fingerprint": fingerprint(maps), CHAINS: data_of(maps)} if any(map(any, maps.values())) else None


def _plain(value: Any) -> Any:
    """A module by its class, a function by its name."""
    if isinstance(value, nn.Module):
        return {"module": f"{type(value).__module__}.{type(value).__qualname__}"}
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value


def gamma_record(gamma: Any, lengths: set[int]) -> Any:
    """A number, or what a schedule gives for chains of these lengths."""
    if not callable(gamma):
        return float(gamma)
    function = getattr(gamma, "function", gamma)
    name = getattr(function, "schedule", None) or getattr(function, "__qualname__", type(function).__name__)
    return {"schedule": name, "values": {str(n): values for n in sorted(lengths) if (values := _values(gamma, n)) is not None}}


def _values(gamma: Any, steps: int) -> list[float] | None:
    try:
        return [float(gamma(t, steps)) for t in range(steps)]
    except Exception:  # a schedule need not be one for the chains of another net
        return None


def _same(key: str, saved: Any, own: Any) -> bool:
    if key == "calibration":
        return (saved or {}).get("fingerprint") == (own or {}).get("fingerprint")
    if key != "gamma" or not (isinstance(saved, dict) or isinstance(own, dict)):
        return bool(saved == own)
    tables = [gamma.get("values", {}) if isinstance(gamma, dict) else None for gamma in (saved, own)]
    lengths = set.intersection(*(set(table) for table in tables if table is not None))
    if not lengths:
        return isinstance(saved, dict) and isinstance(own, dict) and saved.get("schedule") == own.get("schedule")
    values = [[[gamma] * int(n) if table is None else table[n] for n in lengths] for gamma, table in zip((saved, own), tables, strict=True)]
    return values[0] == values[1]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "schedule" in value:
        return f"the schedule {value['schedule']} ({'; '.join(map(str, value.get('values', {}).values()))})"
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "; ".join(f"({', '.join(f'{key}={_shown(inner)}' for key, inner in item.items())})" for item in value)
    if isinstance(value, dict) and "fingerprint" in value:
        return f"the maps of SHA-256 {value['fingerprint'][:12]}..."
    return f"a {value['module']}" if isinstance(value, dict) and "module" in value else repr(value)


@dataclass(frozen=True)
class _Check:
    """What load_state_dict calls. Holds the options and not the net, which shallow copies outlive; and the report, until it is pickled."""

    options: Mapping[str, Any] | None
    transforms: Any
    name: str
    report: Any = None
    network: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Check:
        return type(self)(*(copy.deepcopy(value, memo) for value in vars(self).values()))

    def __getstate__(self) -> dict[str, Any]:
        gamma = None if self.options is None else self.options["gamma"]
        if callable(gamma) and self.report is not None:  # a schedule that cannot be pickled remembers what it gave
            gamma_record(gamma, {region.steps for region in self.report.regions})
        return self.__dict__ | {"report": None}

    def __call__(self, state_dict: Any, prefix: str, local_metadata: Mapping[str, Any], *rest: Any) -> None:
        own = (local_metadata.get(KEY) or {}).get("", {})
        saved = own.get("gamma")
        lengths = set(map(int, saved.get("values", {}))) if isinstance(saved, dict) else set()
        check(local_metadata, prefix, _record(self.options, self.transforms, lengths), self.name)
        expect(own, self.network, prefix[:-1] or self.name)


def _noted(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    note(state_dict, prefix, record_of(module))


def _ours(hook: Any) -> bool:
    return hook is _noted or isinstance(getattr(hook, "hook", None), _Check)


def _unhook(net: nn.Module) -> None:
    for hooks in (net._state_dict_hooks, net._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if _ours(hook)]:
            del hooks[key]


def _hook(net: nn.Module) -> None:
    _unhook(net)
    net.register_state_dict_post_hook(_noted)
    check = _Check(net.__dict__.get(OPTIONS), net.__dict__.get(TRANSFORMS), type(net).__name__, report_of(net), network_of(net))
    net._register_load_state_dict_pre_hook(check)  # the public one wraps a weak reference to the net, which fails in shallow copies
