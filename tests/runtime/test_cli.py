from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
import runtime.cli.app
import seqbuild.build
import seqbuild.cli.app
from runtime.chain import read_manifest
from tests.runtime.place import RTN, Place, Run, assert_refused, rely_on_other_sources
from tests.runtime.small import directory_bytes, read_tensors
from tests.tiny_models import minilm_directory


def test_calibrate_evaluate_and_check(place: Place, run: Run) -> None:
    code, printed, complaint = run(place.calibrate())
    assert (code, complaint) == (0, "")
    lines = [line for line in printed.splitlines() if not line.startswith("warning: ")]  # of few tokens
    numbers = [
        (r"\d+ s left", "L"),
        (r"\d+\.\d s", "T"),
        (r"[\d,]+ tokens", "N tokens"),
        (r"[\d.]+ [MG]B", "M"),
    ]
    for pattern, short in numbers:
        lines[:4] = [re.sub(pattern, short, line) for line in lines[:4]]
    assert lines[:4] == [
        "[1/4] model.layers.0: 7 modules, T, 1 batches, N tokens/s, L, M",
        "[2/4] model.layers.1: 7 modules, T, 1 batches, N tokens/s, L, M",
        "[3/4] model.layers.2: 7 modules, T, 1 batches, N tokens/s, L, M",
        "[4/4] lm_head, model.norm: 0 modules, T, M",
    ]
    assert re.fullmatch(rf"21 modules quantized in \d+\.\d s; \d+\.\d kB in {place.out}", lines[4])

    code, printed, complaint = run(place.evaluate("--weights", place.out))
    assert (code, complaint) == (0, "")
    assert re.fullmatch(r"perplexity \d+\.\d{4} over 234 tokens, \d+\.\d s\n", printed)

    code, printed, complaint = run(["check", str(place.artifact)])
    assert (code, complaint) == (0, "")
    manifest = read_manifest(place.artifact)
    assert printed.splitlines() == [
        f"{place.artifact}: valid; {len(manifest.files)} files and 3 programs match the manifest",
        "model: LlamaForCausalLM from transformers.models.llama.modeling_llama, 4 subgraphs",
        f"input key: {manifest.input_key}",
        "opaque steps: none",
    ]


def test_json(place: Place, run: Run) -> None:
    code, printed, complaint = run(place.calibrate("--json"))
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert (facts["path"], len(facts["modules"]), facts["unreached"]) == (str(place.out), 21, [])
    assert facts["bytes"] == sum(tensor.nbytes for tensor in read_tensors(place.out).values())
    assert list(facts["modules"][0]) == [
        *("name", "algorithm", "scheme", "loss", "error", "damping", "num_tokens", "num_dead", "fallback"),
        *("seconds", "num_bytes"),
    ]
    assert all("saw fewer tokens than input features" in remark for remark in facts["remarks"])

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


def test_a_short_text_is_one_sample(place: Place, run: Run) -> None:
    text = place.write("short.txt", "hello")
    code, printed, complaint = run(place.evaluate("--data", text))
    assert (code, complaint) == (0, f"warning: {text} has 6 tokens, which become one sample of less than 256\n")
    assert printed.splitlines()[0] == f"{text}: 1 samples, 6 tokens; 6 tokens each"
    command = place.evaluate("--data", text, "--seq-len", "256")
    assert_refused(run(command), "short.txt has 0 windows of 256 tokens (6 tokens in all)", "use more text")


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
    code, _, complaint = run(place.calibrate("--max-shard-size", "1MB", "--dtype", "bfloat16", "--device", "cpu"))
    assert (code, complaint) == (0, "")
    assert torch.equal(read_tensors(place.out)["lm_head.weight"], read_tensors(place.weights)["lm_head.weight"]), (
        "the run's dtype is not the checkpoint's"
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dtype", "float63"], ["--dtype must be one of auto, ", "got 'float63'"]),
        (["--device", "abacus"], ["device 'abacus' is not available", "available: cpu"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "many"], ["--batch-size"]),
        (["--seq-len", "1"], ["--seq-len"]),
        (["--seq-len", "41"], ["were cut at 40 tokens, but 41 are required"]),
        (["--samples", "7"], ["has 6 samples, but 7 are required"]),
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
    assert_refused(run(place.calibrate("--device", "cuda")), "device 'cuda' is not available", "available: cpu")


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
    assert_refused(run(arguments, seqbuild.cli.app.main), part, program="seqbuild")


@pytest.mark.parametrize("main", [runtime.cli.app.main, seqbuild.cli.app.main])
def test_without_arguments_there_is_help(run: Run, main: Callable[[list[str]], int]) -> None:
    code, printed, complaint = run([], main)
    assert (code, complaint) == (2, "")
    assert "  calibrate  " in printed


def test_version_skew_can_be_accepted(place: Place, run: Run) -> None:
    rely_on_other_sources(place)
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
    assert_refused(run(command), "BertModel returns last_hidden_state, pooler_output, but no logits")
    command[command.index("--seq-len") + 1] = "600"
    assert_refused(run(command), "a sample has 600 tokens", "--seq-len 512 or less")


def test_debug_shows_the_traceback(place: Place, run: Run) -> None:
    place.data = place.write("empty.txt", "")
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
    assert_refused(run(place.calibrate()), "needs at least 51", "kB, but its disk has 1 B left")
    assert place.tree() == before


def test_a_disk_that_fills_up_during_the_run(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = place.tree()
    assert_refused(run(place.calibrate()), f"cannot write {place.out}: the disk is full (nothing was left behind)")
    assert place.tree() == before


def test_a_real_disk_that_is_full(place: Place, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    try:
        monkeypatch.setattr("runtime.streaming.workplace.require_space", lambda path, num_bytes: None)
        place.out = disk / "out"
        result = run(place.calibrate())
        assert_refused(
            result, f"cannot write {place.out}: the disk is full (1 finished subgraph is kept, continue with --"
        )
        assert [path.name for path in disk.iterdir()] == [".out.run.partial"]
        subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
        assert run(place.calibrate("--resume"))[0] == 0
        resumed = directory_bytes(place.out)
        place.out = disk / "whole"
        assert run(place.calibrate())[0] == 0
        assert resumed == directory_bytes(place.out)
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

    monkeypatch.setattr("runtime.quantize.expert_groups.collect_statistics", fail)
    before = place.tree()
    assert_refused(run(place.calibrate()), "out of memory", "lower --batch-size or --seq-len")
    assert place.tree() == before


def test_an_internal_error_is_one_line(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("runtime.quantize.expert_groups.collect_statistics", fail)
    before = place.tree()
    assert_refused(
        run(place.calibrate()),
        "internal error: AssertionError at test_cli.py:",
        "a bug (this is a bug in seqbuild",
        "--debug shows the traceback",
    )
    code, _, complaint = run(place.calibrate("--debug"))
    assert code == 2 and "Traceback" in complaint
    assert place.tree() == before
