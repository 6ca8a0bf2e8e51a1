"""The host's part runs where there is no compiler, no tracing, no network and no model's code, with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from seqbuild.build import build
from tests.runtime.small import NARROW_W4, Small, calibrate, nameless_bytes, recipe, write_token_file
from tests.sweep import sweep

ROOT = Path(__file__).parents[2]

WALLS = """
import importlib.abc, socket, sys

# transformers' own table of models is imported by compressed-tensors; what is named after a model is not to be.
class NoCompiler(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "seqbuild":
            raise AssertionError("the compiler was imported: " + name)
        if name.startswith("transformers.models.") and ".modeling_" in name and ".auto." not in name:
            raise ImportError("no model's code here: " + name)

sys.meta_path.insert(0, NoCompiler())

def forbid(owner, name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{owner.__name__}.{name} was called")
    setattr(owner, name, refuse)

for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
    forbid(socket.socket, name)
for name in ("create_connection", "create_server", "getaddrinfo", "gethostbyname"):
    forbid(socket, name)

import torch
import torch._dynamo
import torch._dynamo.convert_frame
import torch.export
import torch.fx
import torch.jit
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import proxy_tensor

forbid(torch.fx.Tracer, "trace")
forbid(torch.fx.Tracer, "create_node")
forbid(torch.fx, "symbolic_trace")
forbid(proxy_tensor, "make_fx")
forbid(proxy_tensor.ProxyTorchDispatchMode, "__enter__")
forbid(proxy_tensor.PythonKeyTracer, "create_proxy")
forbid(torch, "compile")
forbid(torch.jit, "trace")
forbid(torch.export, "export")
forbid(torch._dynamo, "optimize")
"""

CHECK_THE_WALLS = """
for attempt in (
    lambda: __import__("seqbuild"),
    lambda: torch.fx.Tracer().trace(torch.nn.ReLU()),
    lambda: proxy_tensor.make_fx(torch.relu)(torch.ones(1)),
    lambda: proxy_tensor.ProxyTorchDispatchMode(None, "fake").__enter__(),
    lambda: socket.socket().connect(("127.0.0.1", 9)),
):
    try:
        attempt()
    except AssertionError:
        continue
    sys.exit("a wall has a hole")
"""

# The last artifact needs code of transformers, so it proves that the wall holds.
RUN = """
from runtime.cli.app import main
artifact, data, weights, recipe, out, at_layers = sys.argv[1:]
common = ["--data", data, "--weights"]
code = main(["calibrate", artifact, *common, weights, "--recipe", recipe, "-o", out, "--json"])
code = code or main(["evaluate", artifact, *common, out, "--json"])
sys.exit(code or main(["evaluate", at_layers, *common, weights]) - 2)
"""


@pytest.mark.parametrize(
    ("name", "scheme"),
    sweep([("llama", "W4A16_ASYM"), ("mixtral", "W8A8"), ("qwen3_moe", "W8A8")], ("mixtral", "W8A8")),
)
def test_a_walled_in_run_gives_the_same_bytes(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, scheme: str
) -> None:
    small: Small = request.getfixturevalue(name)
    at_layers = build(small.weights, out=tmp_path, leaves="target").path
    text = f"GPTQModifier: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    data = write_token_file(tmp_path / "tokens.safetensors")
    paths = [small.artifact, data, small.weights, tmp_path / "recipe.yaml", tmp_path / "walled", at_layers]
    done = subprocess.run(
        [sys.executable, "-c", WALLS + CHECK_THE_WALLS + RUN, *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "transformers.models" in done.stderr

    batches = runtime.batches(runtime.load_tokens(data).samples, 8)
    plan = runtime.Recipe.from_file(tmp_path / "recipe.yaml")
    artifact = small.load()
    runtime.calibrate(artifact, weights=small.weights, recipe=plan, batches=batches, out=tmp_path / "free")
    assert nameless_bytes(tmp_path / "free") == nameless_bytes(tmp_path / "walled")
    result = runtime.evaluate(artifact, weights=tmp_path / "free", batches=batches)
    assert json.loads(done.stdout.splitlines()[1])["perplexity"] == result.perplexity


@pytest.mark.parametrize("name", sweep(["llama", "mixtral"], "mixtral"))
def test_the_models_own_code_gives_the_same_bytes(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """Of all but experts, which an artifact that stops at layers leaves as they are."""
    small: Small = request.getfixturevalue(name)
    at_layers = Small(weights=small.weights, artifact=build(small.weights, out=tmp_path, leaves="target").path)
    plan = recipe(NARROW_W4.replace("lm_head", "lm_head, re:.*experts.*"), modifier="GPTQModifier")
    calibrate(small, plan, tmp_path / "portable")
    calibrate(at_layers, plan, tmp_path / "own-code")
    found = [nameless_bytes(tmp_path / name, artifact=None) for name in ("portable", "own-code")]
    assert found[0] == found[1]
