"""Lightning: `Trainer(callbacks=[MomentumCallback("model", gamma=0.5), EstimatedBatchSizeFinder("16GiB")])`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities.parsing import lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..api import momentumize
from ..budget.faking import batch_of, fake_model, fake_optimizer, resized
from ..budget.fitting import largest_batch
from ..budget.sizes import parsed, shown
from ..budget.ways import default_loss, taken
from ..errors import MnetError, SettingsError
from ..named.marks import marked_containers
from ..reporting.build import REPORT

__all__ = ["EstimatedBatchSizeFinder", "MomentumCallback"]


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


class EstimatedBatchSizeFinder(BatchSizeFinder):
    """Lightning's `BatchSizeFinder`, which asks for no memory: the largest batch whose training step fits is found by an estimate.

    At the beginning of fit, the step of the LightningModule, as it is then, runs on tensors without memory for one batch after another,
    as `mnet_fx.estimate` does: with its loss, the trainer's precision and the optimizer. Nothing is computed, and no run ends for want
    of memory. The attribute that holds the batch size is set, and dataloaders are made again.

    Args:
        memory: bytes that there are, as a number or a text such as "16GiB"; None: what of the GPU's memory is free when fit begins.
        batch_arg_name: the attribute of the LightningModule, its `hparams` or the datamodule that holds the batch size, and that the
            dataloaders are made with.
        margin: part of `memory` that stays free, between 0 and 1: for work space of cuDNN and fragmentation, of which nothing is known.
        max_val: the largest batch size to answer; one epoch's data are the largest in any case.

    `optimal_batch_size` is what was found. Only training counts; validation, test and prediction leave the batch size alone. As with
    Lightning's own, dataloaders must be those of the LightningModule or of a datamodule, and strategies over several processes are
    refused by it.

    Raises:
        SettingsError: no memory is given and there is no GPU; margin; several optimizers, or manual optimization.
        MnetError: at fit: not even one row fits; or the training step asks for values of tensors, so that nothing can be estimated.
    """

    def __init__(
        self, memory: str | int | None = None, *, batch_arg_name: str = "batch_size", margin: float = 0.05, max_val: int = 1 << 20
    ) -> None:
        if not 0 <= margin < 1:
            raise SettingsError(f"margin must be at least 0 and less than 1, got {margin!r}")
        super().__init__(batch_arg_name=batch_arg_name, margin=margin, max_val=max_val)
        self.memory = None if memory is None else parsed(memory)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the batch size of training and sets it."""
        if not trainer.training:
            return
        with isolate_rng():
            step = _Step(trainer, pl_module, _first_batch(trainer))
            memory, said = int(self._available(trainer) * (1 - self._margin)), list[str]()
            first = step.bytes_with(step.batch)
            fits = largest_batch(step.bytes_with, {step.batch: first}, memory, said)
        for sentence in said:
            rank_zero_warn(sentence)
        if not fits:
            raise MnetError(f"not one row fits in {shown(memory)}: a training step with {step.batch} takes {shown(first)}")
        found = min(fits, self._max_val, _rows(trainer))
        rank_zero_info(f"A training step fits in {shown(memory)} with a batch of up to {fits}; {self._batch_arg_name} is {found} now.")
        lightning_setattr(pl_module, self._batch_arg_name, found)
        self.optimal_batch_size = found
        trainer.fit_loop._combined_loader = None  # made again with the new size, as Lightning's own finder does
        trainer.fit_loop.setup_data()

    def _available(self, trainer: Trainer) -> int:
        device = trainer.strategy.root_device
        if self.memory is not None:
            return self.memory
        if device.type != "cuda":
            raise SettingsError(f"EstimatedBatchSizeFinder: how much memory is there on {device}? Give it, as in memory='16GiB'")
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


class _Step:
    """The training step of a LightningModule on tensors without memory.

    Attributes:
        batch: rows of the batch that was given.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        optimizers = trainer.optimizers
        if not module.automatic_optimization or len(optimizers) != 1:
            raise SettingsError(
                f"EstimatedBatchSizeFinder needs automatic optimization with one optimizer; {type(module).__name__} has {len(optimizers)}"
                f"{'' if module.automatic_optimization else ', and manual optimization'}: use Lightning's BatchSizeFinder"
            )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tensors: list[Tensor] = []
        apply_to_collection(batch, Tensor, self.tensors.append)
        rows = batch_of((tuple(self.tensors), {})) if self.tensors else None
        if rows is None:
            raise MnetError(f"a batch of the dataloader is {batch!r:.80}, whose first tensor has no dimension that could be the batch")
        self.batch = rows
        self.net = _Called(fake_model(module, self.mode, [trainer]), batch, trainer.precision_plugin.train_step_context)
        self.optimizer = partial(fake_optimizer, optimizers[0], module)

    def bytes_with(self, batch: int) -> int:
        """The most that a step with so many rows allocates, parameters, gradients and the optimizer's state included."""
        call = resized((tuple(self.tensors), {}), batch, self.mode)
        try:
            return taken("momentum", self.net, call, self.mode, default_loss, self.optimizer, None).way.total_bytes
        except MnetError as error:
            raise MnetError(f"{error}; or use Lightning's BatchSizeFinder, which runs the step") from error


class _Called(nn.Module):
    """(The tensors of a batch) -> what `training_step` returns; what it logs goes nowhere."""

    def __init__(self, module: Any, batch: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.module, self._batch, self._context = module, batch, context
        module.log = module.log_dict = _nowhere

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        batch = apply_to_collection(self._batch, Tensor, lambda _: next(given))
        step: Any = self.module.training_step
        index = (0,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
        with self._context():
            return step(batch, *index)


def _nowhere(*args: Any, **kwargs: Any) -> None:
    """In place of `log` and `log_dict`."""


def _first_batch(trainer: Trainer) -> Any:
    """Of the training data, on the trainer's device; dataloaders are made again afterwards."""
    trainer.fit_loop.setup_data()
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    try:
        batch, _, _ = next(iter(loader))
    except StopIteration:
        raise MnetError("the training dataloader is empty") from None
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _rows(trainer: Trainer) -> int:
    """Of an epoch's data; where nobody knows, any number."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    try:
        return int(loader._dataset_length())
    except NotImplementedError:
        return sys.maxsize
