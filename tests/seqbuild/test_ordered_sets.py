"""A forward that goes through a set is recorded alike in every process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from torch import nn

from seqbuild.trace.python.builtins import sets_in_order

ROOT = Path(__file__).parents[2]
PROGRAM = """
from seqbuild import trace_subgraphs
from seqbuild.sample.inputs import default_sample
from tests import zoo
(case,) = (case for case in zoo.cases() if case.name == "causal LM/gemma4_text")
model = zoo.small_model(case)
for subgraph in trace_subgraphs(model, default_sample(model), [type(model.model.layers[0]).__name__]):
    print(subgraph.code.source)
"""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinds = {"b", "a", "d", "c"}

    def forward(self) -> tuple[list[str], list[str], bool]:
        return list(self.kinds), list(set("zyxwv")), isinstance({1}, set)


def test_sets_are_gone_through_in_order_for_as_long_as_asked() -> None:
    layers = Layers()
    before = layers.kinds
    with sets_in_order([layers]):
        assert layers() == (list("abcd"), list("vwxyz"), True)
    assert "set" not in globals()
    assert layers.kinds == before


def test_another_hash_seed_gives_the_same_code() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(PROGRAM, {})  # in this process, whose seed is another
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "_attention" in run.stdout
    assert run.stdout == printed.getvalue()
