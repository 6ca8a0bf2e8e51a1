"""Trace a model for an artifact with the first combination of inputs, targets and dtype that works, best first."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.data.named_tensors import NamedSamples
from runtime.data.token_file import TokenData, has_token_metadata, read_token_file
from runtime.errors import DataError, TargetError, TraceError
from runtime.host.regular_files import read_regular
from seqbuild.model.from_config import TRACE_DTYPE
from seqbuild.sample.from_data import sample_of_data
from seqbuild.sample.inputs import default_sample, rehearsal_samples
from seqbuild.sample.shape import REHEARSAL_SHAPES
from seqbuild.trace.experts.dense import is_dense_experts
from seqbuild.trace.experts.learn import is_experts
from seqbuild.trace.model import Trace, TraceOptions, trace_model
from seqbuild.trace.record.leaf_policy import always_foreign
from seqbuild.trace.record.tracer import leaf_policy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from seqbuild.blame import Function
    from seqbuild.options import CompileOptions

Sample = Mapping[str, torch.Tensor]

# Messages of torch about code that does not work in the dtype that represents the weights' dtype.
_DTYPE_ERRORS = re.compile(r"dtype|scalar type|BFloat16|should be the same", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """A trace and the settings it was made with.

    Attributes:
        trace: the trace.
        patterns: the target patterns.
        fixed_dtype: the only dtype of the weights for which the trace is valid; None if it is valid for any.
        leaves: the depth of the trace, `target` or `linear`.
        hindrance: why a deeper trace failed, if one was tried.
    """

    trace: Trace
    patterns: tuple[str, ...]
    fixed_dtype: torch.dtype | None
    leaves: str
    hindrance: str = ""

    @property
    def marker(self) -> torch.dtype | None:
        """Return the dtype that represents the weights' dtype in the trace, if any."""
        return TRACE_DTYPE if self.fixed_dtype is None else None


def read_sample(model: nn.Module, options: CompileOptions) -> dict[str, torch.Tensor]:
    """Read the model's sample from the file in the options, or generate it.

    Raises:
        DataError: if the file cannot be read, or contains an input that the model does not take.
        TraceError: if no sample can be generated.
    """
    file = options.sample
    if file is None:
        return _in_dtype(default_sample(model, REHEARSAL_SHAPES[0], text_only=options.text_only), TRACE_DTYPE)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = read_regular(file)
        sample = load(content)
    except (OSError, SafetensorError, KeyError, ValueError) as error:  # also for dtypes that torch does not have
        raise DataError(
            f"sample file {file} cannot be read: {error}",
            hint="write the model's inputs by name with safetensors.torch.save_file",
        ) from error
    if has_token_metadata(content):
        sample = sample_of_data(model, _named(read_token_file(file), file))
    takes = inspect.signature(model.forward).parameters
    unknown = [name for name in sample if name not in takes]
    if unknown or not sample:
        raise DataError(
            f"sample file {file} "
            + (f"contains {unknown[0]!r}, which is no input of the model" if unknown else "contains no tensors"),
            hint=f"the inputs of {type(model).__name__} are {', '.join(takes)}",
        )
    return _in_dtype({name: sample[name] for name in takes if name in sample}, TRACE_DTYPE)


def _named(data: TokenData | NamedSamples, file: Path) -> NamedSamples:
    if isinstance(data, NamedSamples):
        return data
    raise DataError(f"{file} has text only, for which the sample is generated", hint="leave --sample out")


def with_larger(model: nn.Module, sample: Sample, options: CompileOptions) -> list[Sample]:
    """Return the sample, and others of other sizes for steps that need values.

    The others are generated as well, or repeat the contents of the sample file in the options.
    """
    if options.sample is not None:
        return list(rehearsal_samples(sample))
    others = (default_sample(model, shape, text_only=options.text_only) for shape in REHEARSAL_SHAPES[1:])
    return [sample, *(_in_dtype(other, TRACE_DTYPE) for other in others)]


def _in_dtype(sample: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Convert floating-point inputs, such as pixels, to this dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.items()}


def trace_first_working(
    model: nn.Module, samples: Sequence[Sample], candidates: Sequence[tuple[str, ...]], options: TraceOptions
) -> Traced:
    """Return the first trace that succeeds.

    Args:
        model: without weights, in `TRACE_DTYPE`.
        samples: the result of `with_larger`.
        candidates: target patterns, best first; later ones are tried if the sample does not reach the earlier ones.
        options: as for `trace_model`, without dtype and samples. The depth may also be `auto`: `linear` if the host can
            then build everything by itself, or if the model is a mixture whose experts are reached that way, else
            `target`.

    Raises:
        TargetError, TraceError: the error of the first attempt, if none succeeds.
    """

    def trace(leaves: str, may_ignore: Callable[[Function], bool]) -> Traced:
        def attempt(patterns: tuple[str, ...], dtype: torch.dtype) -> Traced:
            real = [_in_dtype(sample, dtype) for sample in samples]
            changed = dataclasses.replace(options, leaves=leaves, may_ignore=may_ignore, dtype=dtype, samples=real)
            fixed = None if dtype == TRACE_DTYPE else dtype
            found = trace_model(model, real[0], patterns, changed)
            return Traced(trace=found, patterns=patterns, fixed_dtype=fixed, leaves=leaves)

        return _first_of(candidates, attempt)

    if options.leaves != "auto":
        return trace(options.leaves, options.may_ignore)
    has_foreign = bool(options.ignore or always_foreign(model))
    return _trace_portably(trace, options.may_ignore, has_foreign=has_foreign, has_experts=lambda: _has_experts(model))


def _first_of(
    candidates: Sequence[tuple[str, ...]], attempt: Callable[[tuple[str, ...], torch.dtype], Traced]
) -> Traced:
    """Trace with the first candidate that succeeds: in the marker dtype, or in float32 if that dtype is the problem."""
    first: TargetError | None = None
    for patterns in candidates:
        try:
            return attempt(patterns, TRACE_DTYPE)
        except TargetError as error:
            first = first or error
        except TraceError as error:
            if not _is_about_dtypes(error):
                raise
            try:
                return attempt(patterns, torch.float32)
            except TraceError:
                raise error from None
    assert first is not None, "there are candidates"
    raise first


def _is_about_dtypes(error: BaseException) -> bool:
    """Return whether this error or one of its causes (from a dry run, for instance) is about dtypes."""
    seen: dict[int, None] = {}
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen[id(current)] = None
        if _DTYPE_ERRORS.search(str(current)):
            return True
        current = current.__cause__ or current.__context__
    return False


def _trace_portably(
    trace: Callable[[str, Callable[[Function], bool]], Traced],
    may_ignore: Callable[[Function], bool],
    *,
    has_foreign: bool,
    has_experts: Callable[[], bool],
) -> Traced:
    """Trace down to leaves that the host can build by itself; else down to a mixture's experts; else to the targets."""
    hindrance = ""
    if not has_foreign:
        try:
            return trace("linear", lambda function: False)
        except TraceError as error:
            hindrance = error.message
    if has_experts():
        try:
            return dataclasses.replace(trace("linear", may_ignore), hindrance="")
        except (TraceError, TargetError) as error:
            hindrance = hindrance or error.message
    return dataclasses.replace(trace("target", may_ignore), hindrance=hindrance)


def _has_experts(model: nn.Module) -> bool:
    """Return whether the host can split experts of this model, so that they can be quantized."""
    policy = leaf_policy(dtype=TRACE_DTYPE)
    found = (module for module in model.modules() if is_experts(module) or is_dense_experts(module))
    return any(policy.leaf(module) is not None for module in found)
