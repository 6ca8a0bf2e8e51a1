"""Workers exchange tensors and JSON: nothing that one of them sends can execute code on another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules that write or read pickles, or send objects to other processes as such.
MODULES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle")
MODULES += ("multiprocessing", "torch.multiprocessing", "concurrent.futures.process", "torch.distributed.rpc")
MODULES += ("torch.distributed.checkpoint", "torch.distributed.nn", "torch.serialization", "ray", "mpi4py", "xmlrpc")
# Attributes and functions of torch, numpy and the standard library that do the same.
NAMES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "_object_to_tensor",
    "_tensor_to_object",
    "rpc_sync",
    "rpc_async",
    "Pickler",
    "Unpickler",
    "ProcessPoolExecutor",
    "read_pickle",
    "to_pickle",
    "allow_pickle",
}
# Of torch: the same names of json and safetensors are harmless.
OF_TORCH = {"save", "load", "jit", "package", "multiprocessing", "serialization"}


def unsafe(text: str) -> Iterator[str]:
    """Everything in a source that sends or reads objects other than tensors and JSON, with its line."""
    torch_names = {"torch"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
                name = f"{module}.{alias.name}" if module else alias.name
                torch_names |= {alias.asname} if name == "torch" and alias.asname else set()
                is_module = any(name == known or name.startswith(f"{known}.") for known in MODULES)
                if is_module or alias.name in NAMES or name in {f"torch.{last}" for last in OF_TORCH}:
                    yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Attribute):
            is_of_torch = isinstance(node.value, ast.Name) and node.value.id in torch_names
            if node.attr in NAMES or (is_of_torch and node.attr in OF_TORCH):
                yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, (ast.Name, ast.keyword)):
            used = node.id if isinstance(node, ast.Name) else node.arg
            if used in NAMES:
                yield f"line {node.lineno}: {used}"
        elif isinstance(node, ast.Call):
            names = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            is_import = getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__")
            is_lookup = getattr(node.func, "id", "") == "getattr"
            if (is_import and any(name.startswith(MODULES) for name in names)) or (is_lookup and set(names) & NAMES):
                yield f"line {node.lineno}: {names}"


def test_the_host_exchanges_tensors_and_json_only() -> None:
    paths = sorted((ROOT / "runtime").rglob("*.py"))
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): list(unsafe(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from multiprocessing import connection",
        "import torch.multiprocessing as mp",
        "from torch import multiprocessing",
        "import torch as t\nt.load('x')",
        "import torch\ntorch.save(x, 'y')",
        "from torch import load",
        "import torch.distributed as dist\ndist.broadcast_object_list([x])",
        "from torch.distributed import all_gather_object as gather",
        "from torch.distributed.distributed_c10d import _tensor_to_object",
        "import torch.distributed.rpc",
        "import importlib\nimportlib.import_module('pickle')",
        "getattr(dist, 'gather_object')(x)",
        "numpy.load(path, allow_pickle=True)",
        "from concurrent.futures import ProcessPoolExecutor",
    ],
)
def test_the_check_finds_each_way(text: str) -> None:
    assert list(unsafe(text))


def test_the_check_lets_json_and_safetensors_pass() -> None:
    assert not list(unsafe("import json, torch\nfrom safetensors.torch import save\njson.load(f)\ntorch.float32"))


def test_torch_distributed_is_used_in_one_place() -> None:
    users = set()
    for path in (ROOT / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            if any(name.startswith("torch.distributed") for name in names):
                users.add(path.relative_to(ROOT / "runtime").parts[0])
    assert users == {"workers"}
