"""Record `torch.vmap`: functorch's layers and a mode that records before dispatch do not go together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._functorch import apis
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
)


@contextlib.contextmanager
def vmap_recorded(tracer: PythonKeyTracer) -> Iterator[None]:
    """While the block runs, what happens inside `torch.vmap` is recorded after dispatch: functorch has then turned the
    batched operations into plain ones.
    """
    functions: Any = apis
    plain = functions.vmap_impl

    def recorded(*args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if not getattr(mode, "pre_dispatch", False):
            return plain(*args, **kwargs)
        with disable_proxy_modes_tracing(), ProxyTorchDispatchMode(tracer, "symbolic", pre_dispatch=False):
            return plain(*args, **kwargs)

    functions.vmap_impl = recorded
    try:
        yield
    finally:
        functions.vmap_impl = plain
