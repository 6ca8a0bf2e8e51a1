"""The time that a check takes grows with the size of the manifest, not with its square."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from runtime.artifact.cached_values import wrong_cached
from runtime.artifact.manifest import CachedValue, DimEntry, Manifest, ScaleGroup
from runtime.artifact.scale_groups import wrong_groups
from runtime.artifact.tables import check_tables
from tests.runtime.artifacts import manifest

MANY = 40_000
NAMES = tuple(f"m{number}" for number in range(MANY))
LIMIT_SECONDS = 10  # the square of these counts took minutes


def large(**changes: object) -> Manifest:
    """Return the usual manifest with many parameters, all used by its first subgraph."""
    base = manifest()
    weights = {f"{name}.weight": replace(base.parameters["head.weight"], shape=(2, 2)) for name in NAMES}
    first = replace(base.subgraphs[0], parameters=(*base.subgraphs[0].parameters, *weights))
    more = {"parameters": {**base.parameters, **weights}, "subgraphs": (first, *base.subgraphs[1:]), **changes}
    return replace(base, **more)


def test_many_scale_groups_and_cached_values() -> None:
    begin = time.monotonic()
    groups = tuple(ScaleGroup(subgraph=0, modules=(name,)) for name in reversed(NAMES))
    assert list(wrong_groups(large(scale_groups=groups))) == []
    fields = {"subgraph": 0, "kind": "A", "name": "add", "after": "add", "heads": 1}
    cached = tuple(CachedValue(module=name, part=part, **fields) for name in reversed(NAMES) for part in "kv")
    source = "def forward(self, x, *, run):\n    add = x\n    return {}\n"
    assert list(wrong_cached(large(cached=cached), dict.fromkeys(("subgraphs/000.py",), source))) == []
    assert time.monotonic() - begin < LIMIT_SECONDS


@pytest.mark.parametrize("table", ["defaults", "conditions"])
def test_many_constants_and_sizes(table: str) -> None:
    begin = time.monotonic()
    base = manifest()
    if table == "defaults":
        constants = (*(f"c{number}" for number in range(4 * MANY)), *base.constants)
        changed = large(constants=constants, defaults={f"{name}.weight": constants[-1] for name in NAMES})
    else:
        dims = tuple(DimEntry(name=name, min=1, max=-1) for name in NAMES)
        changed = large(dims=(*base.dims, *dims), conditions=tuple(f"{name} > 0" for name in NAMES[:4000]))
    check_tables(changed)
    assert time.monotonic() - begin < LIMIT_SECONDS


def test_the_parameters_are_not_searched_for_each_module() -> None:
    from unittest.mock import Mock

    from runtime.errors import RecipeError
    from runtime.quantize.assignments import _require_possible

    begin = time.monotonic()
    artifact, recipe = Mock(manifest=large()), Mock(source="recipe.yaml")
    source, model = Mock(origins=artifact.manifest.parameters), Mock()
    source.plain_key.side_effect = lambda name: name if name != f"{NAMES[-1]}.weight" else None
    jobs = {
        name: Mock(**{"scheme.weights": None, "scheme.input_activations": None}) for name in NAMES[::8] + NAMES[-1:]
    }
    model.get_submodule.return_value.get_parameter.return_value.shape = (2, 2)
    with pytest.raises(RecipeError, match=f"the weight of {NAMES[-1]} is not stored as one tensor"):
        _require_possible(artifact, model, source, recipe, jobs)
    assert time.monotonic() - begin < LIMIT_SECONDS
