"""Generate sample inputs: the default sample of a model, and fake tensors with symbolic sizes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from runtime.errors import TraceError
from seqbuild.sample.audio import replaces_text, takes_audio, with_audio
from seqbuild.sample.plain import is_left_out, plain_call
from seqbuild.sample.shape import PASS_SAMPLE, SAMPLE_BATCH, SampleShape
from seqbuild.sample.tokens import text_inputs

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode


_IMAGE_INPUTS = ("pixel_values", "pixel_values_videos", "flattened_patches", "protein_input_ids")


def populate_concrete_args(model: nn.Module, sample_input: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for the arguments of `model.forward` that are missing from the sample.

    Args:
        model: the model whose forward's signature is read (through its decorators).
        sample_input: the given inputs, by name.

    Returns:
        Name to default value, in the order of the signature; `[]` and `{}` for variadic arguments, False for
        `use_cache`, `inspect.Parameter.empty` for a required argument that is missing from the sample.
    """
    concrete: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in sample_input:
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            concrete[name] = []
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            concrete[name] = {}
        else:
            concrete[name] = False if name == "use_cache" else parameter.default
    return concrete


def default_sample(
    model: nn.Module, shape: SampleShape | None = None, *, text_only: bool = False, wanted: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Generate inputs that fit the model's signature and config, on the CPU.

    Text-only samples contain the inputs of a plain call, and other inputs for which a value representing their absence
    is known; see `seqbuild.sample.plain`.

    Args:
        model: the model to be called.
        shape: the shape of the sample.
        text_only: omit images and sounds, for a model that works without them.
        wanted: inputs to generate even if a plain call omits them.

    Raises:
        TraceError: if the model's forward takes no known input.
    """
    shape = shape or SampleShape()
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if not text_only and takes_audio(parameters):
        sample = with_audio(model, parameters, shape)
        return _as_in_plain_calls(model, sample, wanted) if replaces_text(parameters) else sample
    has_images = not text_only and any(name in parameters for name in _IMAGE_INPUTS)
    if "input_ids" not in parameters and not has_images:
        raise TraceError(
            f"cannot create sample inputs for {type(model).__name__} ({', '.join(parameters)})", hint=PASS_SAMPLE
        )
    generator = torch.Generator().manual_seed(shape.seed)
    sample = text_inputs(config, parameters, shape, generator)
    if has_images:
        from seqbuild.sample.vision import with_images  # not required for text only

        return with_images(model, parameters, sample, shape, generator)
    return _as_in_plain_calls(model, sample, wanted)


def _as_in_plain_calls(
    model: nn.Module, sample: Mapping[str, torch.Tensor], wanted: Collection[str]
) -> dict[str, torch.Tensor]:
    """Omit inputs that a plain call omits, unless a value represents their absence."""
    parameters, kept = inspect.signature(model.forward).parameters, {*plain_call(model).absent, *wanted}
    return {name: value for name, value in sample.items() if name in kept or not is_left_out(name, parameters)}


def rehearsal_samples(sample_input: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a sample with real values, and consistently larger ones: all rows repeated, token inputs (or, without
    tokens, sequences of vectors) extended by their last column.

    Tensors without values (meta or fake) become zeros.
    """
    real = {name: _with_values(value) for name, value in sample_input.items()}
    tokens = [value for value in real.values() if _is_tokens(value)]
    width = tokens[0].shape[1] if tokens else 0

    def larger(rows: int, columns: int) -> dict[str, Any]:
        made = {}
        for name, value in real.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                value = torch.cat([value] * rows)
                is_sequence = value.shape[1] == width if _is_tokens(value) else not tokens and value.dim() == 3
                if is_sequence:
                    last = value[:, -1:]
                    value = torch.cat([value, last.expand(-1, columns, *last.shape[2:])], dim=1)
            made[name] = value
        return made

    return [real, larger(2, 3), larger(3, 10)]


def longer_text(sample_input: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return shapes of a token-only sample with rows so long that they span several of the blocks that models process
    at once; None for other samples.
    """
    widths = {value.shape[1] for value in sample_input.values() if _is_tokens(value)}
    if len(widths) != 1 or not all(_is_tokens(value) for value in sample_input.values()):
        return None
    width = 4 * widths.pop() + 1
    return {name: torch.zeros(len(value), width, dtype=value.dtype) for name, value in sample_input.items()}


def _with_values(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_meta or isinstance(value, torch._subclasses.FakeTensor):
        return torch.zeros(tuple(map(int, value.shape)), dtype=value.dtype)
    return value.detach().cpu()


def _is_tokens(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()


def symbolic_inputs(
    sample_input: Mapping[str, Any], fake_mode: FakeTensorMode, fixed: Collection[tuple[str, int]] = ()
) -> dict[str, Any]:
    """Create fake tensors of symbolic size for the sample's tensors; other values are returned unchanged.

    Args:
        sample_input: the sample.
        fake_mode: of the trace.
        fixed: inputs and axes that keep the sample's sizes.

    Token inputs (integers, [batch, sequence]) share one symbol for the batch; every other size has its own symbol until
    the model's code requires two sizes to be equal. A leading size of one would become a constant, so a batch of one is
    traced as a larger one: only shapes matter, values are never read.
    """
    result: dict[str, Any] = {}
    tensors = {name: value for name, value in sample_input.items() if isinstance(value, torch.Tensor)}
    is_single = all(value.dim() > 0 and value.shape[0] == 1 for value in tensors.values())
    taken = [size for value in tensors.values() for size in value.shape]
    batch = next(size for size in itertools.count(SAMPLE_BATCH) if size not in taken)
    for name, value in sample_input.items():
        if not isinstance(value, torch.Tensor):
            result[name] = value
            continue
        shape = list(value.shape)
        if is_single:
            shape[0] = batch
        template = torch.empty(shape, dtype=value.dtype, device="meta")
        is_free = [size > 1 and (name, axis) not in fixed for axis, size in enumerate(shape)]
        sizes = [DimDynamic.DYNAMIC if free else DimDynamic.STATIC for free in is_free]
        if len(shape) == 2 and shape[0] > 1 and not value.is_floating_point():
            sizes[0] = DimDynamic.DUCK  # equal hints, one symbol
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(shape))
        fake = fake_mode.from_tensor(template, symbolic_context=context)
        with fake_mode:
            result[name] = torch.empty_like(fake, device="cpu")
    return result
