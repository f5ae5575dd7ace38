"""Lightning: `Trainer(callbacks=[MomentumCallback("model", gamma=0.5)])`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ..api import momentumize
from ..errors import SettingsError
from ..named.marks import marked_containers
from ..reporting.build import REPORT

__all__ = ["MomentumCallback"]


class MomentumCallback(Callback):
    """Rewrites the model of a LightningModule in place, in `setup`: before the optimizers are made and the strategy wraps it.

    Args:
        attribute: of the LightningModule, that holds the model, such as "model" or "net.encoder"; None: the LightningModule itself, in
            which lists of layers are then looked for.
        options: those of `momentumize`; `regions` is "auto" by default.

    The same callback is used to resume, to validate and to test; checkpoints hold the keys of the original model.

    Raises:
        SettingsError: in `setup`: there is no such module; it is rewritten already, by someone else; without `attribute`, no list of
            layers is found; or an option cannot work, see `momentumize`.
    """

    def __init__(self, attribute: str | None = None, **options: Any) -> None:
        if "inplace" in options:
            raise SettingsError("MomentumCallback works in place: leave inplace out")
        self.attribute, self.options = attribute, {"regions": "auto"} | options
        self.report: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the beginning of fit, validate, test and predict."""
        model = self._model(pl_module)
        if self.report is None or model.__dict__.get(REPORT) is not self.report:
            self.report = momentumize(model, inplace=True, **self.options).__dict__[REPORT]

    def _model(self, pl_module: LightningModule) -> nn.Module:
        name = type(pl_module).__name__
        if self.attribute is None:
            if REPORT not in pl_module.__dict__ and self.options["regions"] == "auto" and not self._lists(pl_module):
                raise SettingsError(
                    f"no list of layers is found in {name}: name the attribute that holds the model, as in MomentumCallback('model')"
                )
            return pl_module
        try:
            return pl_module.get_submodule(self.attribute)
        except AttributeError:
            children = [child for child, _ in pl_module.named_children()]
            raise SettingsError(f"{name} has no module {self.attribute!r} when setup is called; its modules are {children}") from None

    def _lists(self, pl_module: LightningModule) -> list[str]:
        return marked_containers(pl_module, self.options.get("min_steps", 2))
