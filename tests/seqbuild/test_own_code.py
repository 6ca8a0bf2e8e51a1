"""Compiling models that bring their own code: consent, what is found, and what must never be executed or fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import seqbuild.cli.app
from runtime.chain import check
from runtime.errors import ModelError
from seqbuild.build import build
from seqbuild.model.own_code import read_references
from tests.own_code_model import AUTO_MAP, CONFIGURATION, FILES, MODELING, write_own_code_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def trace_of(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()\n"


def marked(marker: Path, **files: str) -> dict[str, str]:
    """The model's files, each of which leaves a trace when it is executed."""
    return {name: trace_of(marker) + text for name, text in (FILES | files).items()}


def refuse(directory: Path, out: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        build(directory, out=out, **options)
    assert not out.exists()
    assert "\n" not in caught.value.message
    return str(caught.value)


class TestConsent:
    def test_without_it_nothing_is_executed(self, tmp_path: Path, out: Path, marker: Path) -> None:
        said = refuse(write_own_code_model(tmp_path / "toy", marked(marker)), out)
        assert said.startswith(
            "toy brings its own code, for ToyConfig (AutoConfig), ToyForCausalLM (AutoModelForCausalLM)"
        )
        assert ": this would execute configuration_toy.py, modeling_toy.py, toy_activation.py, toy_layers.py (" in said
        assert said.endswith("allow it with --trust-remote-code)")
        assert not marker.exists()

    def test_with_it_the_code_runs_and_travels(self, tmp_path: Path, out: Path, marker: Path) -> None:
        files = marked(marker)
        done = build(write_own_code_model(tmp_path / "toy", files), out=out, trust_remote_code=True)
        marker.unlink()
        check(done.path)
        assert not marker.exists()
        model = done.manifest.model
        assert (model.class_name, model.config_class_name) == ("ToyForCausalLM", "ToyConfig")
        package = model.module.partition(".")[0]
        assert (model.module, model.config_module) == (f"{package}.modeling_toy", f"{package}.configuration_toy")
        assert model.code == tuple(f"modeling/{name}" for name in sorted(FILES))
        assert {path.name: path.read_text() for path in (done.path / "modeling").iterdir()} == files
        assert not [name for name in sys.modules if name.startswith(package)]

    def test_on_the_command_line(
        self, tmp_path: Path, out: Path, marker: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        command = ["compile", str(write_own_code_model(tmp_path / "toy", marked(marker))), "--out", str(out)]
        assert seqbuild.cli.app.main(command) == 2
        complaint = capfd.readouterr().err
        assert complaint.startswith("seqbuild: error: toy brings its own code")
        assert complaint.count("\n") == 1
        assert not marker.exists()
        assert seqbuild.cli.app.main([*command, "--trust-remote-code"]) == 0

    def test_a_tokenizers_code_alone_needs_none(self, tmp_path: Path, out: Path) -> None:
        """The model is transformers' own; its tokenizer is not touched."""
        directory = write_own_code_model(
            tmp_path / "toy",
            {},
            {"AutoTokenizer": ["tok.Toy", None]},
            model_type="llama",
            architectures=["LlamaForCausalLM"],
        )
        assert build(directory, out=out).manifest.model.code == ()


class TestSameBytes:
    def test_from_any_directory(self, tmp_path: Path, out: Path) -> None:
        first, second = (
            build(write_own_code_model(tmp_path / place / "toy"), out=tmp_path / place / "out", trust_remote_code=True)
            for place in ("one", "another")
        )
        assert first.path.name == second.path.name
        for path in sorted(first.path.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                assert data == (second.path / path.relative_to(first.path)).read_bytes()
                assert str(tmp_path).encode() not in data
        assert build(tmp_path / "one" / "toy", out=tmp_path / "one" / "out", trust_remote_code=True).is_cached

    def test_the_code_is_an_ingredient(self, tmp_path: Path, out: Path) -> None:
        changed = FILES | {"toy_activation.py": FILES["toy_activation.py"] + "# changed\n"}
        first = build(write_own_code_model(tmp_path / "1" / "toy"), out=out, trust_remote_code=True).manifest
        other = build(write_own_code_model(tmp_path / "2" / "toy", changed), out=out, trust_remote_code=True).manifest
        differing = [name for name in first.ingredients if first.ingredients[name] != other.ingredients[name]]
        assert "model_code" in differing
        assert first.input_key != other.input_key


class TestWhatIsFound:
    def test_subpackages_and_what_nothing_needs(self, tmp_path: Path, out: Path) -> None:
        files = FILES | {
            "modeling_toy.py": MODELING.replace("from .toy_layers", "from .parts.toy_layers"),
            "parts/toy_layers.py": FILES["toy_layers.py"].replace("from .toy_activation", "from ..toy_activation"),
            "parts/__init__.py": "from . import constants\n",
            "parts/constants.py": "ONE = 1\n",
            "unrelated.py": "raise RuntimeError\n",
            "__init__.py": "raise RuntimeError\n",
        }
        del files["toy_layers.py"]
        done = build(write_own_code_model(tmp_path / "toy", files), out=out, trust_remote_code=True)
        names = ("configuration_toy", "modeling_toy", "parts/__init__", "parts/constants", "parts/toy_layers")
        assert done.manifest.model.code == tuple(f"modeling/{name}.py" for name in (*names, "toy_activation"))

    def test_a_config_of_transformers_with_a_model_of_its_own(self, tmp_path: Path, out: Path) -> None:
        modeling = (
            "from transformers import LlamaForCausalLM\n"
            "class Mine(LlamaForCausalLM):\n"
            "    def forward(self, input_ids, attention_mask=None):\n"
            "        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)\n"
        )
        directory = write_own_code_model(
            tmp_path / "mine", {"mine.py": modeling}, {"AutoModelForCausalLM": "mine.Mine"}, model_type="llama"
        )
        manifest = build(directory, out=out, trust_remote_code=True, leaves="target").manifest
        assert (manifest.model.class_name, manifest.model.config_class_name) == ("Mine", "LlamaConfig")
        assert manifest.model.config_module == "transformers.models.llama.configuration_llama"
        assert "transformers.models.llama.modeling_llama" in manifest.sources

    def test_a_config_of_its_own_with_a_model_of_transformers(self, tmp_path: Path, out: Path) -> None:
        configuration = (
            "from transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type = 'mine_llama'\n"
        )
        directory = write_own_code_model(
            tmp_path / "mine",
            {"mine.py": configuration},
            {"AutoConfig": "mine.Mine"},
            architectures=["LlamaForCausalLM"],
            model_type="mine_llama",
        )
        manifest = build(directory, out=out, trust_remote_code=True).manifest
        assert (manifest.model.class_name, manifest.model.config_class_name) == ("LlamaForCausalLM", "Mine")

    def test_the_tokenizers_code_travels_and_is_not_executed(self, tmp_path: Path, out: Path, marker: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        (directory / "tok.py").write_text(trace_of(marker))
        (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Toy", null]}}')
        assert "tok.py" not in refuse(directory, out)
        assert "modeling/tok.py" in build(directory, out=out, trust_remote_code=True).manifest.model.code
        assert not marker.exists()

    def test_a_method_of_its_own_as_an_opaque_step(self, tmp_path: Path, out: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        done = build(directory, out=out, trust_remote_code=True, ignore=["causal_mask"])
        package = done.manifest.model.module.partition(".")[0]
        assert done.manifest.subgraphs[0].opaque == (f"{package}.modeling_toy:causal_mask",)


class TestHostileDirectories:
    @pytest.mark.parametrize(
        "reference",
        [
            "../../evil.Class",
            "/etc/evil.Class",
            "..evil.Class",
            "a..b.Class",
            "evil",
            ".Class",
            "evil.",
            "evil.Cl-ass",
            "a/b--../../evil.Class",
            "a/b/c--evil.Class",
            "--evil.Class",
            "evil\n.Class",
            "\u00e4vil.Class",
            "",
            3,
            {"a": "b"},
            ["evil.Class", 3],
        ],
    )
    def test_references_that_are_none(self, reference: Any, tmp_path: Path, out: Path) -> None:
        (tmp_path / "evil.py").write_text("raise RuntimeError\n")
        directory = write_own_code_model(tmp_path / "a" / "toy", FILES, AUTO_MAP | {"AutoModel": reference})
        said = refuse(directory, out, trust_remote_code=True)
        assert "the auto_map of toy has an invalid class for AutoModel: " in said

    @pytest.mark.parametrize("auto_map", [["a.B"], "a.B", 3, True])
    def test_an_auto_map_that_is_no_table(self, auto_map: Any, tmp_path: Path, out: Path) -> None:
        said = refuse(write_own_code_model(tmp_path / "toy", FILES, auto_map), out, trust_remote_code=True)
        assert "must be a table of classes; got" in said

    @pytest.mark.parametrize(
        ("files", "why"),
        [
            ({"modeling_toy.py": MODELING + "from .gone import x\n"}, "imports gone.py, which is missing"),
            ({"modeling_toy.py": MODELING + "from ..gone import x\n"}, "imports from outside of the model's directory"),
            ({"toy_layers.py": "def ("}, "toy_layers.py is not valid Python"),
            (
                {"toy_layers.py": "import no_such_package\n"},
                "imports 'no_such_package', which is not installed (install",
            ),
            ({"toy_layers.py": "raise RuntimeError('no')\n"}, "toy_layers.py, line 1, fails: RuntimeError: no"),
            ({"toy_layers.py": "raise SystemExit(0)\n"}, "toy_layers.py, line 1, fails: SystemExit"),
            ({"modeling_toy.py": "ToyForCausalLM = 1\n"}, "has no class ToyForCausalLM derived from PreTrainedModel"),
            ({"modeling_toy.py": "class ToyForCausalLM: pass\n"}, "has no class ToyForCausalLM derived from"),
            ({"configuration_toy.py": "class ToyConfig: pass\n"}, "has no class ToyConfig derived from"),
            (
                {"configuration_toy.py": CONFIGURATION.replace("self.epsilon = epsilon", "raise ValueError('odd')")},
                "is not a config that ToyConfig supports: odd",
            ),
            (
                {
                    "modeling_toy.py": MODELING.replace(
                        "self.head_size =", "raise KeyError('odd')\n        self.head_size ="
                    )
                },
                "ToyForCausalLM cannot be built",
            ),
        ],
    )
    def test_code_that_is_not_right(self, files: dict[str, str], why: str, tmp_path: Path, out: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy", FILES | files)
        before = set(sys.modules)
        said = refuse(directory, out, trust_remote_code=True)
        assert why in said
        assert not [name for name in set(sys.modules) - before if name.startswith("seqbuild_modeling_")]

    def test_a_missing_file(self, tmp_path: Path, out: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        (directory / "modeling_toy.py").unlink()
        for trust in (False, True):
            assert "toy brings its own code, and modeling_toy.py is missing" in refuse(
                directory, out, trust_remote_code=trust
            )

    def test_a_link_out_of_the_directory(self, tmp_path: Path, out: Path, marker: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        (tmp_path / "elsewhere.py").write_text(trace_of(marker))
        (directory / "toy_activation.py").unlink()
        (directory / "toy_activation.py").symlink_to(tmp_path / "elsewhere.py")
        for trust in (False, True):
            said = refuse(directory, out, trust_remote_code=trust)
            assert "toy_activation.py is a link to" in said
        assert not marker.exists()

    def test_a_link_inside_of_it(self, tmp_path: Path, out: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        (directory / "toy_activation.py").rename(directory / "text")
        (directory / "toy_activation.py").symlink_to("text")
        done = build(directory, out=out, trust_remote_code=True)
        assert not (done.path / "modeling" / "toy_activation.py").is_symlink()

    def test_a_link_to_nothing(self, tmp_path: Path, out: Path) -> None:
        directory = write_own_code_model(tmp_path / "toy")
        (directory / "toy_activation.py").unlink()
        (directory / "toy_activation.py").symlink_to("nowhere")
        assert "imports toy_activation.py, which is missing" in refuse(directory, out, trust_remote_code=True)


def to_cache(directory: Path, hub: Path, repo: str) -> None:
    """Put a model into a hub cache, as links to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / commit).mkdir(parents=True)
    for index, path in enumerate(sorted(directory.iterdir())):
        blob = folder / "blobs" / f"{index:064d}"
        blob.write_bytes(path.read_bytes())
        (folder / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob.name}")


def test_hub_ids_and_code_of_other_repositories(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    to_cache(write_own_code_model(tmp_path / "toy"), hub, "some-org/toy")
    for name, repo in (("elsewhere", "some-org/toy"), ("nowhere", "some-org/gone")):
        auto_map = {kind: f"{repo}--{value}" for kind, value in AUTO_MAP.items()}
        write_own_code_model(tmp_path / name, {}, auto_map)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for source in ("some-org/toy", tmp_path / "elsewhere"):
        found = build(source, out=out, trust_remote_code=True).manifest.model.code
        assert found == tuple(f"modeling/{name}" for name in sorted(FILES))
    with pytest.raises(ModelError) as caught:
        build(tmp_path / "nowhere", out=out, trust_remote_code=True)
    assert str(caught.value).startswith(
        "nowhere brings its own code, and its repository some-org/gone is not in the local cache ("
    )


def test_references_are_read_in_one_order() -> None:
    auto_map = {"AutoModel": "m.M", "AutoConfig": "a/b--c.d.C", "AutoTokenizer": [None, "t.T"], "AutoX": None}
    found = [(entry.kind, entry.repo, entry.module, entry.class_name) for entry in read_references(auto_map, "toy")]
    assert found == [
        ("AutoConfig", "a/b", "c.d", "C"),
        ("AutoModel", "", "m", "M"),
        ("AutoTokenizer", "", "t", "T"),
    ]
