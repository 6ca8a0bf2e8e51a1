"""Pages of the documentation, executed: every command and every piece of Python of them, with small models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import transformers
from cryptography.hazmat.primitives.asymmetric import ec

import runtime.cli.app
import seqbuild.cli.app
from tests.runtime.media_models import save, write_image
from tests.runtime.small import WIDTHS, read_tensors, save_model
from tests.runtime.test_signatures import key_pair

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What prepares the machine and is not ours: by its first words.
_NOT_OURS = ("git clone", "cd seqbuild", "pip install", "openssl ecparam", "openssl ec")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Yield language, title and text of each fenced block."""
    yield from _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def commands(page: str) -> Iterator[str]:
    """Yield the commands of a page that start one of our programs."""
    for kind, _, text in blocks(page):
        lines = text.strip().splitlines() if kind == "sh" else []
        yield from (line for line in lines if not line.startswith(_NOT_OURS))


def execute(command: str) -> None:
    """Run a command as a shell in this directory would, `*` expanded, with fewer and shorter samples."""
    words = shlex.split(re.sub(r"--seq-len \d+", "--seq-len 64", re.sub(r"--samples \d+", "--samples 4", command)))
    program, words = (runtime.cli.app, words[3:]) if words[:3] == ["python", "-m", "runtime"] else (None, words[1:])
    assert program or command.startswith("seqbuild ")
    expanded = [str(name) for word in words for name in (sorted(Path().glob(word)) if "*" in word else [word])]
    assert (program or seqbuild.cli.app).main(expanded) == 0, command


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Path:
    """A directory like the checkout in which the commands of the pages run."""
    root = tmp_path_factory.mktemp("site")
    config = transformers.LlamaConfig(**{**WIDTHS, "num_hidden_layers": 2, "max_position_embeddings": 2048})
    save_model(transformers.LlamaForCausalLM(config), root / "demo" / "model", byte_tokenizer_dir)
    (root / "demo" / "text").mkdir()
    for name in ("calib", "eval"):
        rows = [json.dumps({"text": f"{name} {number}: a list is a sequence of values. " * 12}) for number in range(20)]
        (root / "demo" / "text" / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root


@pytest.fixture
def inside(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(site)
    monkeypatch.setenv("SEQBUILD_CACHE", str(site))  # so artifacts/ has what quantize compiles
    return site


def python_of(page: str) -> list[str]:
    return [text for kind, _, text in blocks(page) if kind == "python" and "import" in text]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quickstart(inside: Path) -> None:
    done = [execute(command) for command in commands("quickstart.md")]
    assert len(done) == 6
    pieces = python_of("quickstart.md")
    assert len(pieces) == 2
    for text in pieces:
        exec(compile(text, "quickstart.md", "exec"), {})
    for name in ("demo-W4A16", "demo-steps", "demo-call"):
        assert "quantization_config" in json.loads((inside / name / "config.json").read_text(encoding="utf-8"))
    assert (inside / "demo-W4A16.report.html").is_file() and (inside / "demo-W4A16" / "README.md").is_file()


def test_tracing(inside: Path) -> None:
    if not list(inside.glob("artifacts/model-*")):
        execute("seqbuild compile demo/model -o artifacts")
    assert len([execute(command) for command in commands("tracing.md")]) == 3
    [text] = python_of("tracing.md")
    exec(compile(text, "tracing.md", "exec"), {})


def test_air_gap(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(inside / "demo" / "model", tmp_path / "MODEL")
    shutil.copy(inside / "demo" / "text" / "calib.jsonl", tmp_path)
    key_pair(tmp_path, "key", ec.SECP256R1())
    monkeypatch.chdir(tmp_path)
    found = list(commands("air-gap.md"))
    assert [command for command in found if command.startswith("seqbuild sign")] == found[3:4]
    for command in (*found[:2], found[3], found[2]):  # signed before it is packed
        execute(command)
    with tarfile.open("bundle.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.move("MODEL", "bundle/MODEL")
    monkeypatch.chdir("bundle")
    assert len([execute(command) for command in found[4:]]) == 2
    execute("seqbuild check artifact --public-key ../key.pub")
    plain = "seqbuild calibrate artifact --weights MODEL --data data.safetensors --recipe recipe.yaml -o PLAIN"
    execute(plain)
    assert read_tensors(Path("OUT")).keys() == read_tensors(Path("PLAIN")).keys()


def test_multimodal(tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llava", byte_tokenizer_dir, tmp_path / "MODEL")
    write_image(tmp_path / "a.png", 60, 50)
    write_image(tmp_path / "b.jpg", 50, 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQBUILD_CACHE", str(tmp_path))
    files: Mapping[str, str] = {title: text for _, title, text in blocks("multimodal.md") if title}
    assert sorted(files) == ["images.jsonl", "recipe.yaml", "sounds.jsonl"]
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    for name in ("text.jsonl", "eval.jsonl"):
        Path(name).write_text(json.dumps({"text": f"{name} has a few words. " * 8}), encoding="utf-8")
    found = list(commands("multimodal.md"))
    assert len(found) == 6
    assert "--text-only" in found[1]
    for command in (found[0], *found[2:], found[1]):  # the last makes another artifact
        execute(command)
    whole, steps = read_tensors(Path("MODEL-W4A16")), read_tensors(Path("MODEL-steps"))
    assert whole.keys() == steps.keys()
    assert [name for name, tensor in whole.items() if not tensor.equal(steps[name])] == []
