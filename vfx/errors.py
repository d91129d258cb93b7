"""One exception class for each kind of refusal; each message names the cause and the way out. One kind of note."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 5  # names that a note lists


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class VfxError(Exception):
    """Base class of every error that vfx raises on purpose."""


class ArgumentError(VfxError, ValueError):
    """An argument is outside its range or of the wrong kind."""


class CaptureError(VfxError):
    """torch.export could not capture the model, or the captured graph cannot be represented.

    ``details``: what torch printed meanwhile, its graph among it; the command line shows it with ``--debug``.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class ArchitectureError(VfxError):
    """Edge models (or a checkpoint and its model) do not share one architecture."""


class WeightError(VfxError):
    """A weight is NaN or infinite."""


class DataError(VfxError):
    """Calibration data are empty or do not fit the network's inputs."""


class VerificationError(VfxError):
    """A rewrite that must preserve the function did not."""


class CheckpointError(VfxError):
    """A file cannot be read safely or is not what its name says."""


class ProcessError(VfxError):
    """Another process of a run that several share ended before this one."""


class VfxNote(UserWarning):
    """Base class of what vfx says beside a result: the command line shows each as a line."""


class UncorrectedNote(VfxNote):
    """A network was merged or pruned without data, so nothing was done about what that costs."""


class ConfigNote(VfxNote):
    """A model's configuration cannot say the sizes that its layers have now."""


class CheckpointNote(VfxNote):
    """What a reader chose, stripped, left out or cast in a checkpoint that does not hold a network's tensors alone."""


class OutputError(VfxError, OSError):
    """A file cannot be written where it was asked for."""


class MissingExtraError(VfxError, ImportError):
    """A package that only some uses need is not installed; the message names the extra that installs it."""


class PassError(VfxError):
    """A pass cannot run on this Program, or its result breaks what it promises."""
