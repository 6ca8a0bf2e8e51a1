"""Small artifacts made by hand, for tests of what reads them: no compiler takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from runtime.artifact.encoding import canonical, sha256
from runtime.artifact.manifest import (
    MANIFEST_NAME,
    ConversionEntry,
    DimEntry,
    FileEntry,
    InputEntry,
    Manifest,
    ModelEntry,
    ParameterEntry,
    SubgraphEntry,
    TensorEntry,
)

FIRST = """\
# subgraph 1 of 2: layers.0
def forward(self, x, *, run):
    constant_0 = run.constant("constant_0")
    add = torch.ops.aten.add.Tensor(x, constant_0)
    del x, constant_0
    layers_0 = self.get_submodule("layers.0")(add)
    del add
    return {
        "layers_0": layers_0,
    }
"""
SECOND = """\
# subgraph 2 of 2: no target
def forward(self, layers_0, *, run):
    weight = self.get_parameter("head.weight")
    matmul = torch.ops.aten.matmul.default(layers_0, weight)
    del layers_0, weight
    return {
        "output": matmul,
    }
"""
CONVERSION = """\
def forward(self, source_0, source_1, *, run):
    cat = torch.ops.aten.cat.default([source_0, source_1])
    del source_0, source_1
    return {
        "value": cat,
    }
"""
INGREDIENTS = {"config": "cd" * 32, "version_torch": "2.13.0"}
EMPTY = {
    "consumed_names": (),
    "submodules": (),
    "attributes": (),
    "objects": (),
    "constants": (),
    "opaque": (),
    "targets": (),
    "parameters": (),
}


def entry(**changes: Any) -> SubgraphEntry:
    """A subgraph's entry; what is not given is empty."""
    return SubgraphEntry(**{**EMPTY, **changes})


def files() -> dict[str, bytes]:
    """Content of every file but the manifest."""
    return {
        "config.json": b'{"model_type": "llama"}\n',
        "constants.safetensors": save({"constant_0": torch.tensor([1.0, 2.0])}),
        "conversions/000.py": CONVERSION.encode(),
        "subgraphs/000.py": FIRST.encode(),
        "subgraphs/001.py": SECOND.encode(),
    }


def manifest(contents: dict[str, bytes] | None = None, **changes: Any) -> Manifest:
    """The manifest that belongs to `files()`, or to other contents."""
    contents = files() if contents is None else contents
    values: dict[str, Any] = {
        "input_key": sha256(canonical(INGREDIENTS)),
        "ingredients": INGREDIENTS,
        "model": ModelEntry(
            class_name="LlamaForCausalLM",
            module="transformers.models.llama.modeling_llama",
            model_type="llama",
            dtype="float32",
            attn_implementation="eager",
            num_parameters=8,
            base_model_prefix="model",
            ignored_keys=(r"\.rotary_emb\.",),
        ),
        "versions": {"seqbuild": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        "targets": ("layers.0",),
        "target_patterns": ("Layer",),
        "ignore": (),
        "targets_per_subgraph": 1,
        "inputs": (InputEntry(name="x", dtype="model", shape=("batch", "sequence", 2)),),
        "dims": (DimEntry(name="batch", min=1, max=-1), DimEntry(name="sequence", min=1, max=64)),
        "subgraphs": (
            entry(
                file="subgraphs/000.py",
                input_names=("x",),
                consumed_names=("x",),
                output_names=("layers_0",),
                submodules=("layers.0",),
                constants=("constant_0",),
                targets=("layers.0",),
                parameters=("layers.0.weight",),
            ),
            entry(
                file="subgraphs/001.py",
                input_names=("layers_0",),
                consumed_names=("layers_0",),
                output_names=("output",),
                attributes=("head.weight",),
                parameters=("head.weight",),
            ),
        ),
        "parameters": {
            "layers.0.weight": ParameterEntry(
                shape=(2, 2), dtype="model", bytes=16, sources=("a", "b"), conversion=0, tied_to=""
            ),
            "head.weight": ParameterEntry(
                shape=(2, 2), dtype="model", bytes=16, sources=("head.weight",), conversion=-1, tied_to=""
            ),
        },
        "conversions": (ConversionEntry(file="conversions/000.py", num_sources=2),),
        "values": {
            "layers_0": TensorEntry(dtype="model", shape=("batch", "sequence", 2)),
            "output": TensorEntry(dtype="model", shape=("batch", "sequence", 2)),
        },
        "constants": ("constant_0",),
        "files": tuple(
            FileEntry(path=path, bytes=len(data), sha256=sha256(data)) for path, data in sorted(contents.items())
        ),
    }
    empty: dict[str, Any] = {
        **{key: {} for key in ("sources", "leaves", "buffers", "foreign", "limits", "defaults", "decoder", "mixtures")},
        **dict.fromkeys(("auto_ignore", "conditions", "leaf_kinds", "scale_groups", "mixture_groups", "cached"), ()),
        **dict.fromkeys(("expert_layouts", "lookups"), ()),
    }
    return Manifest(**{**empty, "policy": "target", **values, **changes})


def write(directory: Path, contents: dict[str, bytes] | None = None, **changes: Any) -> Path:
    """Write an artifact whose digests are right, whatever its content is."""
    contents = files() if contents is None else contents
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / MANIFEST_NAME).write_bytes(manifest(contents, **changes).to_bytes())
    return directory
