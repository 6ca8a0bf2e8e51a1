"""The same input gives the same bytes: on every machine, for every user, in every process."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from runtime.errors import ModelError, UsageError
from seqbuild import compile_model
from seqbuild.build import build
from seqbuild.verify.rebuild import rebuild
from tests import zoo
from tests.own_code_model import write_own_code_model
from tests.sweep import sweep
from tests.tiny_models import save_config, tiny_model

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
os.umask(int(sys.argv[3]))
ballast = [bytearray(int(sys.argv[2])) for _ in range(50)]  # another layout of the memory
from seqbuild import compile_model
for model, leaves in zip(sys.argv[4:], ("auto", "target")):
    print(compile_model(model, out=sys.argv[1], targets_per_subgraph=2, leaves=leaves))
"""
# Hash seed, user, home, language, time zone, allocator, environment: whatever machines and users differ in. This
# process is another world.
WORLDS: list[dict[str, str]] = [
    {"PYTHONHASHSEED": "0", "USER": "alice", "LANG": "C", "TZ": "UTC", "MALLOC_ARENA_MAX": "1", "COLUMNS": "20"},
    {"PYTHONHASHSEED": "4711", "LOGNAME": "bob", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "PYTHONMALLOC": "malloc"},
]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def unrandomized() -> list[str]:
    """How to start a process whose memory lies where it always lies; nothing where that cannot be asked for."""
    command = ["setarch", platform.machine(), "--addr-no-randomize"]
    can = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if can else []


def save_models(folder: Path) -> list[Path]:
    """A mixture of experts, and a model whose forward goes through sets."""
    (gemma4,) = (case for case in zoo.cases() if case.name == "causal LM/gemma4_text")
    zoo.small_config(gemma4).save_pretrained(folder / "gemma4")
    return [save_config("qwen3_moe", folder / "model"), folder / "gemma4"]


@pytest.mark.parametrize("index", sweep(range(len(WORLDS)), 1))
def test_processes_of_several_worlds(index: int, tmp_path: Path) -> None:
    here = zip(save_models(tmp_path / "here"), ("auto", "target"), strict=True)
    made = [compile_model(model, out=tmp_path / "out", targets_per_subgraph=2, leaves=leaves) for model, leaves in here]
    world, home = WORLDS[index], tmp_path / "home"
    (home / "deeper").mkdir(parents=True)
    models = [os.path.relpath(model, home / "deeper") for model in save_models(home / "somewhere")]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "there"), str(100**index * 1000)]
    command += [str((0, 0o077)[index]), *models]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(home)}
    done = subprocess.run(
        [*(unrandomized() if index == 1 else []), *command],
        cwd=home / "deeper",
        env={**environment, "OMP_NUM_THREADS": str(1 + index % 2), "HF_HUB_OFFLINE": "1", **world},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [(path.name, contents(path)) for path in paths] == [(path.name, contents(path)) for path in made]
    everything = b"".join(data for path in paths for data in contents(path).values())
    for secret in (str(tmp_path), *(world[key] for key in ("USER", "LOGNAME") if key in world), "somewhere"):
        assert secret.encode() not in everything


class TestRebuild:
    def test_from_the_artifact_alone(self, compiled: Callable[..., Path], tmp_path: Path) -> None:
        path = shutil.copytree(compiled("llama", targets_per_subgraph=2), tmp_path / "artifact")
        found = rebuild(path)
        assert (found.is_same, found.differing, found.ingredients) == (True, (), ())
        assert "the same" in str(found)

    def test_other_bytes_are_named(self, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        path = compiled("llama")
        monkeypatch.setattr("seqbuild.cache.key.own_digest", lambda: "another seqbuild")
        found = rebuild(path)
        assert (found.is_same, found.differing) == (False, ("manifest.msgpack",))
        assert found.ingredients == ("seqbuild_source",)
        assert str(found).endswith(
            "gives different bytes in manifest.msgpack; these ingredients differ here: seqbuild_source"
        )

    def test_beside_a_checkpoint(self, tmp_path: Path) -> None:
        model = save_config("llama", tmp_path / "model")
        save_file(dict(tiny_model("llama").state_dict()), model / "model.safetensors")
        path = build(model, out=tmp_path / "out").path
        with pytest.raises(UsageError, match="was compiled with a checkpoint"):
            rebuild(path)
        assert rebuild(path, source=model).is_same

    def test_own_code_needs_consent(self, tmp_path: Path) -> None:
        model = write_own_code_model(tmp_path / "model")
        path = build(model, out=tmp_path / "out", trust_remote_code=True).path
        with pytest.raises(ModelError, match="brings its own code"):
            rebuild(path, source=model)
        assert rebuild(path, source=model, trust_remote_code=True).is_same
