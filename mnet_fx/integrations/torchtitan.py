"""torchtitan: `activation_checkpoint=MomentumAC.Config(gamma=0.5)` in a function of a config registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing
from torchtitan.tools.logging import logger

from ..api import momentumize
from ..errors import SettingsError
from ..settings import Backward, OnDrift, Precision, Rest, Weights

__all__ = ["MomentumAC"]


class MomentumAC(ActivationCheckpointing):
    """The transformer blocks of a model as the steps of a momentum chain, in place of activation checkpointing.

    A policy like `FullAC`: torchtitan applies it to the model on the meta device, before it compiles and shards the blocks. The model is
    rewritten in place, its state_dict keeps its keys. Another network is trained than without it, except with gamma=0.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ActivationCheckpointing.Config):
        """The options of `momentumize` that have a meaning for a list of blocks; those of checkpointing keep their defaults."""

        gamma: float = 0.9
        """Momentum in [0, 1). Near 1 a block keeps fewest bits; near 0 the network stays closest to the original."""

        weights: Weights = "momentum"
        """What f is multiplied by: 1 - gamma, as in the paper, or "matched" to the original network."""

        backward: Backward = "reversible"
        """Or "stored": the same network with stored activations."""

        on_drift: OnDrift = "raise"
        """What to do when a block does not repeat in the backward pass."""

        precision: Precision = "standard"
        """Or "high": where small elements of a stream grow."""

        rest: Rest = "store"
        """Or "checkpoint": for what lies outside of the blocks."""

        offload: bool = False
        """Whether the blocks leave their state on the host while the chain waits for its backward pass."""

    def apply(self, model: nn.Module) -> None:
        """Rewrites `model.layers` in place.

        Raises:
            SettingsError: an option of checkpointing was changed, or one of `momentumize` cannot work.
        """
        config = cast("MomentumAC.Config", self.config)
        if (config.preserve_rng_state, config.determinism_check, config.debug) != (True, "default", False):
            raise SettingsError(
                "preserve_rng_state, determinism_check and debug belong to checkpointing: a momentum chain restores the state of the "
                "generators and proves each block's rerun by itself (see on_drift); leave them as they are"
            )
        options = {name: getattr(config, name) for name in ("gamma", "weights", "backward", "on_drift", "precision", "rest", "offload")}
        momentumize(model, inplace=True, regions=["layers"], **options)
        logger.info(f"Rewrote the layers to a momentum chain with gamma {config.gamma}")
