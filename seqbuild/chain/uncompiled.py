"""Trace the module that `torch.compile` was given, not what it made of it.

A compiled module is entered by torch's own compiler, which would trace the trace. Four forms are met: the wrapper that
`torch.compile(model)` returns, the same in the place of a module inside, `module.compile()`, which replaces the call of
a module, and compiled functions. The first three are exchanged for what they were made from while the block runs; for
the last, torch is told to execute everything as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CALL = "_compiled_call_impl"


def original(model: nn.Module) -> nn.Module:
    """What a compiled module was made from; any other module itself."""
    while type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
        inner = model._modules["_orig_mod"]
        assert inner is not None
        model = inner
    return model


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While the block runs, nothing in the model is compiled; afterwards everything is as it was.

    Args:
        model: no wrapper itself, see `original`.
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
