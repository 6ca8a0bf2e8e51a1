"""What readers of a checkpoint do not load, or load wrongly: one table, measured by tests/clients (docs/readers.md).

A row says for which modules it is: where they are, and what their scheme is like. Of the rows of one reader the first
that fits a module counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.formats.presets import plain_value
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.recipe.recipe import Assignment

# Where a module is. An expert's matrices are parts of one stacked parameter in transformers; the renamed are those that
# the original checkpoint has stacked, too; the separate are modules of their own when transformers loads them, as
# Llama 4's are.
DENSE, EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT = "dense", "expert", "renamed expert", "separate expert"
UNQUANTIZED_EXPERT = "expert that is not quantized"  # beside modules that are
CACHE = "cache"  # of keys and values, of an attention module
ANYWHERE = (DENSE, EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT)
EXPERTS = (EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT)

# What a scheme is like.
ANY = "any"
ZERO_POINTS = "packed zero points"
BLOCKS = "blocks"
INTEGERS = "integers"
ROUNDED_INPUTS = "rounded inputs"
SEVERAL_GROUPS = "one of several"  # groups of the config
PACKED_ROUNDED_INPUTS = "packed integers with rounded inputs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What one reader makes of some modules.

    Attributes:
        reader: the program.
        versions: those that were tried.
        places: where the modules are.
        scheme: what their scheme is like: one of the above, or a format of compressed-tensors.
        consequence: what it does, as the end of a sentence that begins with its name.
        model_types: the models that this is about; empty for all.
    """

    reader: str
    versions: str
    places: tuple[str, ...]
    scheme: str
    consequence: str
    model_types: tuple[str, ...] = ()


_REFUSES = "does not load experts with such a scheme"
_BOTH = "5.17 and 5.24"
LIMITS = (
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(RENAMED_EXPERT,),
        scheme=ANY,
        consequence="starts these experts at random, without an error: they are written one by one, as llm-compressor "
        "writes them, and it looks for the stacked ones of the original checkpoint",
    ),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme=SEVERAL_GROUPS,
        consequence="does not load these experts where the config has several groups, even of the same scheme",
    ),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme=ZERO_POINTS, consequence=_REFUSES),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme="int-quantized", consequence=_REFUSES),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme=BLOCKS, consequence=_REFUSES),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme="mxfp8-quantized", consequence=_REFUSES),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme="nvfp4-pack-quantized",
        consequence="loads these experts without an error and computes wrong numbers: it drops their global scales",
    ),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme=ROUNDED_INPUTS,
        consequence="does not round the inputs of these experts",
    ),
    Limit(
        reader="transformers",
        versions="5.24",
        places=ANYWHERE,
        scheme=ZERO_POINTS,
        consequence="loads packed zero points only with quantization_config=CompressedTensorsConfig(dequantize=True)",
    ),
    Limit(
        reader="transformers",
        versions="5.17",
        places=(UNQUANTIZED_EXPERT,),
        scheme=INTEGERS,
        consequence="starts experts that are not quantized at random, without an error, beside integer layers",
    ),
    Limit(
        reader="transformers",
        versions="5.24",
        places=(UNQUANTIZED_EXPERT,),
        scheme=INTEGERS,
        consequence="does not load experts that are not quantized beside integer layers",
    ),
    Limit(
        reader="transformers",
        versions="5.24",
        places=(CACHE,),
        scheme=ANY,
        consequence="ignores the scales of a key-value cache, and keeps it in 16 bits",
    ),
    Limit(
        reader="transformers",
        versions="5.17",
        places=(CACHE,),
        scheme=ANY,
        consequence="does not load a key-value cache's scales for a config without num_key_value_heads",
        model_types=("opt",),
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=(RENAMED_EXPERT,),
        scheme=ANY,
        consequence="does not load these experts, in some schemes without an error: of this architecture it reads "
        "stacked ones alone",
        model_types=("gpt_oss",),
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=EXPERTS,
        scheme=PACKED_ROUNDED_INPUTS,
        consequence="does not load experts with such a scheme",
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=ANYWHERE,
        scheme="mxfp6-pack-quantized",
        consequence="does not load such a scheme",
    ),
)


def reader_limits(
    model_type: str,
    places: Mapping[str, str],
    jobs: Mapping[str, Assignment],
    others: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[str]:
    """What should be known before a checkpoint is made, a sentence for each row of the table that matters.

    Args:
        model_type: of the config.
        places: where a module is; those that are not in it are dense.
        jobs: what is done to each module.
        others: what matters besides, by its place: stacked weights of experts that stay as they are and have a tensor
            for each expert in the checkpoint, attention modules whose keys and values have scales.
    """
    found: dict[Limit, list[str]] = {}
    kinds: dict[tuple[str, int], tuple[Limit, ...]] = {}
    several = frozenset([SEVERAL_GROUPS] if len({job.group for job in jobs.values()}) > 1 else [])
    for name, job in jobs.items():
        place = places.get(name, DENSE)
        known_by = place, job.group
        if known_by not in kinds:
            kinds[known_by] = tuple(_matching(model_type, place, traits(job.scheme) | several))
        for limit in kinds[known_by]:
            found.setdefault(limit, []).append(name)
    of_all = frozenset(trait for job in jobs.values() for trait in traits(job.scheme))
    for place, names in (others or {}).items():
        if names:
            found.update({limit: list(names) for limit in _matching(model_type, place, of_all | {ANY})})
    for limit in LIMITS:
        if limit in found:
            names = found[limit]
            listed = f"{len(names)} modules, {some(names)}" if len(names) > 3 else some(names)
            yield f"{limit.reader} {limit.versions} {limit.consequence}: {listed}"


def _matching(model_type: str, place: str, scheme_traits: frozenset[str]) -> Iterator[Limit]:
    said: set[tuple[str, str]] = set()  # reader and version
    for limit in LIMITS:
        is_about = not limit.model_types or model_type in limit.model_types
        if is_about and place in limit.places and limit.scheme in scheme_traits:
            versions = {(limit.reader, version) for version in limit.versions.split(" and ")}
            if not versions & said:
                said |= versions
                yield limit


def traits(scheme: QuantizationScheme) -> frozenset[str]:
    """What a scheme is like, in the words of the table."""
    weights, format_name = scheme.weights, str(plain_value(scheme.format))
    is_packed = format_name == "pack-quantized"
    found = {ANY, format_name, *([INTEGERS] if weights.type == "int" else ())}
    if is_packed and not weights.symmetric:
        found.add(ZERO_POINTS)
    if plain_value(weights.strategy) == "block":
        found.add(BLOCKS)
    inputs = scheme.input_activations
    if inputs is not None:
        found.add(ROUNDED_INPUTS)
        if is_packed and plain_value(inputs.type) == "int":
            found.add(PACKED_ROUNDED_INPUTS)
    return frozenset(found)
