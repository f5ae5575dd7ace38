"""A plugin for axolotl: fine-tune without stored activations, by three lines of its YAML. Lay it beside the config, or on PYTHONPATH.

    plugins: [axolotl_plugin.MomentumPlugin]
    momentum: {gamma: 0.1, weights: matched}     # options of mnet_fx.momentumize
    gradient_checkpointing: false

Written for axolotl 0.19 (https://docs.axolotl.ai); its plugins get the model to change it, so it is rewritten in place.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import mnet_fx
from mnet_fx.integrations.transformers import prepare


class MomentumArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    momentum: dict[str, Any] | None = None


class MomentumPlugin(BasePlugin):
    """Rewrites the layers of the model once it is there, adapters included."""

    def get_input_args(self) -> str:
        return f"{__name__}.MomentumArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """
        Raises:
            SettingsError: activation checkpointing is on as well, or an option cannot work.
        """
        if cfg.gradient_checkpointing or cfg.activation_offloading:
            raise mnet_fx.SettingsError(
                "momentum chains keep no activations: set gradient_checkpointing: false, and leave activation_offloading out"
            )
        prepare(model, **(cfg.momentum or {}))
