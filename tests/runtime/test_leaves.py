"""The module tree's leaves are torch's own classes without memory."""

from __future__ import annotations

import pytest
import torch

from runtime.artifact.manifest import LeafKind
from runtime.model.leaves import build_leaf


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (LeafKind(kind="Linear"), {"weight": (3, 5), "bias": (3,)}),
        (LeafKind(kind="Embedding"), {"weight": (7, 4)}),
        (
            LeafKind(
                kind="Conv1d",
                options={"stride": (1,), "padding": (0,), "dilation": (1,), "groups": (1,), "padding_mode": ("zeros",)},
            ),
            {"weight": (4, 2, 3)},
        ),
    ],
)
def test_leaves_are_of_torchs_own_classes(kind: LeafKind, shapes: dict[str, tuple[int, ...]]) -> None:
    leaf = build_leaf(kind, "a.leaf", shapes, None)
    assert type(leaf) is getattr(torch.nn, kind.kind)
    assert {name: tuple(parameter.shape) for name, parameter in leaf.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in leaf.parameters())
