"""Trace the original of a module that was passed to `torch.compile`.

Calling a compiled module enters torch's own compiler, which would trace the trace. Four forms exist: the wrapper that
`torch.compile(model)` returns, the same wrapper as a submodule, `module.compile()`, which replaces the call of a
module, and compiled functions. The first three are replaced by their originals while the block runs; for the last,
torch is told to execute everything eagerly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CALL = "_compiled_call_impl"


def original(model: nn.Module) -> nn.Module:
    """Return the original of a compiled module, or any other module unchanged."""
    while type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
        inner = model._modules["_orig_mod"]
        assert inner is not None
        model = inner
    return model


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Replace compiled modules by their originals while the block runs, and restore them afterwards.

    Args:
        model: must not be a wrapper itself, see `original`.
    """
    with contextlib.ExitStack() as stack:
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if child is not None and original(child) is not child and original(module) is module:
                    stack.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = original(child)
            compiled = module.__dict__.get(_CALL)
            if compiled is not None:
                stack.callback(module.__dict__.__setitem__, _CALL, compiled)
                module.__dict__[_CALL] = None
        compiler: Any = torch.compiler
        stack.enter_context(compiler.set_stance("force_eager"))
        yield
