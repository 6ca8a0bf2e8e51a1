"""Statistics on disk: recipes that are solved from them give the bytes of a run that measures, and nothing runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import runtime
from runtime.errors import DataError, OutputError, RecipeError, UsageError
from runtime.planning.request import plan_artifact
from runtime.quantize.statistics import Needs
from runtime.recipe.recipe import Recipe
from runtime.saved_statistics.records import INDEX_NAME, SavedIndex, SavedStep, encoded, read_record, sha256_of
from runtime.saved_statistics.store import StatisticsStore
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import (
    NARROW_W4,
    Small,
    Stop,
    calibrate,
    directory_bytes,
    recipe,
    stop_at,
    token_batches,
)
from tests.runtime.worker_runs import Call, run_workers
from tests.runtime.workshop import ROUTED, Workshop, files_of

CPU = torch.device("cpu")
_IGNORE = "ignore: [lm_head, 're:.*mlp.gate$']"
_WITHOUT_EXPERTS = "ignore: [lm_head, 're:.*mlp.gate$', 're:.*experts.*']"
_W4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}"
_W8 = "{num_bits: 8, type: int, symmetric: true, strategy: channel}"
_IMATRIX = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16, observer: imatrix_mse}"
_FP8 = "{num_bits: 8, type: float, symmetric: true, strategy: tensor}"
_STATIC = "{num_bits: 8, type: float, symmetric: true, strategy: tensor, dynamic: false}"
_HEADS = "{num_bits: 8, type: float, symmetric: true, strategy: attn_head, dynamic: false}"


def _group(weights: str, *more: str) -> str:
    inside = ", ".join((f"targets: [Linear], weights: {weights}", *more))
    return f"config_groups: {{a: {{{inside}}}}}, {_IGNORE}"


TEXTS = {
    "gptq": f"GPTQModifier: {{{_group(_W4)}, actorder: static}}",
    "awq": f"AWQModifier: {{{_group(_W4)}}}",
    "smoothquant w8a8": f"SmoothQuantModifier: {{}}\nGPTQModifier: {{{_group(_W8, f'input_activations: {_STATIC}')}}}",
    "static fp8 and cache": (
        f"QuantizationModifier: {{{_group(_FP8, f'input_activations: {_STATIC}')}, kv_cache_scheme: {_STATIC}}}"
    ),
    "nvfp4": f"GPTQModifier: {{targets: Linear, scheme: NVFP4, {_IGNORE}}}",
    "imatrix and heads": f"QuantizationModifier: {{{_group(_IMATRIX)}, kv_cache_scheme: {_HEADS}}}",
}
_LINEAR = "targets: Linear, ignore: [lm_head]"
ROTATED = {
    "gptq": f"SpinQuantModifier: {{rotations: [R1, R2]}}\nGPTQModifier: {{scheme: W4A16, {_LINEAR}}}",
    "fp8": f"SpinQuantModifier: {{rotations: [R1, R2]}}\nQuantizationModifier: {{scheme: FP8, {_LINEAR}}}",
    "without": f"QuantizationModifier: {{scheme: FP8, {_LINEAR}}}",
    "others": f"SpinQuantModifier: {{rotations: [R1]}}\nQuantizationModifier: {{scheme: FP8, {_LINEAR}}}",
}
RUNS = {
    **{("llama", name): (text, True) for name, text in TEXTS.items()},
    **{("qwen3_moe", name): (TEXTS[name], True) for name in ("smoothquant w8a8",)},
    **{("qwen3_moe", f"{name}, routed"): (TEXTS[name], False) for name in ("awq", "static fp8 and cache")},
    ("qwen3_moe", "fallback, routed"): (
        f"GPTQModifier: {{{_group(_W4)}, fallback: all_tokens, min_tokens: 110}}",
        False,
    ),
}
OF_RUN = ("seqbuild.json", "README.md")  # these state that the model did not run


def plan_of(name: str) -> Recipe:
    return Recipe.from_text(TEXTS[name], "recipe.yaml")


def compared(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in directory_bytes(folder).items() if name not in OF_RUN}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, narrow_llama: Small, qwen3_moe: Small) -> Callable[..., Path]:
    """The statistics of a model, measured once, with an output of another recipe."""
    root, known = tmp_path_factory.mktemp("kept"), dict[tuple[str, bool], Path]()
    models = {"llama": narrow_llama, "qwen3_moe": qwen3_moe}

    def of(model: str, *, all_tokens: bool = True) -> Path:
        path = root / f"{model}-{all_tokens}"
        if (model, all_tokens) not in known:
            options = {"propagate_error": False, "moe_calibrate_all_experts": all_tokens}
            rtn = recipe(NARROW_W4)
            calibrate(models[model], rtn, root / f"out-{model}-{all_tokens}", keep_statistics=path, **options)
            known[model, all_tokens] = path
        return path

    return of


@pytest.fixture
def copied(kept: Callable[..., Path], tmp_path: Path) -> Path:
    """Statistics that a test may spoil."""
    return Path(shutil.copytree(kept("llama"), tmp_path / "copied"))


def solved(small: Small, plan: Recipe, out: Path, statistics: Path, **options: Any) -> Any:
    return calibrate(small, plan, out, batches=(), statistics=statistics, **options)


@pytest.mark.parametrize(("model", "name"), RUNS)
def test_the_bytes_are_those_of_a_run_that_measures(
    model: str,
    name: str,
    kept: Callable[..., Path],
    narrow_llama: Small,
    qwen3_moe: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, all_tokens = RUNS[model, name]
    small = {"llama": narrow_llama, "qwen3_moe": qwen3_moe}[model]
    plan = Recipe.from_text(text, "recipe.yaml")
    statistics = kept(model, all_tokens=all_tokens)
    options = {"moe_calibrate_all_experts": all_tokens}
    direct = calibrate(small, plan, tmp_path / "direct", propagate_error=False, **options)
    calls = stop_at(monkeypatch, 0)
    found = solved(small, plan, tmp_path / "saved", statistics, **options)
    assert calls == [0]
    assert compared(tmp_path / "saved") == compared(tmp_path / "direct")
    assert found.modules == direct.modules
    assert [one.error for one in found.modules] == [one.error for one in direct.modules]
    records = [json.loads((tmp_path / name / "seqbuild.json").read_text()) for name in ("saved", "direct")]
    said = [line for line in records[0]["warnings"] if line not in records[1]["warnings"]]
    assert len(said) == 1
    assert "without running the model" in said[0]
    assert {**records[0], "warnings": []} == {**records[1], "warnings": []}


def test_an_error_is_estimated_from_the_same_tokens_of_wide_inputs(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of wide inputs, recipes that need no Gram matrix keep a sample of tokens."""
    monkeypatch.setattr("runtime.quantize.statistics.WIDEST_GRAM", 16)
    monkeypatch.setattr("runtime.algorithms.output_squares.NUM_SAMPLED", 100)  # of 366 tokens
    plan, statistics = plan_of("static fp8 and cache"), tmp_path / "statistics"
    direct = calibrate(narrow_llama, plan, tmp_path / "direct", propagate_error=False)
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "kept", propagate_error=False, keep_statistics=statistics)
    found = solved(narrow_llama, plan, tmp_path / "saved", statistics)
    assert [one.error for one in found.modules] == [one.error for one in direct.modules]
    assert [one.loss for one in found.modules] == [one.loss for one in direct.modules]
    saved = load_file(statistics / "step-00001-input-00000.safetensors")
    assert 50 <= len(saved["sample"]) <= 100


# The run that keeps them


def test_a_run_that_keeps_statistics_writes_the_same_checkpoint(narrow_llama: Small, tmp_path: Path) -> None:
    plan = plan_of("gptq")
    direct = calibrate(narrow_llama, plan, tmp_path / "direct", propagate_error=False)
    for name in ("one", "two"):
        options = {"propagate_error": False, "keep_statistics": tmp_path / f"{name}-statistics"}
        assert calibrate(narrow_llama, plan, tmp_path / name, **options).modules == direct.modules
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "direct")
    assert directory_bytes(tmp_path / "one-statistics") == directory_bytes(tmp_path / "two-statistics")
    names = {"direct", "one", "two", "one-statistics", "two-statistics"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_they_are_gram_matrices_of_the_original_model(narrow_llama: Small, kept: Callable[..., Path]) -> None:
    """The Gram matrix of every module, computed in float64 by hooks on transformers' model."""
    from tests.runtime.small import load_transformers

    store, model = StatisticsStore.open(kept("llama")), load_transformers(narrow_llama.weights)
    expected: dict[str, torch.Tensor] = {}

    def hook(name: str, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        flat_TI = args[0].detach().double().reshape(-1, args[0].shape[-1])
        expected[name] = expected.get(name, torch.zeros(1, dtype=torch.float64)) + flat_TI.t() @ flat_TI

    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_pre_hook(partial(hook, name))
    with torch.no_grad():
        for batch in token_batches():
            model(**batch, use_cache=False)
    seen: dict[str, torch.Tensor] = {}
    for index in range(store.num_steps):
        reader = store.step(index)
        for names in reader.groups([name for one in reader.saved.passes for name in one.measured], all_tokens=True):
            number = reader.input_of(names[0])
            assert number is not None
            found = reader.read(number, Needs(hessian=True), CPU)
            assert found.num_tokens == sum(batch["input_ids"].numel() for batch in token_batches())
            seen |= dict.fromkeys(names, found.hessian_II)
    assert set(seen) == set(linears)
    for name, gram_II in seen.items():
        torch.testing.assert_close(gram_II.double(), expected[name], rtol=1e-4, atol=1e-3)


def test_experts_that_the_recipe_leaves_are_measured_too(mixtral: Small, tmp_path: Path) -> None:
    """The checkpoint does not depend on it, although their matrices are split for the measurement alone."""
    attention = Recipe.from_text(f"GPTQModifier: {{{_group(_W4).replace(_IGNORE, _WITHOUT_EXPERTS)}}}", "recipe.yaml")
    every = plan_of("gptq")
    calibrate(mixtral, attention, tmp_path / "direct", propagate_error=False)
    calibrate(mixtral, attention, tmp_path / "kept", propagate_error=False, keep_statistics=tmp_path / "statistics")
    assert directory_bytes(tmp_path / "kept") == directory_bytes(tmp_path / "direct")
    calibrate(mixtral, every, tmp_path / "every", propagate_error=False)
    solved(mixtral, every, tmp_path / "saved", tmp_path / "statistics")
    assert compared(tmp_path / "saved") == compared(tmp_path / "every")


@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_stopped_run_continues_with_its_statistics(
    number: int, narrow_llama: Small, kept: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"propagate_error": False, "keep_statistics": tmp_path / "statistics"}
    stop_at(monkeypatch, number)
    with pytest.raises(Stop):
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options)
    assert not (tmp_path / "statistics").exists()
    stop_at(monkeypatch, 0)
    done = calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options, resume=True)
    assert done.resumed_at == number // 3
    assert directory_bytes(tmp_path / "statistics") == directory_bytes(kept("llama"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "statistics"}


def test_a_run_that_was_killed_after_it_had_published_them_continues(
    narrow_llama: Small, kept: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stop

    options = {"propagate_error": False, "keep_statistics": tmp_path / "statistics"}
    with monkeypatch.context() as patch:
        patch.setattr("runtime.calibration.write_companions", stop)
        with pytest.raises(Stop):
            calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options)
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options, resume=True)
    assert directory_bytes(tmp_path / "statistics") == directory_bytes(kept("llama"))
    assert (tmp_path / "out").is_dir()


def test_missing_statistics_of_finished_steps_are_one_error(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"propagate_error": False, "keep_statistics": tmp_path / "statistics"}
    stop_at(monkeypatch, 8)
    with pytest.raises(Stop):
        calibrate(narrow_llama, plan_of("gptq"), tmp_path / "out", **options)
    shutil.rmtree(tmp_path / ".statistics.run.partial")
    stop_at(monkeypatch, 0)
    with pytest.raises(OutputError, match="statistics of step 0 are missing"):
        calibrate(narrow_llama, plan_of("gptq"), tmp_path / "out", **options, resume=True)
    del options["keep_statistics"]
    assert calibrate(narrow_llama, plan_of("gptq"), tmp_path / "out", **options, resume=True).resumed_at == 2


def test_a_full_disk_names_the_directory_and_keeps_what_is_finished(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.saved_statistics import keeper

    written, write = [0], keeper.write_tensors

    def full(*arguments: Any) -> str:
        written[0] += 1
        if written[0] == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    options = {"propagate_error": False, "keep_statistics": tmp_path / "statistics"}
    with monkeypatch.context() as patch:
        patch.setattr(keeper, "write_tensors", full)
        with pytest.raises(OutputError, match=r"cannot write .*statistics: the disk is full") as error:
            calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options)
    assert "continue with --resume" in error.value.hint
    assert calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **options, resume=True).resumed_at
    StatisticsStore.open(tmp_path / "statistics")


def test_too_little_space_is_known_before_the_run(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.saved_statistics.kept_folder.require_space", _no_space)
    calls = stop_at(monkeypatch, 0)
    with pytest.raises(OutputError, match="statistics needs at least"):
        calibrate(
            narrow_llama,
            recipe(NARROW_W4),
            tmp_path / "out",
            propagate_error=False,
            keep_statistics=tmp_path / "statistics",
        )
    assert calls == [0]
    assert list(tmp_path.iterdir()) == []


def _no_space(path: Path, num_bytes: int) -> None:
    assert num_bytes > 40_000
    raise OutputError(f"{path} needs at least {num_bytes} bytes")


def test_a_failed_run_leaves_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    batches = token_batches()
    plan = Recipe.from_text(f"GPTQModifier: {{{NARROW_W4}, min_tokens: 100000}}", "recipe.yaml")
    with pytest.raises(DataError, match="min_tokens"):
        calibrate(
            narrow_llama,
            plan,
            tmp_path / "out",
            batches=batches,
            propagate_error=False,
            keep_statistics=tmp_path / "statistics",
        )
    assert not (tmp_path / "statistics").exists()


# Plans


@pytest.mark.parametrize(("model", "all_tokens"), [("llama", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_the_plan_predicts_the_disk_space(
    model: str, all_tokens: bool, kept: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    small: Small = request.getfixturevalue({"llama": "narrow_llama"}.get(model, model))
    path = kept(model, all_tokens=all_tokens)
    actual = sum(file.stat().st_size for file in path.iterdir() if file.name != INDEX_NAME)
    options = {"num_samples": 10, "seq_len": 40, "batch_size": 4, "recipe": recipe(NARROW_W4)}
    if all_tokens:
        plan = plan_artifact(small.load(), **options, keep_statistics=True).plan
        assert plan.saved_bytes == pytest.approx(actual, rel=0.02)
        assert plan.disk_bytes == plan.output_bytes + plan.saved_bytes
    else:
        from tests.runtime.small import calibrate as run

        events: list[int] = []
        with pytest.raises(OutputError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "runtime.saved_statistics.kept_folder.require_space", lambda _, size: (events.append(size), _raise())
            )
            run(
                small,
                recipe(NARROW_W4),
                path.parent / "never",
                propagate_error=False,
                moe_calibrate_all_experts=False,
                keep_statistics=path.parent / "never-statistics",
            )
        assert events[0] == pytest.approx(actual, rel=0.15)  # without shapes, which experts share an input is a guess


def _raise() -> None:
    raise OutputError("no space")


def test_a_plan_from_statistics_needs_no_memory_for_batches(narrow_llama: Small, kept: Callable[..., Path]) -> None:
    options = {"num_samples": 10, "seq_len": 40, "batch_size": 4, "recipe": plan_of("awq")}
    measured = plan_artifact(narrow_llama.load(), **options).plan
    plan = plan_artifact(narrow_llama.load(), **options, statistics=kept("llama")).plan
    assert not any(step.runs or step.working or step.activations for step in plan.steps)
    assert plan.statistics_bytes == measured.statistics_bytes
    assert plan.host_bytes < measured.host_bytes
    assert plan.saved_bytes == 0


# What cannot be used


def edited(folder: Path, index: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the list of a step, and the digest in the index with it, as an attacker would."""
    path = folder / f"step-{index:05d}.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_bytes(json.dumps(values).encode())
    index_path = folder / INDEX_NAME
    known, _ = read_record(index_path, SavedIndex)
    steps = list(known.steps)
    steps[index] = sha256_of(path.read_bytes())
    index_path.write_bytes(encoded(msgspec.structs.replace(known, steps=tuple(steps)).sealed()))


def matrix_edited(folder: Path, change: Callable[[bytearray], None]) -> None:
    """Change the Gram matrix of the first input of the second step, and all digests with it."""
    path = folder / "step-00001-input-00000.safetensors"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edited(folder, 1, lambda values: values["inputs"][0].update(matrix=digest))


def _number(data: bytearray, place: int, value: float) -> None:
    begin = int.from_bytes(data[:8], "little") + 8
    data[begin + 4 * place : begin + 4 * place + 4] = torch.tensor([value]).numpy().tobytes()


def _flipped(folder: Path) -> None:
    path = folder / "step-00001-input-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda folder: (folder / INDEX_NAME).unlink(), "has no statistics.json"),
    "empty index": (lambda folder: (folder / INDEX_NAME).write_bytes(b""), "statistics.json cannot be used"),
    "deep index": (lambda folder: (folder / INDEX_NAME).write_bytes(b"[" * 100_000), "cannot be used"),
    "another format": (
        lambda folder: (folder / INDEX_NAME).write_bytes(
            (folder / INDEX_NAME).read_bytes().replace(b'"format_version":1', b'"format_version":2')
        ),
        "version 2",
    ),
    "index of other data": (
        lambda folder: (folder / INDEX_NAME).write_bytes(
            (folder / INDEX_NAME).read_bytes().replace(b"num_tokens", b"num_tokers")
        ),
        "differs from the one that it states",
    ),
    "index is a pipe": (lambda folder: _pipe(folder / INDEX_NAME), "regular file"),
    "list is missing": (lambda folder: (folder / "step-00001.json").unlink(), "step-00001.json cannot be used"),
    "list of another run": (lambda folder: (folder / "step-00001.json").write_bytes(b"{}"), "SHA-256 differs"),
    "list is wrong": (lambda folder: edited(folder, 1, lambda values: values.pop("inputs")), "missing required field"),
    "list has more": (lambda folder: edited(folder, 1, lambda values: values.update(more=1)), "unknown field"),
    "negative width": (
        lambda folder: edited(folder, 1, lambda values: values["inputs"][0].update(width=-1)),
        "width",
    ),
    "huge width": (
        lambda folder: edited(folder, 1, lambda values: values["inputs"][0].update(width=2**24)),
        "cannot be used",
    ),
    "another width": (
        lambda folder: edited(folder, 1, lambda values: values["inputs"][0].update(width=16)),
        "has 16 features, not 32",
    ),
    "no such input": (
        lambda folder: edited(folder, 1, lambda values: values["passes"][0]["calls"].update({"x": 99})),
        "reads an input that is not listed",
    ),
    "odd dtype": (
        lambda folder: edited(folder, 1, lambda values: values["inputs"][0].update(num_sampled=3, sample_dtype="I64")),
        "a sample has 3 tokens",
    ),
    "matrix is missing": (
        lambda folder: (folder / "step-00001-input-00000.safetensors").unlink(),
        "input-00000.safetensors cannot be used",
    ),
    "matrix is short": (lambda folder: _cut(folder / "step-00001-input-00000.safetensors"), "bytes, not"),
    "matrix is a pipe": (lambda folder: _pipe(folder / "step-00001-input-00000.safetensors"), "regular file"),
    "a bit flipped": (_flipped, "SHA-256 differs"),
    "another header": (
        lambda folder: matrix_edited(folder, lambda data: data.__setitem__(slice(10, 12), b"xx")),
        "its header differs",
    ),
    "not a number": (
        lambda folder: matrix_edited(folder, lambda data: _number(data, 1, float("nan"))),
        "not the Gram matrix",
    ),
    "negative diagonal": (
        lambda folder: matrix_edited(folder, lambda data: _number(data, 0, -1.0)),
        "not finite or negative",
    ),
    "no Gram matrix": (lambda folder: matrix_edited(folder, lambda data: _number(data, 1, 1e9)), "not the Gram matrix"),
    "sums are short": (lambda folder: _cut(folder / "step-00001.safetensors"), "bytes, not"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_statistics_are_one_error(name: str, copied: Path, narrow_llama: Small, tmp_path: Path) -> None:
    spoil, message = SPOILED[name]
    spoil(copied)
    with pytest.raises(DataError) as error:
        solved(narrow_llama, plan_of("smoothquant w8a8"), tmp_path / "out", copied)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_name_what_differs(
    kept: Callable[..., Path], narrow_llama: Small, llama: Small, qwen3_moe: Small, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(narrow_llama.weights, tmp_path / "weights"))
    file = next(weights.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-2] ^= 64
    file.write_bytes(data)
    cases = [
        (narrow_llama, {"weights": weights}, "other weights"),
        (llama, {}, "another artifact and other weights"),
        (narrow_llama, {"dtype": torch.bfloat16}, "dtype float32 instead of bfloat16"),
    ]
    for small, options, message in cases:
        with pytest.raises(DataError, match=f"were measured with {message}"):
            solved(small, plan_of("gptq"), tmp_path / "out", kept("llama"), **options)
    with pytest.raises(DataError, match="does not exist"):
        solved(narrow_llama, plan_of("gptq"), tmp_path / "out", tmp_path / "missing")
    assert not (tmp_path / "out").exists()


def test_rotations_have_statistics_of_their_own(llama: Small, tmp_path: Path) -> None:
    texts = {name: Recipe.from_text(text, "recipe.yaml") for name, text in ROTATED.items()}
    options: dict[str, Any] = {"propagate_error": False}
    calibrate(llama, texts["gptq"], tmp_path / "out", **options, keep_statistics=tmp_path / "kept")
    calibrate(llama, texts["fp8"], tmp_path / "direct", **options)
    solved(llama, texts["fp8"], tmp_path / "saved", tmp_path / "kept")
    assert compared(tmp_path / "saved") == compared(tmp_path / "direct")
    for name in ("without", "others"):
        with pytest.raises(DataError, match="were measured with other rotations"):
            solved(llama, texts[name], tmp_path / "never", tmp_path / "kept")


def test_routed_experts_need_statistics_of_routed_tokens(
    kept: Callable[..., Path], qwen3_moe: Small, tmp_path: Path
) -> None:
    plan = plan_of("gptq")
    with pytest.raises(DataError, match=r"experts.0.*on the tokens that are routed to them"):
        solved(qwen3_moe, plan, tmp_path / "out", kept("qwen3_moe"), moe_calibrate_all_experts=False)
    solved(qwen3_moe, plan, tmp_path / "all", kept("qwen3_moe", all_tokens=False))  # they have both
    solved(qwen3_moe, plan, tmp_path / "whole", kept("qwen3_moe"))
    assert compared(tmp_path / "all") == compared(tmp_path / "whole")


MAPPING = "[[re:.*k_proj, re:.*q_proj], re:.*input_layernorm]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"SmoothQuantModifier: {{mappings: [{MAPPING}]}}\nGPTQModifier: {{{_group(_W8)}}}",
            "",
        ),
        (
            f"SmoothQuantModifier: {{mappings: [[[re:.*o_proj], re:.*q_proj]]}}\nGPTQModifier: {{{_group(_W8)}}}",
            "is checked by running the model",
        ),
        (f"AWQModifier: {{{_group(_W4)}, kv_cache_scheme: {_STATIC}}}", "must be measured again"),
    ],
)
def test_recipes_that_run_the_model_are_refused(
    text: str, message: str, kept: Callable[..., Path], narrow_llama: Small, tmp_path: Path
) -> None:
    plan = Recipe.from_text(text, "recipe.yaml")
    if not message:
        solved(narrow_llama, plan, tmp_path / "out", kept("llama"))
        return
    with pytest.raises(RecipeError, match=message):
        solved(narrow_llama, plan, tmp_path / "out", kept("llama"))


class Own:
    """A modifier that changes nothing."""

    def measures(self, names: Any) -> bool:
        return False

    def rewrites(self, names: Any) -> tuple[str, ...]:
        return ()

    def apply(self, work: Any) -> None:
        return


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_statistics": "new"}, "--no-propagate-error"),
        ({"keep_statistics": "new", "statistics": "old"}, "exclude each other"),
        ({"statistics": "old"}, "replaces the calibration data"),
        ({"keep_statistics": "new", "propagate_error": False, "batches": ()}, "needs calibration data"),
        ({"keep_statistics": "new", "propagate_error": False, "parts": True}, "--parts"),
        ({"statistics": "old", "batches": (), "own_modifiers": [Own()]}, "own_modifiers"),
        ({"keep_statistics": 3}, "keep_statistics is 3"),
    ],
)
def test_options_that_exclude_each_other(
    options: dict[str, Any], message: str, narrow_llama: Small, tmp_path: Path
) -> None:
    paths = {"new": tmp_path / "new", "old": tmp_path / "old"}
    given = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises((UsageError, OutputError), match=message):
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(place: Place, run: Run) -> None:
    kept, again = place.folder / "statistics", place.folder / "again"
    assert_refused(run(place.calibrate("--keep-statistics", kept)), "--no-propagate-error")
    code, out, complaint = run(place.calibrate("--keep-statistics", kept, "--no-propagate-error"))
    assert code == 0, complaint
    command = place.calibrate("--statistics", kept)
    command[command.index("-o") + 1] = str(again)
    assert_refused(run(command), "pass --data or --statistics")
    command = [part for part in command if part not in ("--data", str(place.data))]
    code, out, complaint = run(command)
    assert code == 0, complaint
    assert "without running the model" in out
    assert compared(again) == compared(place.out)
    assert "--statistics statistics" in json.loads((again / "seqbuild.json").read_text())["command"]


# Workers


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_workers_write_and_read_the_same_bytes(tmp_path: Path, sharded_llama: Small, qwen3_moe: Small) -> None:
    shop = Workshop(tmp_path, sharded_llama, qwen3_moe)
    # The shop's recipe has `target: original`, which needs propagation.
    (tmp_path / f"{ROUTED}.yaml").write_text(f"GPTQModifier: {{{NARROW_W4}, fallback: rtn}}")

    def commands(size: int) -> list[list[str]]:
        statistics = tmp_path / str(size) / "statistics"
        kept = [*shop.command(ROUTED, shop.out("kept", size)), "--no-propagate-error", "--keep-statistics"]
        command = shop.command(ROUTED, shop.out("saved", size))
        place = command.index("--data")
        return [[*kept, str(statistics)], [*command[:place], *command[place + 2 :], "--statistics", str(statistics)]]

    for command in commands(0):
        assert runtime.cli.app.main(command) == 0
    outcome = run_workers([Call(command) for command in commands(2)], 2, tmp_path, torchrun=None)
    assert set(outcome.codes) == {0}, outcome.errors
    for name in ("kept-{}", "saved-{}", "{}/statistics"):
        found, expected = (files_of(tmp_path / name.format(size)) for size in (2, 0))
        assert found == expected, name


def test_a_list_survives_its_encoding(kept: Callable[..., Path]) -> None:
    path = kept("qwen3_moe") / "step-00001.json"
    saved, digest = read_record(path, SavedStep)
    assert encoded(saved) == path.read_bytes()
    assert sha256_of(encoded(saved)) == digest
