"""Reading artifacts: what is right is run, anything else is refused before it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtime.chain
import runtime.language.program
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME, ConversionEntry, FileEntry, ModelEntry, TensorEntry
from runtime.chain import check, check_versions, load, read_manifest, resolve_opaque
from runtime.errors import ArtifactError, ModelError, VersionError
from tests.runtime.artifacts import FIRST, entry, files, manifest, write


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False)])
        self.head = nn.Linear(2, 2, bias=False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "artifact")


@pytest.fixture(autouse=True)
def _nothing_is_executed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of what is refused, the step from text to code must not be reached."""
    if "refused" in request.node.name:
        monkeypatch.setattr(
            runtime.language.program, "compile_program", lambda *_: pytest.fail("code of a bad artifact was compiled")
        )


def refuse(path: Path, pattern: str = "") -> str:
    with pytest.raises(ArtifactError) as caught:
        load(path, allow_version_skew=True)
    assert pattern in str(caught.value)
    return str(caught.value)


def test_a_good_artifact_runs(artifact: Path) -> None:
    loaded = load(artifact, allow_version_skew=True)
    assert loaded.path == artifact
    assert loaded.manifest == manifest()
    first, second = loaded.subgraphs
    assert (first.input_names, first.consumed_names) == (("x",), ("x",))
    assert first.source == FIRST
    model = Model()
    x = torch.randn(3, 2)
    hidden = first.forward(model, x=x)
    expected = model.layers[0](x + torch.tensor([1.0, 2.0]))
    assert torch.equal(hidden["layers_0"], expected)
    assert torch.equal(second.forward(model, **hidden)["output"], expected @ model.head.weight)
    assert first.submodules(model) == [model.layers[0]]
    assert loaded.constants["constant_0"].tolist() == [1.0, 2.0]
    (conversion,) = loaded.conversions
    run = loaded.run(torch.device("cpu"), torch.float32)
    assert conversion(None, torch.ones(1), torch.zeros(2), run=run)["value"].tolist() == [1.0, 0.0, 0.0]


def test_a_program_reaches_torch_and_nothing_else(artifact: Path) -> None:
    loaded = load(artifact, allow_version_skew=True)
    names = loaded.subgraphs[0]._program.__globals__
    expected = {"__builtins__", "torch", "slice", "range", "__begin", "__calculate", "__field"}
    expected |= {"__attention", "__repeated", "__tiled"}  # what `runtime.language.rewrite` calls
    assert {name for name in names if name != "forward"} == expected
    assert names["__builtins__"] == {}


class TestFiles:
    def test_every_kind_of_damage_is_refused(self, artifact: Path) -> None:
        """The first, the last and every hundredth byte of every file; all of the manifest is in test_manifest."""
        for name in sorted(files()):
            path = artifact / name
            good = path.read_bytes()
            for position in sorted({0, len(good) - 1, *range(0, len(good), 100)}):
                bad = bytearray(good)
                bad[position] ^= 0x10
                path.write_bytes(bytes(bad))
                refuse(artifact, f"{name} is damaged")
            path.write_bytes(good[:-1])
            refuse(artifact, f"{name} is damaged")
            path.write_bytes(good + b"\n")
            refuse(artifact, f"{name} is damaged")
            path.write_bytes(b"")
            refuse(artifact, f"{name} is damaged")
            path.write_bytes(good)
        check(artifact)

    def test_damage_of_the_manifest_is_refused(self, artifact: Path) -> None:
        path = artifact / MANIFEST_NAME
        good = path.read_bytes()
        for position in (0, 7, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bytes(bad))
            refuse(artifact)

    @pytest.mark.parametrize("name", ["extra.txt", ".hidden", "subgraphs/002.py", "deep/er/file", "manifest.json"])
    def test_an_unlisted_file_is_refused(self, name: str, artifact: Path) -> None:
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_bytes(b"")
        refuse(artifact, f"contains {name}, which its manifest does not list")

    @pytest.mark.parametrize("name", sorted(files()))
    def test_a_missing_file_is_refused(self, name: str, artifact: Path) -> None:
        (artifact / name).unlink()
        refuse(artifact, f"is incomplete: {name}")
        (artifact / name).mkdir()
        refuse(artifact, f"is incomplete: {name}")

    def test_links_are_refused(self, artifact: Path, tmp_path: Path) -> None:
        for name in (*sorted(files()), MANIFEST_NAME):
            path, elsewhere = artifact / name, tmp_path / "elsewhere"
            shutil.copy(path, elsewhere)
            path.unlink()
            path.symlink_to(elsewhere)
            refuse(artifact)
            path.unlink()
            shutil.copy(elsewhere, path)
        check(artifact)
        shutil.move(artifact / "subgraphs", tmp_path / "moved")
        (artifact / "subgraphs").symlink_to(tmp_path / "moved")
        refuse(artifact, "subgraphs is not a plain file")

    def test_pipes_are_refused(self, artifact: Path) -> None:
        os.mkfifo(artifact / "pipe")
        refuse(artifact, "pipe is not a plain file")

    @pytest.mark.parametrize(
        "path",
        [
            "../outside.txt",
            "subgraphs/../../outside.txt",
            "/etc/hostname",
            "./config.json",
            "subgraphs//000.py",
            "subgraphs/./000.py",
            "sub\\graphs",
            "a\0b",
            "",
            ".",
            "..",
            "manifest.msgpack",
        ],
    )
    def test_paths_that_leave_are_refused(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "outside.txt").write_bytes(b"secret")
        odd = FileEntry(path=path, bytes=6, sha256=sha256(b"secret"))
        write(tmp_path / "artifact", files=(*manifest().files, odd))
        refuse(tmp_path / "artifact", "which leaves the directory or is not plain")

    def test_a_file_that_is_listed_twice_is_refused(self, tmp_path: Path) -> None:
        listed = manifest().files
        refuse(write(tmp_path / "artifact", files=(*listed, listed[0])), "lists config.json twice")

    def test_places_that_are_no_artifact_are_refused(self, tmp_path: Path) -> None:
        refuse(tmp_path / "nothing", "is not a directory")
        (tmp_path / "file").write_text("x")
        refuse(tmp_path / "file", "is not a directory")
        (tmp_path / "empty").mkdir()
        refuse(tmp_path / "empty", "has no manifest.msgpack")
        (tmp_path / "odd" / MANIFEST_NAME).mkdir(parents=True)
        refuse(tmp_path / "odd", "has no manifest.msgpack")


def program(**changes: Any) -> dict[str, Any]:
    """A chain of one subgraph at subgraphs/000.py."""
    fields = {"file": "subgraphs/000.py", "input_names": ("x",), "output_names": ("y",), **changes}
    return {
        "subgraphs": (entry(**fields),),
        "values": {name: TensorEntry(dtype="model", shape=("batch",)) for name in fields["output_names"]},
        "conversions": (),
        "parameters": {},
        "constants": (),
    }


def with_source(tmp_path: Path, statement: str, **changes: Any) -> Path:
    source = f'def forward(self, x, *, run):\n    {statement}\n    return {{"y": y}}\n'
    return write(tmp_path / "artifact", {"subgraphs/000.py": source.encode()}, **program(**changes))


class TestPrograms:
    def test_a_small_one_is_accepted(self, tmp_path: Path) -> None:
        path = with_source(tmp_path, "y = torch.ops.aten.neg.default(x)")
        assert load(path, allow_version_skew=True).subgraphs[0].forward(Model(), x=torch.ones(1))["y"].tolist() == [
            -1.0
        ]

    @pytest.mark.parametrize(
        ("statement", "pattern"),
        [
            ("y = __import__('os').system('touch owned')", "is not allowed"),
            ("y = open('owned', 'w')", "is not allowed"),
            ("y = torch.load(x)", "torch.load is not allowed"),
            ("y = torch.ops.aten.add.no_such_thing(x)", "which torch"),
            ("y = torch.ops.aten.neg.no_such_overload(x)", "which torch"),
            ("y = torch.ops.aten.from_file.default('owned', True, 8)", "operator from_file is not allowed"),
            ("y = torch.ops.aten.save.default(x, 'owned')", "is not allowed"),
            ("y = torch.ops.aten.set.source_Storage(x, x)", "the operator set"),
            ("y = torch.ops.aten.to_here.default(x)", ""),
            ("y = torch.ops.aten._dir.default(x)", "the operator _dir"),
            ("y = torch.ops.aten.name.default(x)", "the operator name"),
            ("y = torch.ops.profiler._record_function_enter.default(x)", "is not allowed"),
        ],
    )
    def test_bad_code_with_good_digests_is_refused(self, statement: str, pattern: str, tmp_path: Path) -> None:
        os.chdir(tmp_path)
        refuse(with_source(tmp_path, statement), pattern)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "path",
        [
            "os:system",
            "os:popen",
            "builtins:exec",
            "posix:system",
            "subprocess:run",
            "torch:load",
            "transformers:AutoModel.from_pretrained",
            "transformers.dynamic_module_utils:get_class_in_module",
            "transformers.dynamic_module_utils:get_class_from_dynamic_module",
            "transformers.modeling_utils:PreTrainedModel.from_pretrained",
            "transformers.models.rag.modeling_rag:RagModel.from_pretrained_question_encoder_generator",
            "transformers.models.wav2vec2.modeling_wav2vec2:Wav2Vec2ForCTC.load_adapter",
            "transformers.models.llama.modeling_llama:os.system",
            "transformers.models.llama.modeling_llama:LlamaModel.__init__.__globals__",
            "transformers.models.llama.modeling_llama",
            "transformers.pytorch_utils:apply_chunking_to_forward",
            "transformers.utils.hub:cached_file",
            "transformersx.models.llama.modeling_llama:rotate_half",
            "tests.runtime.artifacts:write",
            ":",
            "",
        ],
    )
    def test_opaque_steps_that_reach_out_are_refused(self, path: str, tmp_path: Path) -> None:
        os.chdir(tmp_path)
        statement = f'y = run.opaque["{path}"]("touch owned")'
        refuse(with_source(tmp_path, statement, opaque=(path,)), "is not allowed")
        with pytest.raises(ArtifactError, match=f"opaque step {path!r} is not allowed"):
            resolve_opaque(path)
        assert not (tmp_path / "owned").exists()

    def test_opaque_steps_of_models_are_accepted(self, tmp_path: Path) -> None:
        path = "transformers.models.llama.modeling_llama:rotate_half"
        artifact = load(with_source(tmp_path, f'y = run.opaque["{path}"](x)', opaque=(path,)), allow_version_skew=True)
        assert artifact.subgraphs[0].forward(Model(), x=torch.tensor([1.0, 2.0]))["y"].tolist() == [-2.0, 1.0]
        method = resolve_opaque("transformers.models.llama.modeling_llama:LlamaRMSNorm.forward")
        with pytest.raises(ArtifactError, match="is called with a Model"):
            method(Model(), torch.ones(2))

    def test_an_opaque_step_that_this_host_lacks(self) -> None:
        with pytest.raises(ArtifactError, match="defines no such function"):
            resolve_opaque("transformers.models.llama.modeling_llama:no_such_function")
        with pytest.raises(ArtifactError, match="the installed transformers has no"):
            resolve_opaque("transformers.models.nollama.modeling_nollama:forward")
        with pytest.raises(ArtifactError, match="defines no such function"):
            resolve_opaque("transformers.models.llama.modeling_llama:LlamaModel")

    @pytest.mark.parametrize(
        "changes",
        [
            {"input_names": ("x", "z")},
            {"input_names": ()},
            {"output_names": ("z",)},
            {"output_names": ()},
            {"submodules": ("layers.0",)},
            {"attributes": ("head.weight",)},
            {"constants": ("constant_0",)},
            {"objects": ("head",)},
            {"opaque": ("transformers.models.llama.modeling_llama:rotate_half",)},
            {"consumed_names": ("z",)},
            {"parameters": ("z",)},
            {"file": "subgraphs/001.py"},
        ],
        ids=str,
    )
    def test_a_manifest_that_says_otherwise_is_refused(self, changes: dict[str, Any], tmp_path: Path) -> None:
        refuse(with_source(tmp_path, "y = torch.ops.aten.neg.default(x)", **changes))

    def test_code_that_is_no_program_is_refused(self, tmp_path: Path) -> None:
        contents = files() | {"modeling.py": b"import os\n"}
        refuse(write(tmp_path / "artifact", contents), "modeling.py is Python code that")

    def test_programs_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        for index, bad in enumerate(
            (b"\xff\xfe", b"", b"x = (", b"def forward(self):\n\tpass\n        pass", b"(" * 5000)
        ):
            refuse(write(tmp_path / str(index), files() | {"subgraphs/000.py": bad}), "subgraphs/000.py")

    def test_contradictions_in_the_tables_are_refused(self, tmp_path: Path) -> None:
        bad = manifest().parameters["head.weight"]
        for number in (-2, 1, 99):
            changed = type(bad)(shape=(2, 2), dtype="model", bytes=16, sources=("a",), conversion=number, tied_to="")
            parameters = {**manifest().parameters, "head.weight": changed}
            refuse(write(tmp_path / str(number), parameters=parameters), f"conversion {number}, which does not exist")
        refuse(write(tmp_path / "constants", constants=()), "needs 'constant_0'")
        refuse(write(tmp_path / "parameters", parameters={}), "needs 'layers.0.weight'")
        odd = ConversionEntry(file="conversions/000.py", num_sources=3)
        refuse(write(tmp_path / "sources", conversions=(odd,)), "a signature that differs from the manifest's")

    def test_other_constants_than_stated_are_refused_at_once(self, tmp_path: Path) -> None:
        changed = files()
        del changed["constants.safetensors"]
        refuse(write(tmp_path / "lost", changed), "constants.safetensors")
        refuse(write(tmp_path / "bad", files() | {"constants.safetensors": b"12345678"}), "constants.safetensors")
        more = ("constant_0", "constant_1")
        path = write(tmp_path / "more", constants=more)
        with pytest.raises(ArtifactError, match="does not contain the tensors that the manifest lists"):
            load(path, allow_version_skew=True)


class TestVersions:
    def test_another_transformers(self, tmp_path: Path) -> None:
        path = write(tmp_path / "artifact", versions={"transformers": "4.0.0"})
        with pytest.raises(VersionError, match=r"compiled with transformers 4\.0\.0, this host has") as caught:
            load(path)
        assert "--allow-version-skew" in caught.value.hint
        assert len(load(path, allow_version_skew=True).subgraphs) == 2

    def test_the_same(self) -> None:
        import transformers

        check_versions(manifest(versions={"transformers": transformers.__version__}), allow_version_skew=False)


class TestSkeleton:
    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"module": "os", "class_name": "PathLike"}, ArtifactError),
            ({"module": "transformersx.models", "class_name": "X"}, ArtifactError),
            ({"module": "transformers.trainer", "class_name": "Trainer"}, ArtifactError),
            ({"module": "transformers.models.llama.modeling_llama", "class_name": "rotate_half"}, ArtifactError),
            ({"module": "transformers.models.llama.modeling_llama", "class_name": "NoSuchModel"}, ModelError),
            ({"module": "transformers.models.none.modeling_none", "class_name": "NoSuchModel"}, ModelError),
        ],
    )
    def test_classes_that_are_no_models(self, changes: dict[str, str], error: type[Exception], tmp_path: Path) -> None:
        model = manifest().model
        values = {name: getattr(model, name) for name in ModelEntry.__slots__}
        path = write(tmp_path / "artifact", model=ModelEntry(**{**values, **changes}))
        with pytest.raises(error, match=rf"{changes['module']}\.{changes['class_name']}"):
            load(path, allow_version_skew=True).empty_model()


def test_the_manifest_alone_can_be_read(artifact: Path) -> None:
    shutil.rmtree(artifact / "subgraphs")
    assert read_manifest(artifact) == manifest()
