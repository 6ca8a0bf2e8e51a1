"""The benchmarks: the table of a GPU, its floors and parts that fail, and the functions whose time is taken."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import bench_gptq, limit_phases
from tests.bench.gpu_table import (
    Layer,
    Part,
    Rates,
    Row,
    as_markdown,
    extrapolated,
    layer_floor,
    run_parts,
    write_table,
)

LLAMA = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_seconds_of_more_layers() -> None:
    assert extrapolated([3.0, 1.0, 1.5, 1.1], 32) == pytest.approx(3.0 + 31 * 1.1)
    assert extrapolated([2.0], 3) == 6.0
    assert extrapolated([2.0, 1.0], 1) == 2.0


def test_the_floor_of_a_layer() -> None:
    layer = Layer.of(LLAMA, num_samples=2, seq_len=10)
    assert layer.shapes == ((8, 8), (4, 8), (4, 8), (8, 8), (16, 8), (16, 8), (8, 16))
    assert layer.inputs == (8, 8, 8, 16)
    weights, last, attention = 64 + 32 + 32 + 64 + 128 + 128, 128, 8 * 10
    forwards = 20 * (2 * 2 * (weights + attention) + 2 * last)
    sums = 20 * (3 * 64 + 256)
    solves = (3 * 8**3 + 16**3) / 3 + sum(rows * width**2 for rows, width in layer.shapes)
    rates = Rates(narrow=1e3, wide=10.0, memory=1, upload=1, download=1, read=1, write=1, launch_s=1)
    assert layer_floor(layer, rates) == pytest.approx((forwards + sums) / 1e3 + solves / 10)


def test_the_table(tmp_path: Path) -> None:
    rows = [
        Row(what="a layer", measured=2.5, floor=0.5, note="a | b"),
        Row(what="a kernel", measured=0.00125),
        Row(what="copies", measured=123.4, unit="GB/s"),
        Row(what="peer", note="not run"),
    ]
    lines = as_markdown(rows).splitlines()
    assert len({len(line.replace("\\|", "_ ")) for line in lines}) == 1, "columns are of equal width"
    assert [cell.strip() for cell in lines[2].split(" | ")][:4] == ["| a layer", "2.50 s", "500.00 ms", "20%"]
    assert "1.25 ms" in lines[3]
    assert "123 GB/s" in lines[4]
    assert "a \\| b" in lines[2]
    write_table(rows, {"device": "cpu"}, tmp_path / "new")
    assert (tmp_path / "new" / "table.md").read_text().startswith("- device: cpu\n\n| what")
    found = json.loads((tmp_path / "new" / "table.json").read_text())
    assert found["facts"] == {"device": "cpu"}
    assert found["rows"][0]["share"] == 0.2 and found["rows"][3]["measured"] is None


def test_parts_that_fail_or_do_not_fit_are_rows() -> None:
    now = [0.0]

    def takes(seconds: float, name: str, error: Exception | None = None) -> Part:
        def rows(left: float) -> Iterator[Row]:
            now[0] += seconds
            yield Row(what=name, measured=seconds)
            if error is not None:
                raise error

        return Part(name=name, seconds=seconds, rows=rows)

    parts = [takes(5, "a"), takes(10, "b", RuntimeError("CUDA error:\n  no kernel")), takes(90, "c"), takes(80, "d")]
    rows = list(run_parts(parts, 100, clock=lambda: now[0]))
    assert [(row.what, row.measured) for row in rows] == [("a", 5), ("b", 10), ("b", None), ("c", None), ("d", 80)]
    assert rows[2].note == "failed: RuntimeError: CUDA error: no kernel"
    assert rows[3].note == "not run: needs about 90 s, 85 s are left"


def test_a_part_that_takes_too_long_is_stopped() -> None:
    def rows(left: float) -> Iterator[Row]:
        time.sleep(5)
        yield Row(what="never")

    found = list(run_parts([Part(name="slow", seconds=0.02, rows=rows)], 10))
    assert [row.note for row in found] == ["failed: TimeoutError: stopped after 0 s"]


def test_functions_whose_time_is_taken_exist() -> None:
    for _, module, owner, name in limit_phases.PLACES:
        place = importlib.import_module(module)
        assert callable(getattr(getattr(place, owner) if owner else place, name)), name
    called = importlib.import_module("runtime.algorithms.gptq")
    assert all(callable(getattr(called, name)) for names in bench_gptq.PHASES.values() for name in names)
