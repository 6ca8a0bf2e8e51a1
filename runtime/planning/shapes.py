"""Run a subgraph on shapes, tensors without content, to find its outputs and its working memory.

The artifact's code runs on torch's meta device, so that sizes are those of the real run, whatever the model. Storages
are followed from creation to deletion; the largest sum is the working memory. Two things differ from the meta device:
fused attention allocates no scores, and experts get the rows that tokens route to them. Code that depends on values
cannot run on shapes, and has no `Footprint`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from runtime.errors import ArtifactError
from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.host.half_precision import NUMBERS_AT_A_TIME, quick_halves, slow_halves
from runtime.host.left_as_found import ProcessState, left_as_found
from runtime.host.plain_sizes import plain_sizes
from runtime.language.program import Run
from runtime.model.experts import Experts
from runtime.planning.operations import Operations
from runtime.planning.work import PassWork

if TYPE_CHECKING:
    from runtime.chain import Artifact, LoadedSubgraph

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The memory of one batch in one subgraph.

    Attributes:
        outputs: on the meta device, by name.
        working_bytes: peak besides weights and inputs; outputs count.
        seen: for each input tensor of measured modules, these modules.
        seen_rows: the rows of each of these tensors.
        routed: the work of its operators, each token in the experts that it is routed to; `unrouted` is the work
            besides if all experts are measured on all tokens, and `ahead` that before the last measured input.
        num_rounded: numbers of inputs that are rounded.
        routed_share: the part of the tokens that an expert gets.
    """

    outputs: Mapping[str, Any]
    working_bytes: int
    seen: tuple[tuple[str, ...], ...]
    seen_rows: tuple[int, ...]
    routed: PassWork
    unrouted: PassWork
    num_rounded: float
    routed_share: float
    ahead: PassWork

    def described(self, own: Callable[[str], str]) -> Hashable:
        """What it says about the work of a subgraph; `own` returns the part of a name that differs between modules."""
        seen = tuple(tuple(map(own, names)) for names in self.seen)
        counts = (self.routed, self.unrouted, self.ahead, self.num_rounded, self.routed_share)
        return seen, self.seen_rows, counts


class ShapeRun:
    """Runs an artifact's subgraphs on shapes.

    Args:
        artifact: the compiled model.
        model: its module tree on the meta device; while the block runs, computed buffers are there as well, and its
            experts do not depend on values.
        dtype: of the weights in the planned run.
        device_type: of the planned run.
    """

    def __init__(self, artifact: Artifact, model: nn.Module, dtype: torch.dtype, device_type: str) -> None:
        self.model = model
        self.device_type = device_type
        self._artifact = artifact
        self._run = replace(artifact.run(META, dtype), planned_for=device_type)
        self._known: dict[Any, Footprint | None] = {}
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._stack = contextlib.ExitStack()
        self._found: ProcessState | None = None
        self._operations = Operations()

    def __enter__(self) -> ShapeRun:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    self._buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.to(META)
            if isinstance(module, Experts):
                module.__dict__["forward"] = self._on_shapes(module)
        if not self._artifact.manifest.is_portable:  # it runs code of the model
            self._found = self._stack.enter_context(left_as_found(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.__dict__.pop("forward", None)

    def __call__(
        self,
        subgraph: LoadedSubgraph,
        inputs: Mapping[str, Any],
        measured: Collection[str] = (),
        rounded: Mapping[str, int] | None = None,
    ) -> Footprint | None:
        """Return the footprint of one batch, or None if the code depends on values.

        Args:
            subgraph: of the artifact.
            inputs: its inputs, on the meta device.
            measured: names of the Linear modules whose inputs are measured.
            rounded: by module name, the bytes per number that rounding its inputs takes.
        """
        entry = subgraph.entry
        scope = f"{entry.scope}." if entry.scope else ""
        own = tuple(name.removeprefix(scope) for name in measured if name.startswith(scope))
        sizes = {
            name.removeprefix(scope): size for name, size in (rounded or {}).items() if size and name.startswith(scope)
        }
        key = (own, tuple(sizes.items()), self._key(subgraph, inputs))
        if key not in self._known:
            self._operations = Operations()
            self._known[key] = self._measure(subgraph, inputs, _Seen(own, sizes, self._operations))
        found = self._known[key]
        if found is None:
            return None
        return replace(
            found,
            outputs=dict(zip(entry.output_names, found.outputs.values(), strict=True)),
            seen=tuple(tuple(f"{scope}{name}" for name in names) for names in found.seen),
        )

    def _key(self, subgraph: LoadedSubgraph, inputs: Mapping[str, Any]) -> Any:
        """A key that is equal for subgraphs with the same code and tensors of the same sizes."""
        entry = subgraph.entry
        parameters = self._artifact.manifest.parameters
        shapes = tuple(
            (name.removeprefix(entry.scope), parameters[name].shape, parameters[name].dtype)
            for name in entry.parameters
        )
        values = [inputs[name] for name in entry.input_names]
        leaves, structure = pytree.tree_flatten(values)
        described = tuple(
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves
        )
        return entry.file, shapes, described, str(structure)

    def _measure(self, subgraph: LoadedSubgraph, inputs: Mapping[str, Any], seen: _Seen) -> Footprint | None:
        scope = self.model.get_submodule(subgraph.entry.scope)
        given = [
            *pytree.tree_leaves(dict(inputs)),
            *scope.parameters(),
            *scope.buffers(),
            *self._run.constants.values(),
        ]
        memory = _Memory(given)
        with (
            self._found.run() if self._found is not None else contextlib.nullcontext(),
            torch.no_grad(),
            plain_sizes(),
            seen.watching(scope),
            _FusedAttention(self.device_type, self._operations),
            memory,
            self._operations,
            quick_halves(self.device_type),
        ):
            try:
                outputs = subgraph.execute(self.model, inputs, self._run)
            except RuntimeError:  # torch raises it for operations that depend on values
                return None
            except ArtifactError as error:  # a program wraps the same error
                if not isinstance(error.__cause__, RuntimeError):
                    raise
                return None
        return Footprint(
            outputs=outputs,
            working_bytes=memory.peak_bytes,
            seen=seen.groups,
            seen_rows=tuple(seen.rows),
            routed=self._operations.routed,
            unrouted=self._operations.unrouted,
            num_rounded=self._operations.num_rounded,
            routed_share=self._operations.routed_share,
            ahead=seen.ahead,
        )

    def _on_shapes(self, module: Experts) -> Callable[..., torch.Tensor]:
        """Return a forward of experts that does not depend on values: one expert with the rows of all tokens."""

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            hidden, index_TK, weight_TK = module.values(*args, **kwargs)
            hidden_TH = module.rows(hidden)
            own = [module.own(name, 0) for name in module.stacked]
            run = Run(device=META, dtype=own[0].dtype, planned_for=self.device_type)
            sum_TH = torch.zeros_like(hidden_TH, dtype=module._sum_dtype(hidden_TH, weight_TK))
            num_all = module.num_experts + module.num_identity
            mask_EKT = torch.empty(num_all + 1, *index_TK.t().shape, dtype=torch.int64, device=META)
            weights = weight_TK[:, :1] if module.is_column else weight_TK[:, 0]
            program: Any = module.program
            with self._operations.one_expert(module.num_experts, index_TK.shape[-1]):
                output_NH = program(module, hidden_TH.clone(), weights.clone(), *own, run=run)["output"]
            sum_TH.add_(output_NH.to(sum_TH.dtype))
            del mask_EKT
            return sum_TH.to(hidden_TH.dtype).view(hidden.shape)

        return forward


def storage_bytes(value: Any) -> int:
    """Bytes of the tensors in nested containers, each storage once."""
    storages = {}
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class _Memory(LeanDispatchMode):
    """Follows storages from creation to deletion.

    Args:
        given: existing tensors, which do not count.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._given = [tensor.untyped_storage() for tensor in given if isinstance(tensor, torch.Tensor)]
        self._storages: dict[int, Any] = {storage._cdata: storage for storage in self._given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def end(_: Any) -> None:
            self._live_bytes -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, end)
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)


class _Seen:
    """Finds modules with the same input tensor, and copies inputs in float32, as `runtime.quantize.statistics` does.

    Args:
        measured: names of the measured modules, in the scope.
        rounded: by module name, the bytes per number that rounding its inputs takes.
        operations: counted so far.

    Attributes:
        ahead: the work before the last measured input.
        rows: of the tensor of each group.
    """

    def __init__(self, measured: Collection[str], rounded: Mapping[str, int], operations: Operations) -> None:
        self.ahead = PassWork()
        self.rows: list[int] = []
        self._operations = operations
        self._measured = dict.fromkeys(measured)
        self._rounded = rounded
        self._groups: list[dict[str, None]] = []
        self._latest: list[tuple[torch.Tensor, int]] = []  # of each group, the tensor and its version

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(tuple, self._groups))

    @contextlib.contextmanager
    def watching(self, scope: nn.Module) -> Iterator[None]:
        handles = [
            scope.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in {**self._measured, **self._rounded}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._latest.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self._operations.paused():
                add(args[0] if args else next(iter(kwargs.values())))

        def add(inputs: torch.Tensor) -> None:
            if name in self._rounded:
                torch.empty(inputs.numel() * self._rounded[name], dtype=torch.uint8, device=META)
                self._operations.add_rounded(inputs.numel())
            if name not in self._measured:
                return
            self.ahead = self._operations.routed
            for names, (tensor, version) in zip(self._groups, self._latest, strict=True):
                if tensor is inputs and version == inputs._version:
                    names[name] = None
                    return
            self._groups.append({name: None})
            self._latest.append((inputs, inputs._version))
            self.rows.append(inputs.numel() // inputs.shape[-1])
            inputs.to(torch.float32)

        return see


class _FusedAttention(TorchFunctionMode):
    """Allocates what fused attention on the device does: no scores, but a mask in numbers and a sum for each query.

    The meta device would use the kernel that computes all scores. So does the CPU if values and keys differ in width.
    """

    def __init__(self, device_type: str, operations: Operations) -> None:
        super().__init__()
        self.device_type = device_type
        self._operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").partition(".")[0] != "scaled_dot_product_attention" or len(args) < 3:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if self.device_type == "cpu" and not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            return func(*args, **kwargs)
        count = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self._operations.add(attention=count, calls=1)
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        numbers = None
        if mask is not None and mask.dtype == torch.bool:
            numbers = torch.empty(mask.shape, dtype=query.dtype, device=META)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=META)
        result = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=META)
        if self.device_type == "cpu" and query.dtype in slow_halves():
            copied = [tensor[:1].float() for tensor in (query, key, value, result)]
            if mask is not None:  # of some queries at a time
                size = min(mask.numel() // (len(mask) if mask.dim() == 4 else 1), NUMBERS_AT_A_TIME)
                copied.append(torch.empty(size, dtype=torch.float32, device=META))
            del copied
        del numbers, sums
        return result
