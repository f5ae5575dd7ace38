"""Hugging Face transformers: `prepare(model)`, or `MomentumCallback()` for its Trainer.

Trainer(model, args, train_dataset=data, callbacks=[MomentumCallback(gamma=0.5)])
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..api import momentumize
from ..errors import MnetWarning, SettingsError

__all__ = ["MomentumCallback", "prepare"]


def prepare(model: nn.Module, **options: Any) -> nn.Module:
    """Rewrites a model of transformers in place, and sets it up for training without stored activations.

    Caches of keys and values are switched off (`use_cache` of its configs; what a call or `generate` asks for counts as before), and so
    is activation checkpointing, with a warning: the chains keep no activations.

    Args:
        model: a PreTrainedModel, or a PeftModel around one.
        options: those of `momentumize`; `regions` is "auto" by default. `save_pretrained` writes them with the config:
            `prepare(model, **mnet_fx.saved_options(model.config))` makes the same network of what `from_pretrained` returns.

    Returns:
        `model` itself. `mnet_fx.restore(model)` undoes the rewrite; `use_cache` stays as it then is.

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
