"""Hugging Face transformers: `prepare(model)`, or `MomentumCallback()` for its Trainer.

Trainer(model, args, train_dataset=data, callbacks=[MomentumCallback(gamma=0.5)])
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..api import momentumize
from ..errors import MnetWarning, SettingsError

__all__ = ["MomentumCallback", "prepare"]

RECORD = "mnet_fx"  # the entry of a model's config that holds the options


def prepare(model: nn.Module, **options: Any) -> nn.Module:
    """Rewrites a model of transformers in place, and sets it up for training without stored activations.

    Caches of keys and values are switched off (`use_cache` of its configs; what a call or `generate` asks for counts as before), and so
    is activation checkpointing, with a warning: the chains keep no activations.

    Args:
        model: a PreTrainedModel, or a PeftModel around one.
        options: those of `momentumize`; `regions` is "auto" by default. They are noted as `model.config.mnet_fx`, which `save_pretrained`
            writes and `from_pretrained` reads: `prepare(model, **model.config.mnet_fx)` makes the same network again.

    Returns:
        `model` itself. `mnet_fx.restore(model)` undoes the rewrite, and leaves the config as it then is.

    Raises:
        SettingsError: the model is rewritten already; `inplace` is given; or an option cannot work, see `momentumize`.
    """
    if "inplace" in options:
        raise SettingsError("prepare works in place: leave inplace out")
    chosen: dict[str, Any] = {"gamma": 0.9, "regions": "auto"} | options
    momentumize(model, inplace=True, **chosen)
    _no_checkpointing(model)
    for config in _configs(model):
        if getattr(config, "use_cache", None):
            config.use_cache = False
    if (config := getattr(model, "config", None)) is not None:
        _note(config, chosen)
    return model


class MomentumCallback(TrainerCallback):
    """Prepares the model of a Trainer, before it wraps or compiles it.

    Args:
        options: those of `prepare`.

    Given to the Trainer as one of its `callbacks`; also with `model_init`, and by `add_callback`. `activation_checkpointing` of the
    training arguments is switched off, with a warning.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.prepared: Any = lambda: None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """At the end of Trainer's __init__."""
        self._prepare(args, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """For a model that was made since."""
        self._prepare(args, model)

    def _prepare(self, args: Any, model: nn.Module) -> None:
        asked = [name for name in ("activation_checkpointing", "gradient_checkpointing") if getattr(args, name, None)]
        for name in asked:
            setattr(args, name, False)
        if self.prepared() is not model:
            prepare(model, **self.options)
            self.prepared = weakref.ref(model)
        if asked:
            _no_checkpointing(model, said=True)


def _no_checkpointing(model: nn.Module, said: bool = False) -> None:
    """Switches activation checkpointing off; `said`: warns even if the model itself does not have it on yet."""
    on = any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    if on:
        name = "activation_checkpointing_disable"  # since transformers 5
        switch: Any = getattr(model, name, None) or model.gradient_checkpointing_disable
        switch()
    if on or said:
        text = "activation checkpointing is switched off: the layers of a momentum chain keep no activations"
        warnings.warn(text, MnetWarning, stacklevel=3)


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a model and its parts, as T5 has a copy for each stack, and those within them."""
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            yield config
            yield from (getattr(config, name) for name in getattr(config, "sub_configs", {}))


def _note(config: Any, options: dict[str, Any]) -> None:
    """The options in a config, which is written as JSON."""
    noted = {name: value if _is_data(value) else repr(value) for name, value in options.items() if name != "example_inputs"}
    before = getattr(config, RECORD, None)
    if before is not None and before != noted:
        warnings.warn(
            f"the config of this model says that it was another momentum network, {before}: it is now {noted}", MnetWarning, stacklevel=4
        )
    setattr(config, RECORD, noted)


def _is_data(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except TypeError:
        return False
