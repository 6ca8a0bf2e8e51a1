"""Compiling: where models come from, caching, same bytes, no weights, errors, checkpoint names."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import runtime.chain
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.errors import ModelError, OutputError, TargetError, TraceError, UsageError, WeightsError
from runtime.language.program import Run
from seqbuild import compile_model
from seqbuild.build import build
from tests.sweep import sweep
from tests.tiny_models import ZOO, save_config, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with nothing but a config."""
    return save_config("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the compiled `llama`; tests copy it."""
    out = tmp_path_factory.mktemp("made")
    build(llama, out=out)
    return out


@pytest.fixture
def filled(made: Path, out: Path) -> Path:
    """A directory in which `llama` has been compiled before."""
    return Path(shutil.copytree(made, out))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class TestSources:
    def test_a_directory(self, llama: Path, out: Path) -> None:
        path = compile_model(llama, out=out, leaves="target")
        assert path.parent == out
        assert re.fullmatch(r"tiny-llama-[0-9a-f]{12}", path.name)
        files = (
            ["config.json", "generation_config.json"]
            if (llama / "generation_config.json").exists()
            else ["config.json"]
        )
        subgraphs = [f"subgraphs/{index:03d}.py" for index in range(4)]
        assert sorted(contents(path)) == sorted([*files, MANIFEST_NAME, *subgraphs])
        assert (path / "config.json").read_bytes() == (llama / "config.json").read_bytes()
        manifest = runtime.chain.load(path).manifest
        assert manifest.model.class_name == "LlamaForCausalLM"
        assert manifest.targets == ("model.layers.0", "model.layers.1", "model.layers.2")
        assert manifest.target_patterns == ("LlamaDecoderLayer",)
        assert [entry.targets for entry in manifest.subgraphs] == [
            ("model.layers.0",),
            ("model.layers.1",),
            ("model.layers.2",),
            (),
        ]

    def test_a_bare_config(self, llama: Path, filled: Path) -> None:
        from_directory = compile_model(llama, out=filled)
        assert compile_model(llama / "config.json", out=filled) == from_directory
        other = llama.parent / "renamed.json"
        shutil.copy(llama / "config.json", other)
        assert re.fullmatch(r"renamed-[0-9a-f]{12}", compile_model(other, out=filled).name)

    def test_a_config_without_architectures_is_a_causal_language_model(self, tmp_path: Path, out: Path) -> None:
        config = tiny_config("llama")
        config.architectures = None
        config.save_pretrained(tmp_path / "bare")
        manifest = build(tmp_path / "bare", out=out).manifest
        assert manifest.model.class_name == "LlamaForCausalLM"

    def test_a_hub_id_in_the_local_cache(
        self, llama: Path, tmp_path: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hub" / "models--some-org--tiny-model"
        blob = repository / "blobs" / "abc"
        blob.parent.mkdir(parents=True)
        shutil.copy(llama / "config.json", blob)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to(blob)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        first = compile_model("some-org/tiny-model", out=filled)
        assert first == compile_model("some-org/tiny-model", out=filled, revision="main")
        assert first == compile_model("some-org/tiny-model", out=filled, revision=commit)
        with pytest.raises(ModelError, match="'some-org/tiny-model' at revision v2"):
            compile_model("some-org/tiny-model", out=filled, revision="v2")
        with pytest.raises(ModelError, match="the model 'some-org/other' is not in the local cache"):
            compile_model("some-org/other", out=filled)
        assert re.fullmatch(r"tiny-model-[0-9a-f]{12}", first.name)
        assert not (first / "config.json").is_symlink()


class TestCache:
    def test_the_second_call_is_a_hit(self, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = build(llama, out=out)
        assert not first.is_cached
        before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
        monkeypatch.setattr("seqbuild.passes.trace_first_working", lambda *_, **__: pytest.fail("a hit must not trace"))
        second = build(llama, out=out)
        assert second.is_cached
        assert second.manifest == first.manifest
        assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before

    def test_force_writes_the_same_bytes(self, llama: Path, filled: Path) -> None:
        first = build(llama, out=filled)
        before, inode = contents(first.path), first.path.stat().st_ino
        again = build(llama, out=filled, force=True)
        assert not again.is_cached
        assert again.path == first.path
        assert contents(first.path) == before
        assert first.path.stat().st_ino != inode
        assert [path.name for path in filled.iterdir() if path.is_dir()] == [first.path.name]

    @pytest.mark.parametrize("damage", ["changed", "lost", "added", "manifest"])
    def test_a_damaged_artifact_is_no_hit_and_is_mended(self, damage: str, llama: Path, filled: Path) -> None:
        path = compile_model(llama, out=filled)
        before = contents(path)
        victim = path / "subgraphs" / "001.py"
        if damage == "changed":
            victim.write_bytes(victim.read_bytes() + b"#\n")
        elif damage == "lost":
            victim.unlink()
        elif damage == "added":
            (path / "extra").write_text("x")
        else:
            (path / MANIFEST_NAME).write_bytes(b"")
        result = build(llama, out=filled)
        assert not result.is_cached
        assert contents(path) == before

    @pytest.mark.parametrize(
        "change",
        [
            {"targets": ["model.layers.0"]},
            {"targets_per_subgraph": 2},
            {"ignore": ["create_causal_mask"]},
            {"attn_implementation": "eager"},
        ],
        ids=str,
    )
    def test_every_option_changes_the_key(self, change: dict[str, Any], llama: Path, filled: Path) -> None:
        plain, changed = build(llama, out=filled).manifest, build(llama, out=filled, **change).manifest
        assert plain.input_key != changed.input_key
        (name,) = [name for name in plain.ingredients if plain.ingredients[name] != changed.ingredients[name]]
        assert name == next(iter(change))

    def test_the_config_changes_the_key(self, tmp_path: Path, llama: Path, filled: Path) -> None:
        other = save_config(
            "llama", tmp_path / "tiny-llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0}
        )
        plain, changed = build(llama, out=filled).manifest, build(other, out=filled).manifest
        assert [name for name in plain.ingredients if plain.ingredients[name] != changed.ingredients[name]] == [
            "config"
        ]


HUGE = """
import resource, sys
import torch
from seqbuild import compile_model
import transformers.models.llama.modeling_llama, transformers.masking_utils  # imports are not the compilation's memory

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = compile_model(sys.argv[1], out=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, path)
"""


@pytest.mark.parametrize(
    ("num_layers", "width", "num_parameters"),
    sweep([(126, 16384, 405_853_388_800), (8, 65536, 424_833_777_664)], (8, 65536, 424_833_777_664)),
)
def test_a_huge_model_compiles_without_memory(tmp_path: Path, num_layers: int, width: int, num_parameters: int) -> None:
    """400 billion parameters, 800 GB of weights: less than 300 MB more than the libraries themselves."""
    source = save_config(
        "llama",
        tmp_path / "huge",
        hidden_size=width,
        intermediate_size=width * 13 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", HUGE, str(source), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes, path = run.stdout.split()
    assert int(kilobytes) < 300_000
    manifest = runtime.chain.read_manifest(Path(path))
    assert manifest.model.num_parameters == num_parameters
    assert len(manifest.subgraphs) == num_layers + 1


def test_weights_are_never_read(tmp_path: Path, out: Path) -> None:
    """Headers of shards are all that compile looks at: the rest of the file may be missing."""
    directory = tmp_path / "model"
    tiny_model("llama").save_pretrained(directory)
    shard = directory / "model.safetensors"
    length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    shard.write_bytes(shard.read_bytes()[:length])
    manifest = build(directory, out=out).manifest
    assert manifest.parameters["lm_head.weight"].sources == ("lm_head.weight",)


class TestErrors:
    @contextlib.contextmanager
    def refused(
        self, error: type[Exception] | tuple[type[Exception], ...], pattern: str, out: Path
    ) -> Iterator[list[str]]:
        """What is inside must fail and leave nothing behind but the lock; yields a list that gets the message."""
        messages: list[str] = []
        with pytest.raises(error, match=pattern) as caught:
            yield messages
        messages.append(str(caught.value))
        assert [path for path in out.rglob("*") if path.suffix != ".lock"] == []

    @pytest.mark.parametrize(
        "name", ["no/such", "/no/such/place", "./nowhere", "a/b/c", "nothing.json", "", "bad name!", "~/x"]
    )
    def test_no_such_model(self, name: str, out: Path) -> None:
        with self.refused(
            ModelError, "there is no model|no model given|the model 'no/such' is not in the local cache", out
        ):
            compile_model(name, out=out)

    def test_a_directory_without_config(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "empty").mkdir()
        with self.refused(ModelError, "has no config.json", out):
            compile_model(tmp_path / "empty", out=out)

    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("{", "cannot be read"),
            ("", "cannot be read"),
            ("[1]", "is not a model config"),
            ('"llama"', "is not a model config"),
            ("{}", "is not a config that transformers supports"),
            ('{"model_type": "no_such_type"}', "is not a config that transformers supports.*no_such_type"),
            ('{"model_type": 3}', "is not a config that transformers supports"),
            (
                '{"model_type": "llama", "hidden_size": "wide"}',
                "is not a config that transformers supports|cannot be built",
            ),
            (
                '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
                "not a multiple of the number of attention heads",
            ),
            ('{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}', "brings its own code"),
            ('{"model_type": "patchtst"}', "cannot create sample inputs for \\w+ \\(past_values"),
        ],
    )
    def test_bad_configs(self, text: str, pattern: str, tmp_path: Path, out: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(text)
        error = (ModelError, TraceError, TargetError)
        with self.refused(error, pattern, out):
            compile_model(tmp_path / "model", out=out)

    def test_a_config_that_is_not_text(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
        with self.refused(ModelError, "cannot be read", out):
            compile_model(tmp_path / "config.json", out=out)

    def test_a_file_that_is_no_config(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with self.refused(ModelError, "is a file, but the model must be a directory", out):
            compile_model(tmp_path / "model.safetensors", out=out)

    def test_an_unknown_target_names_the_classes(self, llama: Path, out: Path) -> None:
        with self.refused(
            TargetError, "target 'LlamaDecoderLayr' matches no module of LlamaForCausalLM", out
        ) as messages:
            compile_model(llama, out=out, targets=["LlamaDecoderLayr"])
        (message,) = messages
        assert "did you mean LlamaDecoderLayer?" in message
        assert "LlamaMLP" in message

    def test_a_target_that_is_never_called(self, llama: Path, out: Path) -> None:
        # the list of layers is a module, but it is gone through, never called
        with self.refused(TargetError, "'model.layers' is never called by LlamaForCausalLM.forward", out):
            compile_model(llama, out=out, targets=["ModuleList"])

    def test_an_ignored_name_that_fits_nothing(self, llama: Path, out: Path) -> None:
        with self.refused(TargetError, "--ignore no_such_function matches no function of the model", out):
            compile_model(llama, out=out, ignore=["no_such_function"])

    @pytest.mark.parametrize("number", [0, -3])
    def test_targets_per_subgraph(self, number: int, llama: Path, out: Path) -> None:
        with self.refused(UsageError, f"targets per subgraph is {number}", out):
            compile_model(llama, out=out, targets_per_subgraph=number)

    def test_an_attention_that_does_not_exist(self, llama: Path, out: Path) -> None:
        with self.refused(UsageError, "--attn-implementation must be one of eager, sdpa; got 'psychic'", out):
            compile_model(llama, out=out, attn_implementation="psychic")

    def test_an_output_that_is_a_file(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OutputError, match="cannot write"):
                compile_model(llama, out=out)
        assert (tmp_path / "file").read_text() == "x"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_output_without_permission(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(OutputError, match="permission denied"):
            compile_model(llama, out=tmp_path / "closed")

    @pytest.mark.parametrize(("number", "reason"), [(13, "permission denied"), (30, "the file system is read-only")])
    def test_a_place_that_takes_no_files(
        self, number: int, reason: str, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        out.mkdir()  # the place is there, but the lock cannot be made in it
        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
        with self.refused(OutputError, reason, out):
            compile_model(llama, out=out)

    def test_a_failure_while_writing_leaves_nothing(
        self, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: Manifest) -> bytes:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Manifest, "to_bytes", full)
        with self.refused(OutputError, "the disk is full", out):
            compile_model(llama, out=out)

    def test_a_truncated_checkpoint(self, llama: Path, tmp_path: Path, out: Path) -> None:
        directory = shutil.copytree(llama, tmp_path / "model")
        (directory / "model.safetensors").write_bytes(b"\x10")
        with self.refused(WeightsError, "is not a safetensors file", out):
            compile_model(directory, out=out)
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text("[]")
        with self.refused(WeightsError, "is not an index of a checkpoint", out):
            compile_model(directory, out=out)


def load_by_manifest(artifact: runtime.chain.Artifact, directory: Path) -> dict[str, torch.Tensor]:
    """Every parameter, made from the checkpoint as the manifest says and from nothing else."""
    keys: dict[str, Path] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            keys |= dict.fromkeys(file.keys(), shard)

    def read(key: str) -> torch.Tensor:
        with safe_open(keys[key], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    run = Run(device=torch.device("cpu"), dtype=torch.float32)
    parameters = {}
    for name, entry in artifact.manifest.parameters.items():
        sources = [read(key) for key in entry.sources]
        if entry.conversion < 0:
            (parameters[name],) = sources
        else:
            parameters[name] = artifact.conversions[entry.conversion](None, *sources, run=run)["value"]
        assert tuple(parameters[name].shape) == entry.shape
    return parameters


class TestCheckpointKeys:
    @pytest.mark.parametrize(
        ("name", "sharded"),
        sweep(
            [*((name, False) for name in ZOO), ("qwen3_moe", True), ("t5", True)],
            *(("gpt2", False), ("mixtral", False), ("bert", False), ("qwen3_moe", True), ("t5", True)),
        ),
    )
    def test_the_table_makes_the_parameters_that_transformers_loads(
        self, name: str, sharded: bool, tmp_path: Path, out: Path
    ) -> None:
        model = tiny_model(name)
        directory = tmp_path / "model"
        model.save_pretrained(directory, max_shard_size="40kB" if sharded else "1GB")
        assert (directory / "model.safetensors.index.json").exists() == sharded
        loaded = getattr(transformers, ZOO[name][2]).from_pretrained(directory, dtype=torch.float32)
        made = load_by_manifest(runtime.chain.load(compile_model(directory, out=out)), directory)
        expected = loaded.state_dict()
        assert sorted(made) == sorted(expected)
        for key, tensor in expected.items():
            assert torch.equal(made[key], tensor), key

    @pytest.mark.parametrize("name", sweep(["llama", "mixtral", "qwen3_moe"], "llama", "mixtral"))
    def test_without_a_checkpoint_the_names_are_those_that_would_be_saved(
        self, name: str, compiled: Callable[..., Path], tmp_path: Path, out: Path
    ) -> None:
        tiny_model(name).save_pretrained(tmp_path / "full")
        full, bare = build(tmp_path / "full", out=out).manifest, runtime.chain.read_manifest(compiled(name))
        assert {key: entry.sources for key, entry in bare.parameters.items()} == {
            key: entry.sources for key, entry in full.parameters.items()
        }

    def test_fused_experts(self, tmp_path: Path, out: Path) -> None:
        tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
        manifest = build(tmp_path / "model", out=out).manifest
        entry = manifest.parameters["model.layers.1.mlp.experts.gate_up_proj"]
        prefix = "model.layers.1.mlp.experts"
        assert sorted(entry.sources) == sorted(
            f"{prefix}.{expert}.{kind}_proj.weight" for expert in range(4) for kind in ("gate", "up")
        )
        assert entry.shape == (4, 32, 32)  # 2 * moe_intermediate_size by hidden_size
        assert len(manifest.conversions) == 2  # all layers share: one for gate and up, one for down
        assert manifest.conversions[entry.conversion].num_sources == 8

    def test_tied_embeddings(self, compiled: Callable[..., Path], tmp_path: Path, out: Path) -> None:
        manifest = runtime.chain.read_manifest(compiled("qwen3"))
        assert manifest.parameters["lm_head.weight"].tied_to == "model.embed_tokens.weight"
        assert manifest.parameters["lm_head.weight"].sources == ("model.embed_tokens.weight",)
        assert manifest.parameters["model.embed_tokens.weight"].tied_to == ""
        untied = build(save_config("qwen3", tmp_path / "untied", tie_word_embeddings=False), out=out).manifest
        assert untied.parameters["lm_head.weight"].tied_to == ""
        assert untied.parameters["lm_head.weight"].sources == ("lm_head.weight",)
        assert untied.model.num_parameters - manifest.model.num_parameters == 128 * 32

    def test_a_head_that_stands_before_what_it_is_tied_to(self, tmp_path: Path, out: Path) -> None:
        """XLM-RoBERTa's: what is saved is what the head is tied to, though the head comes first."""
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = transformers.XLMRobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=40)
        model = transformers.XLMRobertaForMaskedLM(config).eval()
        model.save_pretrained(tmp_path / "model")
        embedding, head = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
        assert next(name for name in model.state_dict() if name in (embedding, head)) == head
        path = compile_model(tmp_path / "model", out=out)
        parameters = runtime.chain.load(path).manifest.parameters
        assert (parameters[head].tied_to, parameters[head].sources) == (embedding, (embedding,))
        assert parameters[embedding].tied_to == ""
        made = load_by_manifest(runtime.chain.load(path), tmp_path / "model")
        assert all(torch.equal(made[key], tensor) for key, tensor in model.state_dict().items())

    def test_parameters_of_subgraphs(self, compiled: Callable[..., Path]) -> None:
        manifest = runtime.chain.read_manifest(compiled("llama", leaves="target"))
        first, *_, last = manifest.subgraphs
        assert first.parameters == (
            "model.embed_tokens.weight",
            *(f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo"),
            *(f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
        )
        assert last.parameters == ("model.norm.weight", "lm_head.weight")
        assert manifest.parameters["model.layers.0.mlp.up_proj.weight"].shape == (48, 32)
        assert manifest.parameters["model.layers.0.mlp.up_proj.weight"].bytes == 48 * 32 * 4
        together = {name for entry in manifest.subgraphs for name in entry.parameters}
        assert together == set(manifest.parameters)


def test_manifest_states_shapes_in_names(compiled: Callable[..., Path]) -> None:
    manifest = runtime.chain.read_manifest(compiled("llama", leaves="target"))
    assert [(entry.name, entry.dtype, entry.shape) for entry in manifest.inputs] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert manifest.values["model_layers_0"].shape == ("batch", "sequence", 32)
    assert manifest.values["model_layers_0"].dtype == "model"
    assert manifest.values["logits"].shape == ("batch", "sequence", 128)
    assert [dim.name for dim in manifest.dims] == ["batch", "sequence"]
    assert {(dim.min, dim.max) for dim in manifest.dims} == {(1, -1)}


@pytest.mark.parametrize("default", sweep(["float32", "bfloat16", "float16"], "float32", "bfloat16"))
def test_bytes_are_counted_in_the_models_own_dtype(default: str, tmp_path: Path, out: Path) -> None:
    source = save_config("llama", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": default}))
    manifest = build(source, out=out).manifest
    assert manifest.model.dtype == default
    assert manifest.parameters["lm_head.weight"].bytes == 128 * 32 * (4 if default == "float32" else 2)
