"""Attacks by the tables of experts and lookups: splits that do not fit, names that are taken, numbers without bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runtime.artifact.manifest import (
    ExpertLayout,
    ExpertPair,
    ExpertStack,
    LeafKind,
    MixtureEntry,
    ParameterEntry,
)
from tests.attacks.attack import Attack
from tests.runtime.artifacts import CONVERSION, entry, manifest, write

PROGRAM = """\
def forward(self, hidden_states, weights, both, down, both_bias, *, run):
    linear = torch.ops.aten.linear.default(hidden_states, both)
    linear_1 = torch.ops.aten.linear.default(linear, down)
    return {
        "output": linear_1,
    }
"""
SUBGRAPH = """\
def forward(self, x, i, w, *, run):
    layers_0 = self.get_submodule("layers.0")(x, i, w)
    del x, i, w
    return {
        "layers_0": layers_0,
    }
"""
CONTENTS = {
    "config.json": b'{"model_type": "llama"}\n',
    "leaves/000.py": PROGRAM.encode(),
    "subgraphs/000.py": SUBGRAPH.encode(),
}
STACKS = (
    ExpertStack(name="both", parts=("gate_proj.weight", "up_proj.weight"), axis=0),
    ExpertStack(name="down", parts=("down_proj.weight",), axis=0, input=1),
    ExpertStack(name="both_bias", parts=("gate_proj.bias", "up_proj.bias"), axis=0),
)
PAIR = ExpertPair(module="down_proj", producer="up_proj", bias="up_proj.bias", channels=(0, 6))
LAYOUT = ExpertLayout(stacks=STACKS, numbers=(0, 2), is_named=False, pairs=(PAIR,))
MIXTURE = MixtureEntry(layout=0, prefix="layers.0")
SHAPES = {"both": (2, 12, 4), "down": (2, 4, 6), "both_bias": (2, 12)}
OPTIONS: dict[str, tuple[int | str, ...]] = {
    "num_experts": (2,),
    "stacked": tuple(SHAPES),
    "inputs": ("x", "i", "w"),
    "accumulator": ("hidden",),
    "is_column": (1,),
}
KIND = LeafKind(
    kind="Experts",
    options=OPTIONS,
    program="leaves/000.py",
    arguments=("hidden_states", "weights", *SHAPES),
)
INPUT = manifest().inputs[0]


def parameter(name: str, shape: tuple[int, ...], **changes: Any) -> ParameterEntry:
    made = ParameterEntry(shape=shape, dtype="model", bytes=4, sources=(name,), conversion=-1, tied_to="")
    return replace(made, **changes)


PARAMETERS = {f"layers.0.{own}": parameter(f"layers.0.{own}", shape) for own, shape in SHAPES.items()}
SOUND: dict[str, Any] = {
    "inputs": tuple(replace(INPUT, name=name) for name in ("x", "i", "w")),
    "subgraphs": (
        entry(
            file="subgraphs/000.py",
            input_names=("x", "i", "w"),
            output_names=("layers_0",),
            submodules=("layers.0",),
            parameters=tuple(PARAMETERS),
        ),
    ),
    "parameters": PARAMETERS,
    "conversions": (),
    "constants": (),
    "values": {"layers_0": manifest().values["layers_0"]},
    "leaf_kinds": (KIND,),
    "leaves": {"layers.0": 0},
    "expert_layouts": (LAYOUT,),
    "mixtures": {"layers.0": MIXTURE},
}


def experts(name: str, reason: str, **changes: Any) -> Attack:
    """A sound artifact with a mixture, and other entries in its manifest."""
    programs = {program.file: CONVERSION.encode() for program in changes.get("conversions", ())}
    return Attack(name, reason, lambda root: write(root, CONTENTS | programs, **{**SOUND, **changes}))


def layout(name: str, reason: str, **changes: Any) -> Attack:
    return experts(name, reason, expert_layouts=(replace(LAYOUT, **changes),))


def stack(name: str, reason: str, place: int = 0, **changes: Any) -> Attack:
    """A layout with another entry for a stacked parameter."""
    stacks = [replace(old, **changes) if number == place else old for number, old in enumerate(STACKS)]
    return layout(name, reason, stacks=tuple(stacks))


def pair(name: str, reason: str, **changes: Any) -> Attack:
    return layout(name, reason, pairs=(replace(PAIR, **changes),))


def named(name: str, reason: str, *sources: str, **changes: Any) -> Attack:
    """Experts whose tensors the checkpoint is said to name."""
    parameters = {key: replace(old, sources=sources or old.sources) for key, old in PARAMETERS.items()}
    return experts(name, reason, expert_layouts=(replace(LAYOUT, is_named=True),), parameters=parameters, **changes)


_NO_NAMES, _NO_AXIS = "are not names of weights, or of biases", "which its parts do not have"
_EACH = tuple(f"layers.0.{number}.{part}" for number in range(2) for entry in STACKS for part in entry.parts)
EXPERTS = [
    experts("a mixture that is no leaf", "is not a leaf of experts", mixtures={"layers.1": MIXTURE}),
    experts("a mixture of no layout", "unknown layout 1", mixtures={"layers.0": replace(MIXTURE, layout=1)}),
    experts("a mixture of a negative layout", "unknown layout -1", mixtures={"layers.0": replace(MIXTURE, layout=-1)}),
    experts("a prefix that is a path", "name '../x' for", mixtures={"layers.0": replace(MIXTURE, prefix="../x")}),
    experts("a prefix that is a pattern", "name 'a.*' for", mixtures={"layers.0": replace(MIXTURE, prefix="a.*")}),
    layout("a layout without stacks", "0 parts", stacks=()),
    layout("a layout for fewer parameters", "is for the parameters", stacks=STACKS[:2], pairs=()),
    stack("a stack without parts", _NO_NAMES, parts=()),
    stack("a part that is no name", _NO_NAMES, parts=("gate_proj/../weight", "up_proj.weight")),
    stack("a part that is private", _NO_NAMES, parts=("__class__.weight", "up_proj.weight")),
    stack("a part that is a number", _NO_NAMES, parts=("0.weight", "up_proj.weight")),
    stack("a part that is neither weight nor bias", _NO_NAMES, parts=("gate_proj.data", "up_proj.weight")),
    stack("weights and biases in one stack", _NO_NAMES, parts=("gate_proj.weight", "up_proj.bias")),
    stack("a part twice", "has a part twice", parts=("up_proj.weight", "up_proj.weight")),
    stack("a part of two stacks", "has a part twice", parts=("down_proj.weight", "up_proj.weight")),
    stack("hundreds of parts", "303 parts", parts=tuple(f"a{number}.weight" for number in range(300))),
    stack("millions of parts", "3000003 parts", parts=("",) * 3_000_000),
    stack("a part with a long name", "more than 512 characters", parts=("a" * 600 + ".weight", "up_proj.weight")),
    experts("a long prefix", "for layers.0 is invalid", mixtures={"layers.0": replace(MIXTURE, prefix="a." * 500_000)}),
    stack("a module inside of another", "inside of another", place=1, parts=("up_proj.x.weight",)),
    stack("a bias of no weight", "belongs to no weight", place=2, parts=("gate_proj.bias", "side_proj.bias")),
    stack("an axis that is not there", _NO_AXIS, axis=2),
    stack("a negative axis", _NO_AXIS, axis=-1),
    stack("a bias along columns", _NO_AXIS, place=2, axis=1),
    stack("a bias that is transposed", _NO_AXIS, place=2, is_transposed=True),
    stack("an input of no stack", "has the input 3", input=3),
    stack("a negative input", "has the input -1", input=-1),
    layout(
        "a matrix that is a vector",
        "does not split into",
        stacks=(*STACKS[:2], replace(STACKS[2], parts=("a.weight",))),
        pairs=(),
    ),
    stack("a bias of another size", "does not fit its weight", axis=1),
    stack(
        "a stack that cannot be divided",
        "does not split into",
        place=1,
        parts=("down_proj.weight", "b.weight", "c.bias"[:2] + "weight"),
    ),
    layout("numbers for fewer experts", "number for each of 2 experts", numbers=(0, 1)),
    layout("one number for two experts", "number for each of 2 experts", numbers=(0, 1, 0, 1)),
    layout("numbers that are no runs", "are not runs", numbers=(0, 2, 4)),
    layout("a negative number", "are not runs", numbers=(-1, 2)),
    layout("numbers without bound", "are not runs", numbers=(0, 2**60)),
    layout("very many numbers", "more than 262144 parameters", numbers=(0, 2**20)),
    layout("two pairs", "more than one pair", pairs=(PAIR, PAIR)),
    pair("a pair of one module", "its pair is", producer="down_proj", bias=""),
    pair("a pair of no module", "its pair is", module="side_proj"),
    pair("a pair with another's bias", "has the bias 'gate_proj.bias'", bias="gate_proj.bias"),
    pair("rows that are not there", "a row of up_proj for each column", channels=(1, 6)),
    pair("too few rows", "a row of up_proj for each column", channels=(0, 5)),
    pair("rows that are no runs", "a row of up_proj for each column", channels=(0, 5, 1)),
    pair("rows without bound", "a row of up_proj for each column", channels=(0, 2**62)),
    named("tensors of other names", "not named as its layout states"),
    named("tensors of no expert", "do not belong to an expert", *_EACH, "layers.0.2.../x"),
    named("tensors of another module", "do not belong to an expert", *_EACH, "lm_head.weight"),
    experts(
        "a second parameter of one name",
        "second parameter 1.up_proj.weight",
        parameters={**PARAMETERS, "layers.0.1.up_proj.weight": parameter("x", (6, 4))},
    ),
    experts(
        "a flat stack that is made",
        "no axis for experts",
        leaf_kinds=(replace(KIND, options={**OPTIONS, "flat": ("down",)}),),
        parameters={**PARAMETERS, "layers.0.down": parameter("x", (8, 6), conversion=0, sources=("a", "b"))},
        conversions=manifest().conversions,
    ),
    experts("a lookup table of no parameter", "is neither an embedding nor", lookups=("layers.1.weight",)),
    experts("a lookup table of experts", "is neither an embedding nor", lookups=("layers.0.down",)),
]
LOOKUPS = [
    Attack("a lookup table twice", "is listed twice", lambda root: write(root, lookups=("head.weight", "head.weight"))),
    Attack(
        "a lookup table that is no matrix",
        "is neither an embedding nor",
        lambda root: write(
            root, lookups=("head.weight",), parameters={**manifest().parameters, "head.weight": parameter("x", (2,))}
        ),
    ),
    Attack(
        "a lookup table that a module owns",
        "is neither an embedding nor",
        lambda root: write(root, lookups=("layers.0.weight",)),
    ),
]
ATTACKS = [*EXPERTS, *LOOKUPS]
