"""Sample inputs: the default one for a model, and the same with symbolic sizes."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from runtime.errors import TraceError

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

# Sizes that no model has, so that a size of the data is never taken for one of the model's own.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_SHORTER = 3, 37, 6
_FIRST_PLAIN_TOKEN = 10


def populate_concrete_args(model: nn.Module, sample_input: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the arguments of `model.forward` that the sample does not give.

    Args:
        model: the model whose forward's signature is read (through its decorators).
        sample_input: the named inputs that are given.

    Returns:
        Name to default value, in the order of the signature; `[]` and `{}` for variadic arguments, False for
        `use_cache`, `inspect.Parameter.empty` for a required argument that the sample lacks.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """How a made-up sample shall look.

    Attributes:
        batch: rows of text.
        sequence: tokens of a row, besides those that stand for images and sounds.
        padding: `left`, `right` or nothing; row i of the first three is padded by three tokens less i.
        images: how many images (or sounds) each row has, where a model takes them by row.
        scale: which of the sizes that the model allows for images and sounds; 0 is the smallest, and where it allows
            one only, all are the same.
        seed: of token ids, pixels and the like.
    """

    batch: int = SAMPLE_BATCH
    sequence: int = SAMPLE_SEQUENCE
    padding: str = ""
    images: int = 1
    scale: int = 0
    seed: int = 0


def default_sample(model: nn.Module, shape: SampleShape | None = None) -> dict[str, torch.Tensor]:
    """Inputs that fit the model's signature and config, on the CPU.

    Raises:
        TraceError: when the model's forward takes nothing that is known.
    """
    shape = shape or SampleShape()
    parameters = inspect.signature(model.forward).parameters
    is_seeing = takes_images(parameters)
    if "input_ids" not in parameters and not is_seeing:
        raise TraceError(
            f"{type(model).__name__} takes no input_ids but {', '.join(parameters)}",
            hint="bring a sample of its inputs with --sample",
        )
    generator = torch.Generator().manual_seed(shape.seed)
    config = getattr(model, "config", None)
    sample = _text(parameters, "", shape, _vocabulary(config), generator) if "input_ids" in parameters else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        shorter = dataclasses.replace(shape, sequence=max(1, shape.sequence - SAMPLE_SHORTER))
        sample |= _text(parameters, "decoder_", shorter, _vocabulary(config), generator)
    if is_seeing:
        from seqbuild.sample_vision import with_images  # builds models: text alone does without it

        sample = with_images(model, parameters, sample, shape, generator)
    return sample


def takes_images(parameters: Mapping[str, Any]) -> bool:
    """Whether a forward with these parameters sees anything."""
    seen = ("pixel_values", "pixel_values_videos", "flattened_patches", "protein_input_ids")
    return any(name in parameters for name in seen)


def _text(
    parameters: Mapping[str, Any], prefix: str, shape: SampleShape, vocabulary: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Token ids, int64 [batch, sequence], and the masks and types that go with them."""
    size = (shape.batch, shape.sequence)
    mask = torch.ones(size, dtype=torch.int64)
    for row in range(min(shape.batch, 3)):
        padded = min(3 - row, shape.sequence - 1)
        if shape.padding == "left":
            mask[row, :padded] = 0
        elif shape.padding == "right":
            mask[row, shape.sequence - padded :] = 0
    low = min(_FIRST_PLAIN_TOKEN, vocabulary - 1)
    high = max(low + 1, vocabulary // 2)  # special tokens tend to lie at either end
    made = {
        "input_ids": torch.randint(low, high, size, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(size, dtype=torch.int64),
    }
    return {prefix + name: value for name, value in made.items() if prefix + name in parameters}


def _vocabulary(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", None) or 128)


def symbolic_inputs(sample_input: Mapping[str, Any], fake_mode: FakeTensorMode) -> dict[str, Any]:
    """Fake tensors of symbolic size for the sample's tensors; anything else is returned as it is.

    Token inputs (integers, [batch, sequence]) share one symbol for the batch; every other size has its own, until the
    model's code shows that two must be equal. A leading size of one would be burnt in, so a batch of one is traced as
    a larger one: only shapes matter, the values are never looked at.
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
        sizes = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in shape]
        if len(shape) == 2 and shape[0] > 1 and not value.is_floating_point():
            sizes[0] = DimDynamic.DUCK  # equal hints, one symbol
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(shape))
        fake = fake_mode.from_tensor(template, symbolic_context=context)
        with fake_mode:
            result[name] = torch.empty_like(fake, device="cpu")
    return result
