"""The recipes of `bench_quality`, in the order of its table.

A recipe of a feature that the installed version does not have fails by its own error message, which is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OURS, LLM_COMPRESSOR, AUTO_ROUND = "seqbuild", "llm-compressor", "AutoRound"
REFERENCE = "GPTQ"  # the method of each section that the others are compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to quantize.

    Args:
        section: scheme and groups; methods of a section have equal sizes.
        name: of the method.
        recipe: in llm-compressor's dialect; for AutoRound its bits and group size.
        tools: those that run it.
    """

    section: str
    name: str
    recipe: str
    tools: tuple[str, ...] = (OURS,)

    def key(self, tool: str) -> str:
        """The name of a result."""
        return f"{self.section} | {self.name} | {tool}"


def _quantizing(modifier: str, scheme: str, extra: str = "") -> str:
    return f"{modifier}: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]{extra}}}\n"


def _by_channel(modifier: str, bits: int, extra: str = "") -> str:
    weights = f"{{num_bits: {bits}, type: int, strategy: channel, symmetric: true}}"
    group = f"{{targets: [Linear], weights: {weights}}}"
    return f"{modifier}: {{ignore: [lm_head], config_groups: {{by_channel: {group}}}{extra}}}\n"


_RTN, _GPTQ, _AUTO = "QuantizationModifier", "GPTQModifier", "AutoRoundModifier"
_BOTH = (OURS, LLM_COMPRESSOR)
_AWQ, _AWQ_OWN = "AWQModifier: {}\n", "AWQModifier: {duo_scaling: both}\n"
_SMOOTH = "SmoothQuantModifier: {smoothing_strength: 0.8}\n"
_SIGNED, _ORIGINAL = ", weight_observer: signed_mse", ", target: original"
_TWICE = f"{_SIGNED}, range_passes: 2"
_SPIN = "SpinQuantModifier: {rotations: [R1, R2], transform_type: hadamard}\n"
_SPIN_ALL = "SpinQuantModifier: {rotations: [R1, R2, R4], transform_type: hadamard}\n"
_QUIP = "QuIPModifier: {targets: Linear, ignore: [lm_head], transform_type: random-hadamard}\n"


def methods() -> list[Method]:
    """List all methods."""
    return [
        *(method for bits in (4, 3, 2) for method in _by_groups(bits)),
        *(method for bits in (4, 3, 2) for method in _by_channels(bits)),
        *_with_rounded_inputs(),
        *_with_average_bits(),
    ]


def _by_groups(bits: int) -> Iterator[Method]:
    scheme, section = f"W{bits}A16", f"W{bits}A16, groups of 128"

    def method(name: str, recipe: str, tools: tuple[str, ...] = (OURS,)) -> Method:
        return Method(section=section, name=name, recipe=recipe, tools=tools)

    yield method("RTN", _quantizing(_RTN, scheme), _BOTH)
    yield method("RTN, mse", _quantizing(_RTN, scheme, ", weight_observer: mse"), _BOTH)
    yield method("RTN, imatrix_mse", _quantizing(_RTN, scheme, ", weight_observer: imatrix_mse"), _BOTH)
    yield method("RTN, signed_mse", _quantizing(_RTN, scheme, _SIGNED))
    yield method(REFERENCE, _quantizing(_GPTQ, scheme), _BOTH)
    yield method("GPTQ, mse", _quantizing(_GPTQ, scheme, ", weight_observer: mse"), _BOTH)
    yield method("GPTQ, imatrix_mse", _quantizing(_GPTQ, scheme, ", weight_observer: imatrix_mse"), _BOTH)
    yield method("GPTQ, signed_mse", _quantizing(_GPTQ, scheme, _SIGNED))
    yield method("GPTQ, signed_mse, two passes", _quantizing(_GPTQ, scheme, _TWICE))
    yield method("GPTQ, refine 2", _quantizing(_GPTQ, scheme, ", refine: 2"))
    yield method("GPTQ, signed_mse, refine 2", _quantizing(_GPTQ, scheme, _SIGNED + ", refine: 2"))
    yield method("GPTQ, target original", _quantizing(_GPTQ, scheme, _ORIGINAL))
    yield method("GPTQ, target original, signed_mse, two passes", _quantizing(_GPTQ, scheme, _ORIGINAL + _TWICE))
    yield method("AWQ", _AWQ + _quantizing(_RTN, scheme), _BOTH)
    yield method("AWQ, GPTQ", _AWQ_OWN + _quantizing(_GPTQ, scheme))
    yield method("AWQ, GPTQ, signed_mse", _AWQ_OWN + _quantizing(_GPTQ, scheme, _SIGNED))
    yield method("SpinQuant R1 R2, GPTQ", _SPIN + _quantizing(_GPTQ, scheme))
    yield method("AutoRound", _quantizing(_AUTO, scheme))
    yield method("AutoRound", f"{bits} 128", (AUTO_ROUND,))


def _by_channels(bits: int) -> Iterator[Method]:
    def method(name: str, recipe: str, tools: tuple[str, ...] = (OURS,)) -> Method:
        return Method(section=f"W{bits}A16, by channel", name=name, recipe=recipe, tools=tools)

    yield method("RTN", _by_channel(_RTN, bits), _BOTH)
    yield method(REFERENCE, _by_channel(_GPTQ, bits), _BOTH)
    yield method("GPTQ, signed_mse", _by_channel(_GPTQ, bits, _SIGNED))
    yield method("GPTQ, signed_mse, two passes", _by_channel(_GPTQ, bits, _TWICE))
    yield method("GPTQ, target original", _by_channel(_GPTQ, bits, _ORIGINAL))
    yield method("AutoRound", _by_channel(_AUTO, bits))
    yield method("AutoRound", f"{bits} -1", (AUTO_ROUND,))


def _with_rounded_inputs() -> Iterator[Method]:
    yield Method(section="W8A8", name=REFERENCE, recipe=_quantizing(_GPTQ, "W8A8"), tools=_BOTH)
    yield Method(section="W8A8", name="SmoothQuant, GPTQ", recipe=_SMOOTH + _quantizing(_GPTQ, "W8A8"), tools=_BOTH)
    for scheme in ("W4A4", "MXFP4", "NVFP4"):
        plain = _quantizing(_GPTQ, scheme)
        yield Method(section=scheme, name="RTN", recipe=_quantizing(_RTN, scheme), tools=_BOTH)
        yield Method(section=scheme, name=REFERENCE, recipe=plain, tools=_BOTH)
        if scheme == "NVFP4":
            for observer in ("fouroversix", "nvfp4_expanded_mse"):
                extra = f", weight_observer: {observer}"
                yield Method(section=scheme, name=f"RTN, {observer}", recipe=_quantizing(_RTN, scheme, extra))
                yield Method(section=scheme, name=f"GPTQ, {observer}", recipe=_quantizing(_GPTQ, scheme, extra))
        for name, rotation in (("SpinQuant R1 R2", _SPIN), ("SpinQuant R1 R2 R4", _SPIN_ALL), ("QuIP", _QUIP)):
            yield Method(section=scheme, name=f"{name}, GPTQ", recipe=rotation + plain)


def _with_average_bits() -> Iterator[Method]:
    for bits in ("4.5", "3.5", "2.5"):
        recipe = f"AutoBitsModifier: {{budget: {bits}bits, ignore: [lm_head]}}\n"
        yield Method(section="average bits", name=f"AutoBits, {bits}", recipe=recipe)
