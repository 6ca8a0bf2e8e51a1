from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

import runtime
import seqbuild
from tests.runtime.place import ROOT, Place, Run
from tests.sweep import sweep

# A test run in the background may have been told to ignore interruptions, and hands that on to its processes.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from runtime.chain import LoadedSubgraph
real = LoadedSubgraph.forward
def forward(self, model, **inputs):
    print("step", flush=True)
    time.sleep(0.2)
    return real(self, model, **inputs)
LoadedSubgraph.forward = forward
from runtime.cli.app import main
sys.exit(main())
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    yield {**os.environ, "PYTHONPATH": str(ROOT)}


# In this process, an interruption is tested with what a run leaves for the next one (`test_resume`).
@pytest.mark.parametrize(
    ("number", "code", "word"),
    sweep(
        [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
        (signal.SIGTERM, 143, "terminated"),
    ),
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
        assert process.stderr.read() == f"runtime: {word}; no partial output was left behind\n"
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
def test_help_loads_no_torch(module: str, environment: dict[str, str]) -> None:
    code = f"""
import sys
from {module}.cli.app import main
assert main(["--help"]) == 0
heavy = [name for name in ("torch", "transformers", "compressed_tensors", "numpy") if name in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_public_names_are_not_hidden_by_modules_of_the_same_name() -> None:
    for package in (runtime, seqbuild):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name not in ("__main__", "llmcompressor"):  # the latter imports llm-compressor
                importlib.import_module(f"{package.__name__}.{module.name}")
        for name in package.__all__:
            assert not isinstance(getattr(package, name), types.ModuleType), name
