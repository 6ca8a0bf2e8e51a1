"""Save and restore process state that traced code may change: random generators, torch's settings, the environment."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Functions that read and write one setting of torch.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda found: torch.use_deterministic_algorithms(found[0], warn_only=found[1]),
    ),
    (
        lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        lambda found: _set_autocast(*found),
    ),
)
_FLAGS = (
    (torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
    (torch.backends.cuda.matmul, ("allow_tf32", "allow_fp16_reduced_precision_reduction")),
    (torch.backends.mkldnn, ("enabled",)),
)


@contextlib.contextmanager
def surroundings_as_found() -> Iterator[None]:
    """Restore the process state after the block."""
    with contextlib.ExitStack() as stack:
        for read, write in _SETTINGS:
            stack.callback(_put_back, read, write, read())
        for owner, names in _FLAGS:
            for name in names:
                read, write = functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)
                stack.callback(_put_back, read, write, read())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        stack.callback(_put_back, _default_device, torch.set_default_device, _default_device())
        stack.callback(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback(_put_back_environment, dict(os.environ))
        stack.callback(_put_back_filters, list(warnings.filters), warnings.showwarning)
        stack.callback(sys.path.__setitem__, slice(None), list(sys.path))
        yield


def _set_autocast(is_enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled("cpu", is_enabled)
    torch.set_autocast_dtype("cpu", dtype)


def _default_device() -> torch.device | None:
    """Return the default device that was set, or None."""
    mode = torch._GLOBAL_DEVICE_CONTEXT
    context = getattr(mode, "device_context", None)
    return None if context is None else torch.device(context.device)


def _put_back(read: Callable[[], Any], write: Callable[[Any], Any], found: Any) -> None:
    now = read()
    is_same = torch.equal(now, found) if isinstance(found, torch.Tensor) else now == found
    if not is_same:
        write(found)


def _put_back_environment(found: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in found]:
        del os.environ[name]
    for name, value in found.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _put_back_filters(found: list[Any], show: Any) -> None:
    if list(warnings.filters) != found:
        warnings.filters[:] = found  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
    warnings.showwarning = show
