"""Run a subgraph on tensors that have a shape and no content: what it returns, and what memory it needs meanwhile.

The artifact's own code runs on torch's meta device, so that sizes are those of the real run, whatever the model. The
storages that it makes are followed from their making to their end; the largest sum is the working memory. What the
meta device does not know is told here: a fused attention keeps no table of scores, and experts are called as often as
tokens choose them. What depends on values cannot run without them: then there is no `Footprint`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import ArtifactError
from runtime.host.half_precision import NUMBERS_AT_A_TIME, quick_halves, slow_halves
from runtime.host.left_as_found import ProcessState, left_as_found
from runtime.language.program import Run
from runtime.model.experts import Experts

if TYPE_CHECKING:
    from runtime.chain import Artifact, LoadedSubgraph

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What one batch needs in one subgraph.

    Attributes:
        outputs: what it returns, on the meta device, by name.
        working_bytes: the most that it holds at a time beside its weights and inputs, outputs among it.
        seen: for each tensor that measured modules are handed, those modules and the number of its rows.
    """

    outputs: Mapping[str, Any]
    working_bytes: int
    seen: tuple[tuple[tuple[str, ...], int], ...]


class ShapeRun:
    """Runs an artifact's subgraphs on shapes.

    Args:
        artifact: the compiled model.
        model: its module tree on the meta device; while the block runs its computed buffers are there, too, and its
            experts need no values.
        dtype: of the weights in the run that is planned.
        device_type: where that takes place.
    """

    def __init__(self, artifact: Artifact, model: nn.Module, dtype: torch.dtype, device_type: str) -> None:
        self.model = model
        self.device_type = device_type
        self._artifact = artifact
        self._run = artifact.run(META, dtype)
        self._known: dict[Any, Footprint | None] = {}
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._stack = contextlib.ExitStack()
        self._found: ProcessState | None = None

    def __enter__(self) -> ShapeRun:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    self._buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.to(META)
            if isinstance(module, Experts):
                module.__dict__["forward"] = _experts_on_shapes(module)
        if not self._artifact.manifest.is_portable:  # or nothing of the model's code is run
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
        """The footprint of one batch, or None where the code needs values.

        Args:
            subgraph: one of the artifact's.
            inputs: its inputs, on the meta device.
            measured: names of the Linear modules whose inputs are summed up on the way.
            rounded: bytes that rounding their inputs takes, for each number, by the names of modules.
        """
        entry = subgraph.entry
        scope = f"{entry.scope}." if entry.scope else ""
        own = tuple(name.removeprefix(scope) for name in measured if name.startswith(scope))
        sizes = {
            name.removeprefix(scope): size for name, size in (rounded or {}).items() if size and name.startswith(scope)
        }
        key = (own, tuple(sizes.items()), self._key(subgraph, inputs))
        if key not in self._known:
            self._known[key] = self._measure(subgraph, inputs, _Seen(own, sizes))
        found = self._known[key]
        if found is None:
            return None
        return Footprint(
            outputs=dict(zip(entry.output_names, found.outputs.values(), strict=True)),
            working_bytes=found.working_bytes,
            seen=tuple((tuple(f"{scope}{name}" for name in names), rows) for names, rows in found.seen),
        )

    def _key(self, subgraph: LoadedSubgraph, inputs: Mapping[str, Any]) -> Any:
        """Equal for subgraphs that do the same to tensors of the same sizes."""
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
            seen.watching(scope),
            _FusedAttention(self.device_type),
            memory,
            quick_halves(self.device_type),
        ):
            try:
                outputs = subgraph.execute(self.model, inputs, self._run)
            except RuntimeError:  # torch's answer to whatever asks for values, or for sizes that only values tell
                return None
            except ArtifactError as error:  # which says so of a program; anything else is to be known
                if not isinstance(error.__cause__, RuntimeError):
                    raise
                return None
        return Footprint(outputs=outputs, working_bytes=memory.peak_bytes, seen=seen.groups)


def storage_bytes(value: Any) -> int:
    """Bytes that the tensors in a nest of containers hold, each storage once."""
    storages = {}
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows storages from their making to their end.

    Args:
        given: tensors that are there already, and do not count.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._given = [tensor.untyped_storage() for tensor in given if isinstance(tensor, torch.Tensor)]
        self._storages: dict[int, Any] = {storage._cdata: storage for storage in self._given}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not ask torch's compiler to keep away: it would be imported, a hundred megabytes and two seconds."""
        return False

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
    """Which Linear modules are handed one and the same tensor; what is summed up is held, and copied in float32, as
    `runtime.quantize.statistics` does it.

    Args:
        measured: names of the modules that count, in the scope.
        rounded: bytes that rounding inputs takes for each of their numbers, by name.
    """

    def __init__(self, measured: Collection[str], rounded: Mapping[str, int]) -> None:
        self._measured = dict.fromkeys(measured)
        self._rounded = rounded
        self._groups: list[tuple[dict[str, None], int]] = []
        self._latest: list[tuple[torch.Tensor, int]] = []  # of each group: its tensor and version

    @property
    def groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        return tuple((tuple(names), rows) for names, rows in self._groups)

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
            inputs = args[0] if args else next(iter(kwargs.values()))
            torch.empty(inputs.numel() * self._rounded.get(name, 0), dtype=torch.uint8, device=META)
            if name not in self._measured:
                return
            for (names, _), (tensor, version) in zip(self._groups, self._latest, strict=True):
                if tensor is inputs and version == inputs._version:
                    names[name] = None
                    return
            self._groups.append(({name: None}, inputs.numel() // max(inputs.shape[-1], 1)))
            self._latest.append((inputs, inputs._version))
            inputs.to(torch.float32)

        return see


class _FusedAttention(TorchFunctionMode):
    """Attention as the device does it: no table of scores, but a mask in numbers and a sum for each query.

    The meta device would take the kernel that writes the table out. The CPU takes that one, too, where values are of
    another width than keys.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").partition(".")[0] != "scaled_dot_product_attention" or len(args) < 3:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if self.device_type == "cpu" and not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            return func(*args, **kwargs)
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


def _experts_on_shapes(module: Experts) -> Callable[..., torch.Tensor]:
    """Experts that need no values: one of them, with as many rows as all tokens come to, which is the most."""

    def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        hidden, index_TK, weight_TK = module.values(*args, **kwargs)
        hidden_TH = module.rows(hidden)
        own = [module.own(name, 0) for name in module.stacked]
        run = Run(device=META, dtype=own[0].dtype)
        sum_TH = torch.zeros_like(hidden_TH, dtype=module._sum_dtype(hidden_TH, weight_TK))
        num_all = module.num_experts + module.num_identity
        mask_EKT = torch.empty(num_all + 1, *index_TK.t().shape, dtype=torch.int64, device=META)
        weights = weight_TK[:, :1] if module.is_column else weight_TK[:, 0]
        program: Any = module.program
        output_NH = program(module, hidden_TH.clone(), weights.clone(), *own, run=run)["output"]
        sum_TH.add_(output_NH.to(sum_TH.dtype))
        del mask_EKT
        return sum_TH.to(hidden_TH.dtype).view(hidden.shape)

    return forward
