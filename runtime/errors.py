"""Every error a user can cause, in one tree.

    SeqbuildError
    ├── UsageError          an option or argument that cannot be
    ├── ModelError          no such model, or one whose config is missing or cannot be built
    ├── TargetError         a sequential target that does not exist, is never called, or conflicts
    ├── TraceError          model code that cannot be recorded
    ├── ArtifactError       an artifact that is damaged, from a future version, or breaks the rules for its code
    ├── SignatureError      an artifact that is not signed, not by the key that is asked for, or not as it is
    ├── VersionError        the host's libraries are not the ones the artifact was compiled with
    ├── WeightsError        a checkpoint that does not fit the artifact
    ├── DataError           calibration or evaluation data that is empty, too short or out of vocabulary
    ├── RecipeError         a recipe that cannot be read or asks for what is not offered
    ├── PatternError        a regular expression that is none, or takes too long
    ├── OutputError         an output place that is in use, not empty, full or not writable
    ├── DeviceError         a device that is not there
    ├── PlanError           a run that does not fit into memory or onto the disk
    └── QuantizationError   numbers that an algorithm cannot work with

The message is one sentence that names the offending value; `hint` says what to do next. Command lines print
both on one line and exit with code 2. Anything else that escapes is a bug of ours and shows its traceback.
This module imports nothing, so that every part of the project can use it at no cost.
"""

from __future__ import annotations


class SeqbuildError(Exception):
    """Base of all errors that are the user's to mend.

    Args:
        message: what is wrong, naming the offending value.
        hint: what to do next; empty when the message already says it.
        is_resumable: whether a run that it ends can go on with `--resume` when that is done.
    """

    def __init__(self, message: str, *, hint: str = "", is_resumable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.is_resumable = is_resumable

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SeqbuildError):
    """An option or argument that cannot be."""


class ModelError(SeqbuildError):
    """No such model, or one whose config is missing or cannot be built."""


class TargetError(SeqbuildError):
    """A sequential target that does not exist, is never called, or conflicts with another request."""


class TraceError(SeqbuildError):
    """Model code that cannot be recorded."""


class ArtifactError(SeqbuildError):
    """An artifact that is damaged, of an unknown version, or breaks the rules for its code."""


class SignatureError(SeqbuildError):
    """An artifact that is not signed, not by the key that is asked for, or not as it is."""


class VersionError(SeqbuildError):
    """The host's libraries are not the ones the artifact was compiled with."""


class WeightsError(SeqbuildError):
    """A checkpoint that does not fit the artifact."""


class DataError(SeqbuildError):
    """Calibration or evaluation data that is empty, too short or out of vocabulary."""


class RecipeError(SeqbuildError):
    """A recipe that cannot be read, or that asks for what is not offered."""


class PatternError(SeqbuildError):
    """A regular expression that is none, or takes too long."""


class OutputError(SeqbuildError):
    """An output place that is in use, not empty, full or not writable."""


class DeviceError(SeqbuildError):
    """A device that is not there."""


class PlanError(SeqbuildError):
    """A run that does not fit into memory or onto the disk."""


class QuantizationError(SeqbuildError):
    """Numbers that an algorithm cannot work with, such as a Hessian that is not finite."""
