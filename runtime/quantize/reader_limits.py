"""The modules that readers of a checkpoint do not load, or load incorrectly, as measured by tests/clients
(docs/readers.md).

A row of the table states the place and the scheme of the modules that it applies to. Of the rows of one reader, the
first that matches a module applies.
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

# The place of a module. transformers loads experts into stacked parameters. Renamed experts are stacked in the original
# checkpoint, too; separate experts are modules of their own when transformers loads them, as in Llama 4.
DENSE, EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT = "dense", "expert", "renamed expert", "separate expert"
UNQUANTIZED_EXPERT = "expert that is not quantized"  # in a checkpoint with quantized modules
CACHE = "cache"  # of keys and values, of an attention module
ANYWHERE = (DENSE, EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT)
EXPERTS = (EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT)

# The properties of a scheme.
ANY = "any"
ZERO_POINTS = "packed zero points"
BLOCKS = "blocks"
INTEGERS = "integers"
ROUNDED_INPUTS = "rounded inputs"
SEVERAL_GROUPS = "one of several"  # config groups
PACKED_ROUNDED_INPUTS = "packed integers with rounded inputs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A limitation of one reader.

    Attributes:
        reader: the program.
        versions: the tested versions.
        places: the places of the modules.
        scheme: a property of their scheme: one of the above, or a format of compressed-tensors.
        consequence: what the reader does, as the predicate of a sentence.
        model_types: the affected models; empty for all.
    """

    reader: str
    versions: str
    places: tuple[str, ...]
    scheme: str
    consequence: str
    model_types: tuple[str, ...] = ()


_NOT_LOADED = "does not load experts with this scheme"
_BOTH = "5.17 and 5.24"
LIMITS = (
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(RENAMED_EXPERT,),
        scheme=ANY,
        consequence="initializes these experts at random without an error: they are stored separately, as "
        "llm-compressor stores them, and it expects the stacked tensors of the original checkpoint",
    ),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme=SEVERAL_GROUPS,
        consequence="does not load these experts if the config has several groups, even with the same scheme",
    ),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme=ZERO_POINTS, consequence=_NOT_LOADED),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme="int-quantized", consequence=_NOT_LOADED),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme=BLOCKS, consequence=_NOT_LOADED),
    Limit(reader="transformers", versions=_BOTH, places=(EXPERT,), scheme="mxfp8-quantized", consequence=_NOT_LOADED),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme="nvfp4-pack-quantized",
        consequence="loads these experts without an error and computes wrong numbers: it ignores their global scales",
    ),
    Limit(
        reader="transformers",
        versions=_BOTH,
        places=(EXPERT,),
        scheme=ROUNDED_INPUTS,
        consequence="does not quantize the inputs of these experts",
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
        consequence="initializes experts that are not quantized at random, without an error, if others are integers",
    ),
    Limit(
        reader="transformers",
        versions="5.24",
        places=(UNQUANTIZED_EXPERT,),
        scheme=INTEGERS,
        consequence="does not load experts that are not quantized if other layers are integers",
    ),
    Limit(
        reader="transformers",
        versions="5.24",
        places=(CACHE,),
        scheme=ANY,
        consequence="ignores the scales of a key-value cache and stores the cache in 16 bits",
    ),
    Limit(
        reader="transformers",
        versions="5.17",
        places=(CACHE,),
        scheme=ANY,
        consequence="does not load the scales of a key-value cache if the config has no num_key_value_heads",
        model_types=("opt",),
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=(RENAMED_EXPERT,),
        scheme=ANY,
        consequence="does not load these experts, in some schemes without an error: for this architecture it only "
        "loads stacked experts",
        model_types=("gpt_oss",),
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=EXPERTS,
        scheme=PACKED_ROUNDED_INPUTS,
        consequence=_NOT_LOADED,
    ),
    Limit(
        reader="vLLM",
        versions="0.32",
        places=ANYWHERE,
        scheme="mxfp6-pack-quantized",
        consequence="does not load this scheme",
    ),
)


def reader_limits(
    model_type: str,
    places: Mapping[str, str],
    jobs: Mapping[str, Assignment],
    others: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[str]:
    """Yield a sentence for each row of the table that applies.

    Args:
        model_type: of the config.
        places: places of modules; modules without an entry are dense.
        jobs: assignment of each module.
        others: further names by place: stacked weights of unquantized experts with one checkpoint tensor per expert,
            and attention modules whose keys and values have scales.
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
    matched: set[tuple[str, str]] = set()  # reader and version
    for limit in LIMITS:
        is_affected = not limit.model_types or model_type in limit.model_types
        if is_affected and place in limit.places and limit.scheme in scheme_traits:
            versions = {(limit.reader, version) for version in limit.versions.split(" and ")}
            if not versions & matched:
                matched |= versions
                yield limit


def traits(scheme: QuantizationScheme) -> frozenset[str]:
    """Return the properties of a scheme that the table distinguishes."""
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
