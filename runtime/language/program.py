"""Compile a subgraph's source to a function, and define the `Run` object that the function receives.

Generated code is one function, `forward(self, <inputs>, *, run)`. `self` is the model and `run` the `Run` below; only
these differ between runs, so the same bytes serve every device and dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError, DataError
from runtime.language.guards import guarded, guards, insert_cached
from runtime.language.rewrite import rewrite

if TYPE_CHECKING:
    import torch
    from torch import nn

Program = Callable[..., dict[str, Any]]

_DEPTH_LIMIT, _ITEMS_LIMIT = 32, 100_000  # of nested containers in a dictionary that code fills


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The device, dtype, constants and functions that one run provides to generated code.

    Attributes:
        device: the device of new tensors.
        dtype: the floating point dtype of the model's weights in this run.
        constants: tensors stored in the artifact, by name.
        opaque: opaque steps, by path.
        cached: replaces a value that enters the key-value cache, given its index among the program's cached values.
            Called only by programs compiled with `hooks`.
        planned_for: the type of device of the run that a run on shapes predicts.
    """

    device: torch.device
    dtype: torch.dtype
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    opaque: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    cached: Callable[[int, Any], Any] | None = None
    planned_for: str | None = None

    @property
    def device_type(self) -> str:
        """The type of the device that computes, or in a run on shapes that of the planned run."""
        return self.planned_for or self.device.type

    @property
    def lowest(self) -> float:
        """The most negative finite number of `dtype`, used to fill masks."""
        import torch

        return torch.finfo(self.dtype).min

    @property
    def highest(self) -> float:
        """The largest finite number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).max

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).eps

    @property
    def tiny(self) -> float:
        """The smallest positive normal number of `dtype`."""
        import torch

        return torch.finfo(self.dtype).tiny

    def constant(self, name: str) -> torch.Tensor:
        """Return the constant `name` on the run's device."""
        return self.constants[name].to(self.device)

    @staticmethod
    def copied(value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Copy a dictionary that steps fill.

        Raises:
            ArtifactError: if its containers exceed the limits on depth and items, which no model's code does; hashing
                such a dictionary might not end.
        """
        found = dict(value)
        pending = [(item, 0) for item in found.values()]
        num_seen = 0
        while pending:
            item, depth = pending.pop()
            num_seen += 1
            if depth > _DEPTH_LIMIT or num_seen > _ITEMS_LIMIT:
                raise ArtifactError(
                    f"an artifact's code may nest containers {_DEPTH_LIMIT} deep with {_ITEMS_LIMIT} items; got more"
                )
            if isinstance(item, (tuple, list, dict)):
                inner = item.values() if isinstance(item, dict) else item
                pending += [(one, depth + 1) for one in inner]
        return found

    @staticmethod
    def require(value: Any, expected: bool) -> None:
        """Require a condition of the model's forward to have the value that it had when the model was traced.

        Raises:
            DataError: if it differs: the forward would raise an error or take a branch that was not compiled.
        """
        if bool(value) is not expected:
            raise DataError(
                "this batch violates an assumption made when the model was traced: a condition in the model's code has "
                f"the value {not expected} instead of {expected}",
                hint="check the batch against the model's inputs; compile with --sample for data of another kind",
            )


def compile_program(
    source: str,
    filename: str,
    hooks: Mapping[str, Sequence[tuple[int, str]]] | None = None,
    *,
    is_rewritten: bool = False,
) -> Program:
    """Compile source that `runtime.language.grammar` has checked, and return its `forward`.

    The namespace contains only `torch`, `slice`, the run-time checks of `runtime.language.guards`, and for a rewritten
    program the functions that its rewritten statements call.

    Args:
        source: the program.
        filename: for tracebacks.
        hooks: the statements after which values are passed to `Run.cached`; see `runtime.artifact.cached_values`.
        is_rewritten: compute the same with less work, see `runtime.language.regions` and `attention`. Not for values
            of a trace.
    """
    import torch

    namespace: dict[str, Any] = {"__builtins__": {}, "torch": torch, "slice": slice, **guards()}
    tree = guarded(source, filename)
    if is_rewritten:
        namespace |= rewrite(tree, _hooked(hooks or {}))
    insert_cached(tree, hooks or {})
    exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
    program: Program = namespace["forward"]
    return program


def _hooked(hooks: Mapping[str, Sequence[tuple[int, str]]]) -> list[str]:
    return [*hooks, *(name for places in hooks.values() for _, name in places)]


def run_conversion(program: Program, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute a parameter from checkpoint tensors."""
    run = Run(device=sources[0].device, dtype=sources[0].dtype)
    value: torch.Tensor = program(None, **{f"source_{place}": one for place, one in enumerate(sources)}, run=run)[
        "value"
    ]
    return value


def run_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating point parameters: the one it was built for, else the first parameter's, as in
    transformers.
    """
    import torch

    stated: torch.dtype | None = model.__dict__.get("run_dtype")
    return stated or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def run_device(inputs: Mapping[str, Any], model: nn.Module) -> torch.device:
    """The device of the first tensor, in the inputs or else the model, that is not on the meta device; else the CPU."""
    import torch

    for tensor in itertools.chain(_tensors(inputs), model.parameters()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
