from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import runtime
import runtime.cli
import seqbuild.build
import seqbuild.cli
from runtime.artifact import read_manifest
from runtime.manifest import MANIFEST_NAME
from tests.runtime.small import Small, directory_bytes, read_tensors, write_token_file
from tests.tiny_models import minilm_directory

ROOT = Path(__file__).parents[2]
GPTQ = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"
RTN = "QuantizationModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"


class Place:
    """A directory with all that a calibration takes, each of which a test may spoil."""

    def __init__(self, folder: Path, small: Small) -> None:
        self.folder = folder
        self.artifact = folder / "artifact"
        self.weights = folder / "weights"
        shutil.copytree(small.artifact, self.artifact)
        shutil.copytree(small.weights, self.weights)
        self.data = write_token_file(folder / "tokens.safetensors")
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(GPTQ)
        self.out = folder / "out"

    def calibrate(self, *more: str | Path) -> list[str]:
        command = ["calibrate", self.artifact, "--weights", self.weights, "--data", self.data]
        return [str(part) for part in (*command, "--recipe", self.recipe, "-o", self.out, *more)]

    def evaluate(self, *more: str | Path) -> list[str]:
        return [str(part) for part in ("evaluate", self.artifact, "--weights", self.weights, "--data", self.data, *more)]

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tree(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


@pytest.fixture
def place(tmp_path: Path, llama: Small) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", llama)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, what it printed, what it complained about."""

    def call(arguments: list[str], main: Callable[[list[str]], int] = runtime.cli.main) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


def assert_refused(result: tuple[int, str, str], *parts: str, program: str = "runtime") -> None:
    """One line that says what is wrong, and exit code 2."""
    code, _, complaint = result
    assert complaint.endswith("\n")
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith(f"{program}: error: ")
    assert "Traceback" not in complaint
    for part in parts:
        assert part in complaint
    assert code == 2


# What works.


def test_calibrate_evaluate_and_check(place: Place, run: Run) -> None:
    code, printed, complaint = run(place.calibrate())
    assert (code, complaint) == (0, "")
    lines = printed.splitlines()
    assert [re.sub(r"\d+\.\d s", "T", line) for line in lines[:4]] == [
        "[1/4] model.layers.0: 7 modules, T",
        "[2/4] model.layers.1: 7 modules, T",
        "[3/4] model.layers.2: 7 modules, T",
        "[4/4] no target: 0 modules, T",
    ]
    assert re.fullmatch(rf"21 modules quantized in \d+\.\d s; \d+\.\d kB in {place.out}", lines[4])

    code, printed, complaint = run(place.evaluate("--weights", place.out))
    assert (code, complaint) == (0, "")
    assert re.fullmatch(r"perplexity \d+\.\d{4} over 234 tokens, \d+\.\d s\n", printed)

    code, printed, complaint = run(["check", str(place.artifact)])
    assert (code, complaint) == (0, "")
    manifest = read_manifest(place.artifact)
    assert printed.splitlines() == [
        f"{place.artifact}: {len(manifest.files)} files and 4 programs are as the manifest states",
        "model LlamaForCausalLM of transformers.models.llama.modeling_llama, 4 subgraphs",
        f"input key {manifest.input_key}",
        "opaque steps: none",
    ]


def test_json(place: Place, run: Run) -> None:
    code, printed, complaint = run(place.calibrate("--json"))
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert (facts["path"], len(facts["modules"]), facts["unreached"]) == (str(place.out), 21, [])
    assert facts["bytes"] == sum(tensor.nbytes for tensor in read_tensors(place.out).values())
    assert list(facts["modules"][0]) == ["name", "algorithm", "loss", "damping"]

    code, printed, complaint = run(place.evaluate("--json"))
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert facts["tokens"] == 6 * 39
    assert facts["bytes"] == (place.weights / "model.safetensors").stat().st_size


def test_text_is_read_with_the_tokenizer_of_the_weights(place: Place, run: Run) -> None:
    text = place.write("text.txt", "to be or not to be " * 30)
    code, _, complaint = run(place.calibrate("--data", text, "--seq-len", "32", "--samples", "8", "--batch-size", "3"))
    assert (code, complaint) == (0, "")
    code, printed, complaint = run(place.evaluate("--data", text, "--json"))
    assert (code, complaint) == (0, "")
    # 570 bytes and <bos> in windows of 256, the model's longest
    assert json.loads(printed)["tokens"] == 2 * 255
    code, printed, _ = run(place.evaluate("--data", text, "--json", "--no-pack", "--seq-len", "100"))
    assert json.loads(printed)["tokens"] == 99


def test_tokenizer_of_the_artifact_is_taken_where_the_weights_have_none(place: Place, run: Run) -> None:
    text = place.write("text.txt", "to be or not to be " * 30)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place.weights / name).unlink()
    code, _, complaint = run(place.calibrate("--data", text, "--seq-len", "32"))
    assert (code, complaint) == (0, "")
    assert (place.out / "tokenizer.json").read_bytes() == (place.artifact / "tokenizer.json").read_bytes()
    assert (place.out / "chat_template.jinja").is_file()


def test_round_to_nearest_needs_no_data(place: Place, run: Run) -> None:
    place.recipe.write_text(RTN)
    command = place.calibrate()
    at = command.index("--data")
    code, _, complaint = run(command[:at] + command[at + 2 :])
    assert (code, complaint) == (0, "")
    assert (place.out / "model.safetensors").is_file()


def test_shard_size_dtype_and_an_empty_directory(place: Place, run: Run) -> None:
    place.out.mkdir()
    code, _, complaint = run(place.calibrate("--max-shard-size", "0.001", "--dtype", "bfloat16", "--device", "cpu"))
    assert (code, complaint) == (0, "")
    assert torch.equal(
        read_tensors(place.out)["lm_head.weight"], read_tensors(place.weights)["lm_head.weight"]
    ), "the run's dtype is not the checkpoint's"


# What does not: one line, exit code 2, and nothing is left behind.


def edit_manifest(place: Place, **changes: Any) -> None:
    """Write another manifest with a digest that fits it."""
    manifest = replace(read_manifest(place.artifact), **changes)
    (place.artifact / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def no_artifact(place: Place) -> list[str]:
    place.artifact = place.folder / "nowhere"
    return ["nowhere is not a directory"]


def weights_as_artifact(place: Place) -> list[str]:
    place.artifact = place.weights
    return ["is not an artifact: it has no manifest.msgpack"]


def damaged_manifest(place: Place) -> list[str]:
    path = place.artifact / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-5])
    return [str(path), "is damaged"]


def damaged_program(place: Place) -> list[str]:
    path = place.artifact / "subgraphs" / "001.py"
    path.write_bytes(path.read_bytes() + b"\n")
    return [str(path), "is damaged", "compile it again"]


def lost_program(place: Place) -> list[str]:
    (place.artifact / "subgraphs" / "001.py").unlink()
    return ["has lost subgraphs/001.py"]


def other_transformers(place: Place) -> list[str]:
    edit_manifest(place, versions={**read_manifest(place.artifact).versions, "transformers": "4.99.0"})
    return ["compiled with transformers 4.99.0", "--allow-version-skew"]


def no_weights(place: Place) -> list[str]:
    place.weights = place.folder / "nowhere"
    return ["there is no checkpoint directory", "nowhere"]


def weights_are_a_file(place: Place) -> list[str]:
    place.weights = place.recipe
    return ["there is no checkpoint directory", "recipe.yaml"]


def empty_weights(place: Place) -> list[str]:
    place.weights = place.folder / "empty"
    place.weights.mkdir()
    return ["holds no safetensors checkpoint", "it has no model.safetensors"]


def pickled_weights(place: Place) -> list[str]:
    (place.weights / "model.safetensors").rename(place.weights / "pytorch_model.bin")
    return ["holds no safetensors checkpoint", "pytorch_model.bin is a pickle: convert it"]


def truncated_weights(place: Place) -> list[str]:
    path = place.weights / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return [str(path), "damaged", "copy the checkpoint again"]


def weights_of_another_model(place: Place) -> list[str]:
    (place.weights / "config.json").unlink()
    tensors = read_tensors(place.weights)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)
    safetensors.torch.save_file(tensors, place.weights / "model.safetensors")
    return ["'model.layers.2.mlp.up_proj.weight'", "[3, 4]", "[256, 128]"]


def config_of_another_model(place: Place) -> list[str]:
    path = place.weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    return ["rms_norm_eps = 0.1", "compile the model of this checkpoint"]


def no_data(place: Place) -> list[str]:
    place.data = place.folder / "nowhere.txt"
    return ["nowhere.txt cannot be read: No such file or directory"]


def data_is_a_directory(place: Place) -> list[str]:
    place.data = place.folder / "folder.txt"
    place.data.mkdir()
    return ["folder.txt cannot be read: Is a directory"]


def empty_data(place: Place) -> list[str]:
    place.data = place.write("empty.txt", "")
    return ["empty.txt is empty"]


def blank_data(place: Place) -> list[str]:
    place.data = place.write("blank.txt", " \n \n")
    return ["blank.txt holds no text but white space"]


def short_data(place: Place) -> list[str]:
    place.data = place.write("short.txt", "hello")
    return ["short.txt gives 0 windows of 256 tokens (6 tokens in all)", "give more text"]


def long_data(place: Place) -> list[str]:
    place.data = write_token_file(place.folder / "long.safetensors", length=257)
    return ["a sample has 257 tokens", "allows 256", "--seq-len 256 or less"]


def unknown_data(place: Place) -> list[str]:
    place.data = place.write("text.docx", "hello")
    return ["text.docx is of an unknown kind: .docx", ".txt, .jsonl, .parquet and .safetensors"]


def foreign_tokens(place: Place) -> list[str]:
    place.data = write_token_file(place.folder / "foreign.safetensors", largest=258)
    return ["gives token id 258, and the model's vocabulary has 258 entries", "take the model's own tokenizer"]


def weights_as_data(place: Place) -> list[str]:
    place.data = place.weights / "model.safetensors"
    return ["is a safetensors file but no token file", "seqbuild data"]


def binary_data(place: Place) -> list[str]:
    place.data = place.write("text.txt", b"\xff\xfe\x00")
    return ["text.txt is not UTF-8"]


def text_without_a_tokenizer(place: Place) -> list[str]:
    place.data = place.write("text.txt", "hello " * 99)
    manifest = read_manifest(place.artifact)
    keep = [entry for entry in manifest.files if "tokenizer" not in entry.path and "chat" not in entry.path]
    for folder in (place.artifact, place.weights):
        for path in [*folder.glob("*tokenizer*"), *folder.glob("chat*")]:
            path.unlink()
    edit_manifest(place, files=tuple(keep))
    return ["tokenizer", "seqbuild data"]


def model_with_other_inputs(place: Place) -> list[str]:
    manifest = read_manifest(place.artifact)
    edit_manifest(place, inputs=(*manifest.inputs, replace(manifest.inputs[0], name="pixel_values")))
    return ["'pixel_values', which text data cannot give"]


BOTH = [
    no_artifact,
    weights_as_artifact,
    damaged_manifest,
    damaged_program,
    lost_program,
    other_transformers,
    no_weights,
    weights_are_a_file,
    empty_weights,
    pickled_weights,
    truncated_weights,
    weights_of_another_model,
    config_of_another_model,
    no_data,
    data_is_a_directory,
    empty_data,
    blank_data,
    short_data,
    long_data,
    unknown_data,
    foreign_tokens,
    weights_as_data,
    binary_data,
    text_without_a_tokenizer,
    model_with_other_inputs,
]


def quantized_weights(place: Place) -> list[str]:
    place.recipe.write_text(RTN)
    assert runtime.cli.main(place.calibrate()) == 0
    place.out.rename(place.folder / "quantized")
    place.weights = place.folder / "quantized"
    return ["quantized is quantized already", "calibrate from the original checkpoint"]


def no_recipe(place: Place) -> list[str]:
    place.recipe = place.folder / "nowhere.yaml"
    return ["nowhere.yaml", "No such file or directory"]


def broken_recipe(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: [Linear\n  scheme: W4A16\n")
    return ["recipe.yaml:", "3"]


def misspelled_recipe(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: Linear\n  sceme: W4A16\n")
    return ["recipe.yaml:3", "sceme"]


def recipe_without_targets(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: Conv1D\n  scheme: W4A16\n")
    return ["recipe.yaml:2: the target 'Conv1D' matches no module"]


def recipe_that_ignores_all(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [Linear]}\n")
    return ["the recipe ignores every module that it targets"]


def groups_that_do_not_divide(place: Place) -> list[str]:
    weights = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 96}"
    place.recipe.write_text(f"GPTQModifier: {{config_groups: {{a: {{targets: [Linear], weights: {weights}}}}}}}\n")
    return ["model.layers.0.self_attn.q_proj has 128 input features, which groups of 96 do not divide"]


def full_output(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "precious").write_text("data")
    return ["out is not empty", "choose another"]


def output_is_a_file(place: Place) -> list[str]:
    place.out.write_text("data")
    return ["out exists and is not a directory"]


def output_is_a_link(place: Place) -> list[str]:
    (place.folder / "elsewhere").mkdir()
    place.out.symlink_to(place.folder / "elsewhere")
    return ["out exists and is not a directory"]


def output_below_a_file(place: Place) -> list[str]:
    place.out = place.recipe / "out"
    return ["recipe.yaml/out", "part of the path is not a directory"]


def output_far_below_a_file(place: Place) -> list[str]:
    place.out = place.recipe / "deep" / "out"
    return ["recipe.yaml/deep/out", "part of the path is not a directory"]


def output_with_a_long_name(place: Place) -> list[str]:
    place.out = place.folder / ("x" * 300)
    return ["xxx", "the name is too long"]


CALIBRATE = [
    quantized_weights,
    no_recipe,
    broken_recipe,
    misspelled_recipe,
    recipe_without_targets,
    recipe_that_ignores_all,
    groups_that_do_not_divide,
    full_output,
    output_is_a_file,
    output_is_a_link,
    output_below_a_file,
    output_far_below_a_file,
    output_with_a_long_name,
]


@pytest.mark.parametrize("spoil", [*BOTH, *CALIBRATE], ids=lambda function: function.__name__)
def test_calibrate_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    before = place.tree()
    assert_refused(run(place.calibrate()), *parts)
    assert place.tree() == before


@pytest.mark.parametrize("spoil", BOTH, ids=lambda function: function.__name__)
def test_evaluate_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    before = place.tree()
    assert_refused(run(place.evaluate()), *parts)
    assert place.tree() == before


@pytest.mark.parametrize("spoil", BOTH[:6], ids=lambda function: function.__name__)
def test_check_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    assert_refused(run(["check", str(place.artifact)]), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dtype", "float63"], ["--dtype is 'float63'", "float32, bfloat16, float16"]),
        (["--device", "abacus"], ["device 'abacus' is not available", "there is cpu"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "many"], ["--batch-size"]),
        (["--seq-len", "1"], ["--seq-len"]),
        (["--seq-len", "41"], ["was cut at 40 tokens, and samples of 41 were asked for"]),
        (["--samples", "7"], ["holds 6 samples, and 7 were asked for"]),
        (["--colour", "red"], ["--colour", "--help"]),
        (["surplus"], ["surplus", "--help"]),
    ],
)
def test_options(place: Place, run: Run, options: list[str], parts: list[str]) -> None:
    before = place.tree()
    assert_refused(run(place.calibrate(*options)), *parts)
    assert_refused(run(place.evaluate(*options)), *parts)
    assert place.tree() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(place: Place, run: Run) -> None:
    assert_refused(run(place.calibrate("--device", "cuda")), "device 'cuda' is not available", "there is cpu")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["calibrate"], "Missing argument 'ARTIFACT'"),
        (["calibrate", "x"], "Missing option '--weights'"),
        (["calibrate", "x", "--weights", "y"], "Missing option '--recipe'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_command_lines_that_do_not_parse(run: Run, arguments: list[str], part: str) -> None:
    assert_refused(run(arguments), part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["compile"], "Missing argument 'SOURCE'"),
        (["data", "tokenizer", "text.txt"], "Missing option '--out'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_command_lines_of_the_compiler_that_do_not_parse(run: Run, arguments: list[str], part: str) -> None:
    assert_refused(run(arguments, seqbuild.cli.main), part, program="seqbuild")


@pytest.mark.parametrize("main", [runtime.cli.main, seqbuild.cli.main])
def test_without_arguments_there_is_help(run: Run, main: Callable[[list[str]], int]) -> None:
    code, printed, complaint = run([], main)
    assert (code, complaint) == (2, "")
    assert "Commands:" in printed


def test_version_skew_can_be_accepted(place: Place, run: Run) -> None:
    other_transformers(place)
    for command in (place.calibrate(), place.evaluate(), ["check", str(place.artifact)]):
        assert_refused(run(command), "--allow-version-skew")
        code, _, complaint = run([*command, "--allow-version-skew"])
        assert (code, complaint) == (0, "")


def test_a_model_without_logits(tmp_path: Path, run: Run) -> None:
    weights = minilm_directory()
    artifact = seqbuild.build.build(weights, out=tmp_path).path
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 300)
    command = ["evaluate", str(artifact), "--weights", str(weights), "--data", str(text), "--seq-len", "32"]
    assert_refused(run(command), "BertModel returns last_hidden_state, pooler_output and no logits")
    command[command.index("--seq-len") + 1] = "600"
    assert_refused(run(command), "a sample has 600 tokens", "--seq-len 512 or less")


def test_debug_shows_the_traceback(place: Place, run: Run) -> None:
    empty_data(place)
    for arguments in (place.calibrate("--debug"), ["--debug", *place.calibrate()]):
        code, _, complaint = run(arguments)
        assert code == 2
        assert complaint.startswith("Traceback (most recent call last):")
        assert complaint.splitlines()[-1].startswith("runtime: error: ")
        assert "empty.txt is empty" in complaint.splitlines()[-1]


# What the machine lacks.


def test_a_disk_that_is_too_small_is_refused_before_the_run(
    place: Place, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total used free")(9, 8, 1))
    before = place.tree()
    assert_refused(run(place.calibrate()), "takes 4", "kB at least, and its disk has 1 B left")
    assert place.tree() == before


def test_a_disk_that_fills_up_during_the_run(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    before = place.tree()
    assert_refused(run(place.calibrate()), f"cannot write {place.out}: the disk is full (nothing was left behind)")
    assert place.tree() == before


def test_a_real_disk_that_is_full(place: Place, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    try:
        monkeypatch.setattr("runtime.calibration.require_space", lambda path, num_bytes: None)
        place.out = disk / "out"
        assert_refused(run(place.calibrate()), f"cannot write {place.out}: the disk is full (nothing was left behind)")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(place: Place, run: Run) -> None:
    place.out = place.folder / "locked" / "out"
    place.out.parent.mkdir(mode=0o500)
    assert_refused(run(place.calibrate()), "permission denied")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("runtime.calibration.collect_hessians", fail)
    before = place.tree()
    assert_refused(run(place.calibrate()), "out of memory", "lower --batch-size or --seq-len")
    assert place.tree() == before


def test_a_bug_of_ours_is_not_dressed_up(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("runtime.calibration.collect_hessians", fail)
    before = place.tree()
    with pytest.raises(AssertionError, match="a bug"):
        run(place.calibrate())
    assert place.tree() == before


# Signals and processes.

SLOW = """
import sys, time
from runtime.artifact import LoadedSubgraph
real = LoadedSubgraph.forward
def forward(self, model, **inputs):
    print("step", flush=True)
    time.sleep(0.2)
    return real(self, model, **inputs)
LoadedSubgraph.forward = forward
from runtime.cli import main
sys.exit(main())
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    yield {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_run_that_is_stopped_leaves_nothing_and_the_next_one_works(
    place: Place, run: Run, environment: dict[str, str], number: int, code: int, word: str
) -> None:
    before = place.tree()
    command = [sys.executable, "-c", SLOW, *place.calibrate("--batch-size", "1")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while process.stdout.readline() != "step\n":
            assert process.poll() is None, process.stderr.read()
        assert len(list(place.folder.glob(".out.*.partial"))) == 1
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert process.stderr.read() == f"runtime: {word}; nothing half-written was left behind\n"
    assert place.tree() == before
    assert run(place.calibrate())[0] == 0


def test_what_a_killed_run_leaves_is_hidden_and_in_nobodys_way(
    place: Place, run: Run, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", SLOW, *place.calibrate()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "step\n":
            assert process.poll() is None
        process.kill()
    assert not place.out.exists()
    assert run(place.calibrate())[0] == 0
    assert (place.out / "config.json").is_file()


def test_a_closed_pipe_is_no_traceback(place: Place, environment: dict[str, str]) -> None:
    for module, arguments in (("runtime", "check"), ("seqbuild", "inspect --json")):
        done = subprocess.run(
            f"{sys.executable} -m {module} {arguments} {place.artifact} | true",
            shell=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("module", ["runtime", "seqbuild"])
def test_help_is_quick_and_loads_no_torch(module: str, environment: dict[str, str]) -> None:
    code = f"""
import sys
from {module}.cli import main
assert main(["--help"]) == 0
heavy = [name for name in ("torch", "transformers", "compressed_tensors", "numpy") if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    times = []
    for _ in range(5):  # the quickest tells what it costs; the others, how busy the machine is
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, "--help"], check=True, env=environment, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3, times


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_public_names_are_not_hidden_by_modules_of_the_same_name(package: str, environment: dict[str, str]) -> None:
    code = f"""
import pkgutil, importlib, types
import {package}
modules = [module.name for module in pkgutil.iter_modules({package}.__path__) if module.name != "__main__"]
for name in modules:
    importlib.import_module("{package}." + name)
for name in {package}.__all__:
    assert not isinstance(getattr({package}, name), types.ModuleType), name
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The compiler's command line.


def test_seqbuild_compile_inspect_and_data(place: Place, run: Run) -> None:
    command = ["compile", str(place.weights), "-o", str(place.folder / "artifacts"), "--json"]
    code, printed, complaint = run(command, seqbuild.cli.main)
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert (facts["cached"], facts["targets"], facts["subgraphs"]) == (False, 3, 4)
    assert facts["parameters"] == sum(tensor.numel() for tensor in read_tensors(place.weights).values())
    assert json.loads(run(command, seqbuild.cli.main)[1])["cached"] is True
    code, printed, complaint = run(command[:-1], seqbuild.cli.main)
    assert (code, complaint) == (0, "")
    assert printed.splitlines()[0] == (
        f"LlamaForCausalLM: 3 layers by LlamaDecoderLayer, 4 subgraphs, {facts['parameters']:,} parameters"
    )
    assert "is there already, nothing was traced" in printed

    code, printed, complaint = run(["inspect", facts["path"], "--json"], seqbuild.cli.main)
    assert (code, complaint) == (0, "")
    assert json.loads(printed)["input_key"] == facts["input_key"]
    code, printed, complaint = run(["inspect", facts["path"], "--code", "1"], seqbuild.cli.main)
    assert printed == (Path(facts["path"]) / "subgraphs" / "001.py").read_text()
    code, printed, complaint = run(["inspect", facts["path"]], seqbuild.cli.main)
    assert (code, complaint) == (0, "")
    assert "model.layers.2" in printed
    assert_refused(
        run(["inspect", facts["path"], "--code", "4"], seqbuild.cli.main), "no subgraph 4", "0 to 3", program="seqbuild"
    )

    text = place.write("text.txt", "to be or not to be " * 30)
    tokens = place.folder / "made.safetensors"
    command = ["data", str(place.weights), str(text), "-o", str(tokens), "--seq-len", "32"]
    code, printed, complaint = run(command, seqbuild.cli.main)
    assert (code, complaint) == (0, "")
    assert printed == f"{tokens}: 17 samples, 544 tokens\n"
    assert run(place.calibrate("--data", tokens))[0] == 0
    one = directory_bytes(place.out)
    place.out = place.folder / "from-text"
    assert run(place.calibrate("--data", text, "--seq-len", "32"))[0] == 0
    assert directory_bytes(place.out) == one, "tokens made in advance change nothing"


@pytest.mark.parametrize(
    ("source", "content", "part"),
    [
        ("nowhere/model", None, "there is no model 'nowhere/model'"),
        ("./nowhere", None, "there is no model at ./nowhere"),
        ("nowhere.json", None, "there is no model at nowhere.json"),
        ("a b", None, "there is no model 'a b'"),
        ("x" * 300, None, "xxx"),
        ("{}/notes.txt", "text", "is neither a model directory nor a config.json"),
        ("{}/config.json", "", "config.json cannot be read"),
        ("{}/config.json", "[" * 100_000, "config.json cannot be read"),
        ("{}/config.json", "[1]", "holds no model config"),
        ("{}/config.json", "{}", "does not describe a model that transformers knows"),
        ("{}/config.json", '{"model_type": "unheard_of"}', "does not describe a model that transformers knows"),
        ("{}/config.json", '{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        ("{}/config.json", '{"model_type": "llama", "num_attention_heads": 0}', "config.json"),
    ],
)
def test_compile_refuses_sources(
    run: Run, tmp_path: Path, source: str, content: str | None, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp_path)
    if content is not None:
        Path(source).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run(["compile", source, "-o", "artifacts"], seqbuild.cli.main), part, program="seqbuild")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("model.safetensors.index.json", "[", "is not an index of a checkpoint"),
        ("model.safetensors.index.json", '{"weight_map": [1]}', "is not an index of a checkpoint"),
        ("model.safetensors", "text", "is not a safetensors file"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        ("model.safetensors", b"\xff" * 16, "is not a safetensors file"),
    ],
)
def test_compile_refuses_checkpoints(place: Place, run: Run, name: str, content: str | bytes, part: str) -> None:
    (place.weights / name).write_bytes(content.encode() if isinstance(content, str) else content)
    command = ["compile", str(place.weights), "-o", str(place.folder / "artifacts")]
    assert_refused(run(command, seqbuild.cli.main), name, part, program="seqbuild")
    assert not list((place.folder / "artifacts").glob("*/"))


@pytest.mark.parametrize("out", ["recipe.yaml", "recipe.yaml/below", "recipe.yaml/far/below"])
def test_compile_refuses_outputs(place: Place, run: Run, out: str) -> None:
    before = place.tree()
    command = ["compile", str(place.weights), "-o", str(place.folder / out)]
    assert_refused(run(command, seqbuild.cli.main), out, "not a directory", program="seqbuild")
    assert place.tree() == before
