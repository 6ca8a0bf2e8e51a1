"""Run-time checks of the arguments of opaque steps, which the grammar cannot see in the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import ArtifactError
from runtime.language.literals import FORBIDDEN_KEYWORDS
from runtime.language.opaque import WORDS, why_refused_for
from runtime.language.reviewed import is_computing

_DEPTH_LIMIT = 32


class GuardedStep:
    """A function of transformers that accepts only data, and as a module only the one that it is a method of.

    The static check follows the class that the path names. The module passed may be of a derived class with methods of
    its own, and may hold other modules; so the step is checked again for each new combination of their classes.

    Args:
        path: of the step, `module:function` or `module:Class.method`.
        function: the function that the path names.
    """

    def __init__(self, path: str, function: Callable[..., Any]) -> None:
        self._path = path
        self._function = function
        self._accepted: set[tuple[type, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            ArtifactError: if an argument is not data, or the module is of the wrong class.
        """
        from torch import nn

        rest: Sequence[Any] = args
        if args and isinstance(args[0], nn.Module):
            self._accept(args[0])
            rest = args[1:]
        for value in (*rest, *kwargs.values()):
            self._require_data(value, 0)
        return self._function(*args, **kwargs)

    def _accept(self, module: Any) -> None:
        """Require a module of the class that the path names, with which the step does nothing but calculate."""
        owner = self._path.partition(":")[2].rpartition(".")[0]
        home = self._path.partition(":")[0]
        names = [(cls.__module__, cls.__qualname__) for cls in type(module).__mro__]
        if owner and (home, owner) not in names:
            raise ArtifactError(
                f"opaque step {self._path!r} is called with a {type(module).__name__}, which is not a {owner}"
            )
        kinds = tuple(dict.fromkeys(cls for inner in module.modules() for cls in type(inner).__mro__))
        if kinds in self._accepted:
            return
        problem = why_refused_for(self._path, kinds)
        if problem:
            raise ArtifactError(f"opaque step {self._path!r} is not allowed with a {type(module).__name__}: {problem}")
        self._accepted.add(kinds)

    def _require_data(self, value: Any, depth: int) -> None:
        import torch

        data = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device, torch.layout)
        if value is None or isinstance(value, (bool, int, float, slice, range, *data)):
            return
        if depth > _DEPTH_LIMIT:
            raise ArtifactError(
                f"an argument of opaque step {self._path!r} nests containers more than {_DEPTH_LIMIT} deep"
            )
        if isinstance(value, str):
            if value not in WORDS:
                raise ArtifactError(f"opaque step {self._path!r} does not accept the string {value[:40]!r}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key in FORBIDDEN_KEYWORDS or not isinstance(key, (str, int)):
                    raise ArtifactError(f"opaque step {self._path!r} does not accept the key {str(key)[:40]!r}")
                self._require_data(item, depth + 1)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._require_data(item, depth + 1)
        elif not _is_library_data(value):
            raise ArtifactError(
                f"opaque step {self._path!r} accepts only data; got an object of type {type(value).__name__}"
            )


def _is_library_data(value: Any) -> bool:
    """Whether a value is a config, a cache or another data object of transformers: no module, class or function."""
    from torch import nn
    from transformers import PreTrainedConfig

    if isinstance(value, (type, nn.Module)) or callable(value):
        return False
    return isinstance(value, PreTrainedConfig) or is_computing(type(value).__module__)
