"""Quantized tensors of other programs, made by plain loops from the descriptions of their formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runtime.checkpoint.dequantize import open_checkpoint
from runtime.checkpoint.reader import Checkpoint

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MODULE = "model.layers.0.mlp.up_proj"


def integers(rows: int, columns: int, bits: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator).tolist()


def words(numbers: Sequence[int], bits: int) -> list[int]:
    """Numbers one after the other in a stream of bits, the lowest bits first, cut into signed 32-bit words."""
    stream = sum(number << (bits * place) for place, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    found = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def int32(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def dense(
    numbers_IO: list[list[int]], zeros_GO: list[list[int]], scales_GO: torch.Tensor, groups_I: Sequence[int]
) -> torch.Tensor:
    """weight_OI in float32, one number after the other."""
    num_in, num_out = len(numbers_IO), len(numbers_IO[0])
    found = torch.empty(num_out, num_in)
    for i in range(num_in):
        for o in range(num_out):
            scale = float(scales_GO[groups_I[i], o])
            found[o, i] = (numbers_IO[i][o] - zeros_GO[groups_I[i]][o]) * scale
    return found


def gptq_module(
    bits: int = 4,
    groups_I: Sequence[int] = tuple(i // 16 for i in range(64)),
    *,
    num_out: int = 32,
    offset: int = 1,
    has_order: bool = True,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a module of GPTQ, and its weight; `offset` is subtracted from stored zero points."""
    num_in, num_groups = len(groups_I), max(groups_I) + 1
    numbers = integers(num_in, num_out, bits, 1)
    zeros = [[max(zero, offset) for zero in row] for row in integers(num_groups, num_out, bits, 2)]
    scales = (torch.randn(num_groups, num_out, generator=torch.Generator().manual_seed(3)) / 8).half()
    columns = [words([numbers[i][o] for i in range(num_in)], bits) for o in range(num_out)]
    tensors = {
        "qweight": int32(columns).T.contiguous(),
        "qzeros": int32([words([zero - offset for zero in row], bits) for row in zeros]),
        "scales": scales,
    }
    if has_order:
        tensors["g_idx"] = torch.tensor(groups_I, dtype=torch.int32)
    return tensors, dense(numbers, zeros, scales, groups_I)


def awq_module(num_in: int = 64, num_out: int = 32, group: int = 16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a module of AutoAWQ's GEMM layout, and its weight."""
    groups_I = [i // group for i in range(num_in)]
    numbers, zeros = integers(num_in, num_out, 4, 1), integers(num_in // group, num_out, 4, 2)
    scales = (torch.rand(num_in // group, num_out, generator=torch.Generator().manual_seed(3)) / 8).half()

    def ordered(row: list[int]) -> list[int]:
        return words([row[first + place] for first in range(0, num_out, 8) for place in AWQ_ORDER], 4)

    tensors = {
        "qweight": int32([ordered(row) for row in numbers]),
        "qzeros": int32([ordered(row) for row in zeros]),
        "scales": scales,
    }
    return tensors, dense(numbers, zeros, scales, groups_I)


def write(
    directory: Path,
    entry: Mapping[str, Any] | None,
    modules: Mapping[str, Mapping[str, torch.Tensor]],
    others: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint with modules and other tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    stated = {"quantization_config": dict(entry)} if entry is not None else {}
    (directory / "config.json").write_text(json.dumps({"dtype": "float16", **config, **stated}))
    tensors = {f"{module}.{name}": tensor for module, parts in modules.items() for name, tensor in parts.items()}
    save_file({**tensors, **(others or {})}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def plain(directory: Path, dtype: str = "float32") -> Checkpoint:
    return open_checkpoint(directory, plain=True, dtype=dtype)
