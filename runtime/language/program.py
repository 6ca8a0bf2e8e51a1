"""Turn a subgraph's source into a function, and say what that function may rely on.

Generated code is one function, `forward(self, <inputs>, *, run)`. `self` is the model, `run` the `Run` below: the only
things that a run may choose, so that the same bytes serve every device and dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError, DataError
from runtime.language.guards import guarded, guards

if TYPE_CHECKING:
    import torch
    from torch import nn

Program = Callable[..., dict[str, Any]]

_DEPTH_LIMIT, _ITEMS_LIMIT = 32, 100_000  # of containers in a dictionary that code fills


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What generated code takes from the run that executes it.

    Attributes:
        device: where new tensors are made.
        dtype: the floating point dtype of the model's weights in this run.
        constants: tensors that the artifact brings, by name.
        opaque: functions that are called whole, by path.
        cached: takes values that enter the key-value cache, each by its place among the program's, and returns what the
            program goes on with. Only programs that were compiled for it call it.
    """

    device: torch.device
    dtype: torch.dtype
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    opaque: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    cached: Callable[[int, Any], Any] | None = None

    @property
    def lowest(self) -> float:
        """The most negative finite number of `dtype`: what masks are filled with."""
        import torch

        return torch.finfo(self.dtype).min

    @property
    def highest(self) -> float:
        """The largest finite number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).max

    @property
    def eps(self) -> float:
        """The distance from one to the next number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).eps

    @property
    def tiny(self) -> float:
        """The smallest positive normal number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).tiny

    def constant(self, name: str) -> torch.Tensor:
        """The constant `name`, on the run's device."""
        return self.constants[name].to(self.device)

    @staticmethod
    def copied(value: Mapping[Any, Any]) -> dict[Any, Any]:
        """A dictionary that steps fill, as it is now.

        Raises:
            ArtifactError: for one that holds more than any model's code puts together: hashing it would not end.
        """
        found = dict(value)
        pending = [(item, 0) for item in found.values()]
        num_seen = 0
        while pending:
            item, depth = pending.pop()
            num_seen += 1
            if depth > _DEPTH_LIMIT or num_seen > _ITEMS_LIMIT:
                raise ArtifactError("the artifact's code puts containers into each other without end")
            if isinstance(item, (tuple, list, dict)):
                inner = item.values() if isinstance(item, dict) else item
                pending += [(one, depth + 1) for one in inner]
        return found

    @staticmethod
    def require(value: Any, expected: bool) -> None:
        """Refuse data for which the model's forward would raise an error, or go another way than it was traced.

        Raises:
            DataError: when `value` is not what it was when the model was traced.
        """
        if bool(value) is not expected:
            raise DataError(
                "the model's code refuses this data, or treats it in a way that was not compiled: a condition that it "
                "states does not hold",
                hint="compare the batch with what the model takes; compile with --sample for data of another kind",
            )


def compile_program(
    source: str, filename: str, hooks: Mapping[str, Sequence[tuple[int, str]]] | None = None
) -> Program:
    """Compile checked source (see `runtime.language.grammar`) to its `forward`; nothing but `torch` is in its reach,
    and what it cannot be seen to do is watched (`runtime.language.guards`).

    Args:
        source: the program.
        filename: for tracebacks.
        hooks: behind which statements values are handed to `Run.cached`, see `runtime.artifact.cached_values`.
    """
    import torch

    namespace: dict[str, Any] = {"__builtins__": {}, "torch": torch, "slice": slice, **guards()}
    exec(compile(guarded(source, filename, hooks or {}), filename, "exec", dont_inherit=True), namespace)
    program: Program = namespace["forward"]
    return program


def run_conversion(program: Program, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute a parameter from checkpoint tensors."""
    run = Run(device=sources[0].device, dtype=sources[0].dtype)
    value: torch.Tensor = program(None, **{f"source_{place}": one for place, one in enumerate(sources)}, run=run)[
        "value"
    ]
    return value


def run_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model's floating point parameters have: what it was built for, else that of the first, as
    transformers defines it.
    """
    import torch

    stated: torch.dtype | None = model.__dict__.get("run_dtype")
    return stated or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def run_device(inputs: Mapping[str, Any], model: nn.Module) -> torch.device:
    """The device of the first tensor among the inputs, else of the model's first parameter that has a real one."""
    import torch

    for tensor in itertools.chain(_tensors(inputs), model.parameters()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
