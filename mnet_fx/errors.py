"""The errors that `mnet_fx` raises. All derive from `MnetError`; those that concern an argument are also `ValueError`s."""

import warnings

__all__ = ["UNCOMPILED", "InversionError", "MnetError", "MnetWarning", "SettingsError", "StreamError", "is_of_device", "warn_once"]

UNCOMPILED = (
    "mnet_fx runs momentum chains outside of the graphs of torch.compile, so that forward and backward run the same kernels: leave "
    "fullgraph=False, or compile the original model with torch.compile(model, backend='mnet_fx')"
)
"""The message of `torch.compiler.disable` on the forward and backward functions of chains."""


class MnetError(Exception):
    """Base class of every error that `mnet_fx` raises on purpose."""


class SettingsError(MnetError, ValueError):
    """An option of `momentumize` or of a region is not one that can work."""


class StreamError(MnetError, RuntimeError):
    """A tensor that reaches a region at run time is not one that it can carry, or a step changed it in place."""


class InversionError(MnetError, RuntimeError):
    """A step, or a segment outside of chains, run again in the backward pass, did not give what it gave in the forward pass, so its
    gradient would be wrong.

    Attributes:
        region: name of the region, or of the segment.
        step: index t of the step that differed; None for a segment.
        what: what differed, such as "the state before step 3" or "parameter 'm0.weight'".
        elements: number of elements of the state that differ, where the state is at hand (at the start of a chain), else None.
        largest: their largest difference in units of x, likewise.
    """

    def __init__(self, region: str, step: int | None, what: str, elements: int | None = None, largest: float | None = None) -> None:
        self.region, self.step, self.what, self.elements, self.largest = region, step, what, elements, largest
        size = "" if elements is None else f" in {elements} element(s), by up to {largest:.3g},"
        where = region if step is None else f"{region}, step {step}"
        instead = "rest='store'" if step is None else "backward='stored'"
        super().__init__(
            f"{where}: {what} differs{size} between the forward pass and its recomputation in the backward pass. "
            "The gradient of this step would be wrong, so it is not given. Likely causes: a nondeterministic operation in the step "
            "(try torch.use_deterministic_algorithms(True)); a parameter, side input or buffer changed between forward and backward "
            "(optimizer.step(), .data, load_state_dict; or the model itself, which writes to it after the chain: give the layers a "
            "clone of it); state that is no attribute of the step's modules (a random.Random, a global variable, what a global object "
            "holds, a cache into whose tensors the step writes: use_cache=False); a compiled layer of which another form ran, for a "
            "mode or stance around one of the passes, or a compilation in between (then the next call is right); on CUDA, another "
            "algorithm for the same convolution (torch.backends.cudnn.benchmark, which each thread tunes by itself; memory so low that "
            "a workspace no longer fits: torch.backends.cudnn.deterministic = True leaves fewer to choose from). Make the step "
            "repeatable, or use "
            f"{instead}."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.region, self.step, self.what, self.elements, self.largest)


class MnetWarning(UserWarning):
    """Something that works but will not give what was probably wanted."""


_TOLD: set[str] = set()


def warn_once(message: str) -> None:
    """An `MnetWarning`, once per process, from wherever it comes first."""
    if message not in _TOLD:
        _TOLD.add(message)
        warnings.warn(message, MnetWarning, stacklevel=3)


_STARTS = ("CUDA error", "CUDA driver error", "HIP error", "NCCL error")
_STATUS = ("CUBLAS_STATUS_", "CUDNN_STATUS_", "CUSOLVER_STATUS_")


def is_of_device(error: BaseException) -> bool:
    """Whether an error is about a device itself, such as an illegal access made earlier, and not about who meets it."""
    text = str(error)
    kinds = ("AcceleratorError", "DistBackendError")  # of torch 2.8, and of torch.distributed
    return type(error).__name__ in kinds or text.startswith(_STARTS) or any(status in text for status in _STATUS)
