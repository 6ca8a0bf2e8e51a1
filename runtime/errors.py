"""Every error a user can cause, in one tree.

    SeqbuildError
    ├── UsageError          an invalid option or argument
    ├── ModelError          a model that does not exist, has no config, or cannot be built
    ├── TargetError         a sequential target that does not exist, is never called, or conflicts
    ├── TraceError          model code that cannot be recorded
    ├── ArtifactError       an artifact that is damaged, from an unknown version, or breaks the rules for its code
    ├── SignatureError      an artifact without a signature, or whose signature does not match the key or the content
    ├── VersionError        the host's libraries are not the ones the artifact was compiled with
    ├── WeightsError        a checkpoint that does not match the artifact
    ├── DataError           calibration or evaluation data that is empty, too short or out of vocabulary
    ├── RecipeError         a recipe that cannot be read or has an unsupported option
    ├── PatternError        a regular expression that is invalid or takes too long
    ├── OutputError         an output location that is in use, not empty, full or not writable
    ├── DeviceError         a device that is not available
    ├── PlanError           a run that does not fit into memory or onto the disk
    ├── WorkerError         another worker of the run that failed, died, or does not respond
    └── QuantizationError   numbers that an algorithm cannot use, such as a Hessian that is not finite

The message is one sentence that names the offending value; `hint` says what to do next. Command lines print
both on one line and exit with code 2. Any other exception is a bug of this project and shows its traceback.
This module imports nothing, so that every part of the project can import it at no cost.
"""

from __future__ import annotations


class SeqbuildError(Exception):
    """Base class of all errors that the user can fix.

    Args:
        message: the problem, naming the offending value.
        hint: what to do next; empty if the message already says it.
        is_resumable: whether a run that it ends can continue with `--resume` afterwards.
    """

    def __init__(self, message: str, *, hint: str = "", is_resumable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.is_resumable = is_resumable

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SeqbuildError):
    """An invalid option or argument."""


class ModelError(SeqbuildError):
    """A model that does not exist, has no config, or cannot be built."""


class TargetError(SeqbuildError):
    """A sequential target that does not exist, is never called, or conflicts with another request."""


class TraceError(SeqbuildError):
    """Model code that cannot be recorded."""


class ArtifactError(SeqbuildError):
    """An artifact that is damaged, of an unknown version, or breaks the rules for its code."""


class SignatureError(SeqbuildError):
    """An artifact without a signature, or whose signature does not match the required key or the content."""


class VersionError(SeqbuildError):
    """The host's libraries are not the ones the artifact was compiled with."""


class WeightsError(SeqbuildError):
    """A checkpoint that does not match the artifact."""


class DataError(SeqbuildError):
    """Calibration or evaluation data that is empty, too short or out of vocabulary."""


class RecipeError(SeqbuildError):
    """A recipe that cannot be read, or has an unsupported option."""


class PatternError(SeqbuildError):
    """A regular expression that is invalid or takes too long."""


class OutputError(SeqbuildError):
    """An output location that is in use, not empty, full or not writable."""


class DeviceError(SeqbuildError):
    """A device that is not available."""


class PlanError(SeqbuildError):
    """A run that does not fit into memory or onto the disk."""


class WorkerError(SeqbuildError):
    """Another worker of the run that failed, died, or does not respond."""


class QuantizationError(SeqbuildError):
    """Numbers that an algorithm cannot use, such as a Hessian that is not finite."""
