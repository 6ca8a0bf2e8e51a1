from __future__ import annotations

import pytest

from runtime.report.places import ModulePlace, places, short_kinds

LLAMA = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
EXPERTS = [f"model.layers.{layer}.mlp.experts.{one}.up_proj" for layer in range(2) for one in range(4)]


@pytest.mark.parametrize(
    ("names", "name", "expected"),
    [
        (LLAMA, LLAMA[3], ModulePlace("model.layers", 1, "mlp.up_proj")),
        (EXPERTS, EXPERTS[6], ModulePlace("model.layers", 1, "mlp.experts.*.up_proj", 2)),
        (EXPERTS[:4], EXPERTS[3], ModulePlace("model.layers", 0, "mlp.experts.*.up_proj", 3)),
        (["lm_head"], "lm_head", ModulePlace("", -1, "lm_head")),
        (["model.embed.proj"], "model.embed.proj", ModulePlace("", -1, "model.embed.proj")),
        # T5 numbers the parts of a layer
        (
            [f"encoder.block.{layer}.layer.{part}.q" for layer in range(4) for part in range(3)],
            "encoder.block.2.layer.1.q",
            ModulePlace("encoder.block", 2, "layer.1.q"),
        ),
        # a tower is not a layer
        (
            [f"towers.0.layers.{layer}.q" for layer in range(3)],
            "towers.0.layers.2.q",
            ModulePlace("towers.0.layers", 2, "q"),
        ),
        # mixtures with another name
        (
            [f"h.{layer}.moe.{one}.w1" for layer in range(2) for one in range(16)],
            "h.0.moe.9.w1",
            ModulePlace("h", 0, "moe.*.w1", 9),
        ),
        (["h.3"], "h.3", ModulePlace("h", 3, "h")),
    ],
)
def test_places(names: list[str], name: str, expected: ModulePlace) -> None:
    assert places(names)[name] == expected


def test_short_names_are_unique() -> None:
    kinds = ["self_attn.q_proj", "mlp.up_proj", "mlp.experts.*.up_proj", "mlp.shared.up_proj", "cross.q_proj"]
    assert short_kinds(kinds) == {
        "self_attn.q_proj": "self_attn.q_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.experts.*.up_proj": "experts up_proj",
        "mlp.shared.up_proj": "shared.up_proj",
        "cross.q_proj": "cross.q_proj",
    }
