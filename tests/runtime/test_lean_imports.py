from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.place import ROOT, Place
from tests.runtime.small import directory_bytes

HEAVY = (
    *("transformers", "huggingface_hub", "accelerate", "torch._dynamo", "torch._inductor", "sympy", "triton", "scipy"),
    *("datasets", "pandas", "PIL", "rich"),
)


def python(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


RUN = (
    "import sys\n"
    "from runtime.host import own_process\n"
    "if sys.argv[1] == 'lean': own_process.claim()\n"
    "from runtime.cli.app import main\n"
    "code = main(sys.argv[2:])\n"
    f"print('heavy', *(name for name in {HEAVY} if name in sys.modules))\n"
    "sys.exit(code)\n"
)


def test_a_run_by_itself_imports_less_and_writes_the_same(place: Place) -> None:
    made = {}
    for way in ("lean", "usual"):
        place.out = place.folder / way
        said = python(RUN, way, *place.calibrate("--device", "cpu"))
        made[way] = directory_bytes(place.out)
        assert (said.splitlines()[-1] == "heavy") is (way == "lean"), said
    assert made["lean"] == made["usual"]


def test_transformers_is_whole_afterwards() -> None:
    said = python(
        "from runtime.cli import imports as lean_imports\n"
        "lean_imports.import_alone()\n"
        "import sys, compressed_tensors\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'transformers']\n"
        "import transformers\n"
        "config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "    num_attention_heads=2, vocab_size=8)\n"
        "model = transformers.LlamaForCausalLM(config)\n"
        "base = transformers.PreTrainedModel\n"
        "print(isinstance(model, base), hasattr(base, 'save_pretrained'))"
    )
    assert said.split() == ["True", "True"]


def test_a_process_that_is_not_ours_alone_imports_as_usual(place: Place) -> None:
    said = python(
        "import sys\n"
        "from pathlib import Path\n"
        "from runtime.cli import imports as lean_imports\n"
        "lean_imports.prepare(Path(sys.argv[1]))\n"
        "print('compressed_tensors' in sys.modules)\n",
        place.artifact,
    )
    assert said.strip() == "False"


def test_the_end_of_a_process_is_silent_and_writes_everything(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = (
        "import atexit, gc, sys\n"
        "from pathlib import Path\n"
        "from runtime.host import own_process\n"
        "atexit.register(lambda: Path(sys.argv[1]).write_text(str(gc.get_freeze_count() > 0)))\n"
        "own_process.claim()\n"
        "import json\n"
        "if sys.argv[2]: import triton\n"
        "own_process.settle()\n"
    )
    for name in ("", "triton"):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "seen"), name], cwd=ROOT, capture_output=True, text=True
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
        assert (tmp_path / "seen").read_text() == str(not name)
