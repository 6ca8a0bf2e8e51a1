"""The quantization entry of a source checkpoint's config.json, and the packed form of its tensors.

Each quantized format has a file that recognizes its tensors by names, dtypes and shapes, and computes plain ones:
`source_blocks` (DeepSeek's FP8, gpt-oss's MXFP4), `source_integers` (GPTQ, AWQ), `source_modelopt` and
`source_compressed`. `source_tensors` selects the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.stored import Stored
from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch

    Compute = Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]

ENTRY = "quantization_config"
OLD_ENTRY = "compression_config"  # of early versions of compressed-tensors, which vLLM still reads
FP8, FBGEMM, MXFP4 = "fp8", "fbgemm_fp8", "mxfp4"
COMPRESSED = "compressed-tensors"
MODELOPT = "modelopt"
FLOATS = ("F16", "BF16", "F32")
_COPY_AGAIN = "copy or export the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A plain tensor that is stored as several tensors.

    Attributes:
        parts: names of the stored tensors by their role.
        shape: of the plain tensor.
        compute: computes the plain tensor from the parts by role, in a dtype; raises ValueError for invalid values.
        by_expert: roles of the parts whose first axis is that of the plain tensor, a stack of experts; empty if it is
            computed as a whole.
        has_signed_scales: whether scales may be negative, as AutoRound's symmetric ones are.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    compute: Compute
    by_expert: tuple[str, ...] = ()
    has_signed_scales: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensors:
    """The packed tensors of a checkpoint.

    Attributes:
        tensors: the packed form of each plain tensor by its name.
        unused: tensors that a plain checkpoint does not have: scales of inputs and of the key-value cache.
    """

    tensors: dict[str, Packed] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceHeaders:
    """The tensors of a checkpoint as its headers state them.

    Attributes:
        tensors: by name.
        origin: the checkpoint's name in messages.
        integers: reads the values of a small tensor of 64-bit integers.
    """

    tensors: Mapping[str, Stored]
    origin: str
    integers: Callable[[str], Sequence[int]]

    def ending_with(self, *suffixes: str) -> Iterator[str]:
        """Yield the names with one of these last parts."""
        return (key for key in self.tensors if key.rpartition(".")[2] in suffixes)

    def need(self, key: str, dtypes: Sequence[str], owner: str) -> Stored:
        """Return a tensor that a quantized module or weight needs.

        Raises:
            WeightsError: when it is missing or has another dtype.
        """
        stored = self.tensors.get(key)
        if stored is None:
            raise WeightsError(f"missing tensor {key!r} in {self.origin}, required by {owner!r}", hint=_COPY_AGAIN)
        if stored.dtype not in dtypes:
            raise WeightsError(
                f"tensor {key!r} of {self.origin} has the dtype {stored.dtype}, not {' or '.join(dtypes)}",
                hint=_COPY_AGAIN,
            )
        return stored

    def misfit(self, stored: Stored, expected: object, why: str) -> WeightsError:
        """Return the error for a tensor whose shape does not fit the others of its module."""
        what = f"tensor {stored.name!r} of {self.origin} has shape {list(stored.shape)}"
        return WeightsError(f"{what}; {why} needs {expected}", hint="check the quantization entry of its config.json")


def stated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization entry of a config.json; empty for a plain checkpoint.

    A model with several parts may have the entry in its text config.
    """
    path = entry_path(config)
    found: Mapping[str, Any] = config
    for name in path.split(".") if path else ():
        found = found[name]
    return _with_method(found) if path else {}


def _with_method(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry with its quant_method: some versions of ModelOpt and compressed-tensors do not write it."""
    inner = entry.get("quantization")  # the content of hf_quant_config.json
    if isinstance(inner, Mapping) and "quant_algo" in inner:
        return {**inner, "quant_method": MODELOPT}
    if entry.get("quant_method"):
        return entry
    if "quant_algo" in entry:
        return {**entry, "quant_method": MODELOPT}
    return {**entry, "quant_method": COMPRESSED} if "config_groups" in entry and "format" in entry else entry


def entry_path(config: Mapping[str, Any]) -> str:
    """Return the path of the quantization entry in a config.json; empty for a plain checkpoint."""
    for prefix, part in (("", config), ("text_config.", config.get("text_config"))):
        for name in (ENTRY, OLD_ENTRY):
            if isinstance(part, Mapping) and isinstance(part.get(name), Mapping) and part[name]:
                return f"{prefix}{name}"
    return ""


def described(entry: Mapping[str, Any]) -> str:
    """Describe a quantization entry: its method, and the algorithm or number of bits if stated."""
    bits = entry.get("bits", entry.get("w_bit"))
    detail = entry.get("quant_algo") or (f"{bits} bits" if bits is not None else "")
    return " ".join(str(part) for part in (entry.get("quant_method") or "no quant_method", detail) if part)[:200]


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model with plain weights."""
    entries = (ENTRY, OLD_ENTRY)
    plain = {name: value for name, value in config.items() if name not in entries}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {name: value for name, value in plain["text_config"].items() if name not in entries}
    return plain
