"""The comparison of two checkpoints, what an evaluation writes, and how a killed one continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runtime
from runtime.cli.evaluate import _task_options
from runtime.evaluation.comparison import compare
from runtime.evaluation.options import PassOptions
from tests.runtime.place import ROOT, Place, Run, assert_refused
from tests.runtime.small import RECIPES, Small, Stop, calibrate, load_transformers, recipe, stop_at, token_batches
from tests.runtime.torchrun import Torchrun

BATCHES = token_batches([(3, 33), (2, 33), (1, 7), (2, 1)], seed=9)


@pytest.fixture(scope="module")
def quantized(llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    calibrate(llama, recipe(RECIPES["W4A16"]), out)
    return out


def test_the_comparison_is_that_of_plain_calls(llama: Small, quantized: Path) -> None:
    options = PassOptions(device=torch.device("cpu"))
    found = compare(llama.load(), weights=llama.weights, other=quantized, batches=BATCHES, options=options)
    models = [load_transformers(path) for path in (llama.weights, quantized)]
    divergences, agreed = [], []
    for batch in BATCHES:
        with torch.no_grad():
            first, second = (
                model(**batch, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in models
            )
        divergences.append((first.exp() * (first - second)).sum(-1).flatten())
        agreed.append((first.argmax(-1) == second.argmax(-1)).flatten())
    expected, same = torch.cat(divergences), torch.cat(agreed).double()
    assert found.num_tokens == len(expected) == 166
    assert found.kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.kl_median == pytest.approx(float(expected.quantile(0.5)), rel=1e-3)
    assert found.kl_99 == pytest.approx(float(expected.quantile(0.99)), rel=1e-3)
    assert found.kl_max == pytest.approx(float(expected.max()), rel=1e-3)
    assert found.agreement == float(same.mean())
    for perplexity, weights in ((found.perplexity, llama.weights), (found.other_perplexity, quantized)):
        alone = runtime.evaluate(llama.load(), weights=weights, batches=BATCHES)
        assert perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    itself = compare(llama.load(), weights=quantized, other=quantized, batches=BATCHES, options=options)
    assert (itself.kl_max, itself.agreement, itself.perplexity) == (0, 1, itself.other_perplexity)


def comparison(place: Place, quantized: Path, *more: str | Path) -> list[str]:
    """The command with one sample a batch; the output is `place.out`."""
    options = ["--compare", quantized, "--batch-size", "1", "--save-every", "0", "-o", place.out, "--device", "cpu"]
    return place.evaluate(*options, *more)


def test_a_stopped_comparison_continues(
    place: Place, quantized: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed, complaint = run(comparison(place, quantized, "--json"))
    assert (code, complaint) == (0, "")
    expected = json.loads((place.out / "results.json").read_text())
    assert {name: value for name, value in json.loads(printed).items() if name != "seconds"} == expected
    assert_refused(run(comparison(place, quantized)), "is not empty")
    assert_refused(run(comparison(place, quantized, "--resume")), "already complete", "results.json")
    (place.out / "results.json").unlink()
    place.out.rmdir()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 2 * 6 * 2 + 3)  # in the third of four subgraphs, of two checkpoints with six batches
        run(comparison(place, quantized))
    assert_refused(run(comparison(place, quantized)), "2 finished subgraphs", "--resume")
    other = comparison(place, quantized, "--resume", "--dtype", "bfloat16")
    assert_refused(run(other), "differs from the interrupted one in the dtype")
    with monkeypatch.context() as patch:
        calls = stop_at(patch, 0)
        code, printed, _ = run(comparison(place, quantized, "--resume"))
    assert (code, calls[0]) == (0, 2 * 6 * 2)
    assert "resuming after 2 of 4 subgraphs" in printed
    assert "KL divergence" in printed
    assert json.loads((place.out / "results.json").read_text()) == expected
    assert [path.name for path in place.out.parent.glob(".out*")] == []


def test_a_killed_comparison_continues_with_other_workers(
    place: Place, quantized: Path, run: Run, tmp_path: Path
) -> None:
    """Killed by the operating system in one process, and continued by two."""
    slow = (
        "import os, signal, sys\nfrom runtime.chain import LoadedSubgraph\nreal, calls = LoadedSubgraph.forward, [0]\n"
        "def forward(self, model, **inputs):\n    calls[0] += 1\n    if calls[0] == 15:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return real(self, model, **inputs)\n"
        "LoadedSubgraph.forward = forward\nfrom runtime.cli.app import main\nsys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", slow, *comparison(place, quantized)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "workers").mkdir()
    with Torchrun(tmp_path / "workers", 2, comparison(place, quantized, "--resume")) as started:
        done = started.finish()
    assert (done.codes, done.complaints) == ([0, 0], ["", ""])
    assert "resuming after 1 of 4 subgraphs" in done.out[0]
    command = place.evaluate("--compare", quantized, "--batch-size", "1", "--device", "cpu", "--json")
    _, printed, _ = run(command)
    results = json.loads((place.out / "results.json").read_text())
    assert results == {name: value for name, value in json.loads(printed).items() if name != "seconds"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tasks", "hellaswag"], ["--tasks cannot be combined with --data"]),
        (["--limit", "3"], ["--limit is an option of tasks", "--tasks"]),
        (["--resume"], ["--resume requires --output"]),
        (["-o", "results.json"], ["must be a directory"]),
        (["--save-every", "often"], ["--save-every must be a time"]),
        (["--activation-memory", "much"], ["--activation-memory must be a size"]),
        (["--compare", "missing/model/x"], ["missing/model/x"]),
    ],
)
def test_options_that_do_not_fit(place: Place, run: Run, options: list[str], parts: list[str]) -> None:
    assert_refused(run(place.evaluate(*options)), *parts)


def test_what_is_evaluated_must_be_stated(place: Place, run: Run) -> None:
    command = ["evaluate", str(place.artifact), "--weights", str(place.weights)]
    assert_refused(run(command), "there is nothing to evaluate", "--data SOURCE or --tasks NAME")
    assert_refused(run([*command, "--tasks", "a", "--pack", "--samples", "3"]), "an option of --data")
    assert_refused(run([*command, "--tasks", "a", "--compare", "b"]), "--compare measures texts")
    assert_refused(run([*command, "--tasks", " ,"]), "--tasks names no task")
    assert_refused(run([*command, "--tasks", "a", "--log-samples"]), "--log-samples requires --output")
    for limit in ("0", "inf"):
        assert_refused(run([*command, "--tasks", "a", "--limit", limit]), f"--limit {limit} is not a positive number")


def test_zero_and_no_are_values_of_options() -> None:
    given = {"num_fewshot": 0, "prefix_token_id": 0, "add_bos_token": False, "fewshot_as_multiturn": False}
    assert _task_options(["a"], **given) == {"tasks": ["a"], **given}
    assert _task_options() == {"tasks": None}


def test_tasks_without_lm_eval(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    command = ["evaluate", str(place.artifact), "--weights", str(place.weights), "--tasks", "hellaswag"]
    assert_refused(run(command), "tasks require lm-eval", "pip install 'seqbuild-llm[eval]'")
