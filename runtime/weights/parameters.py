"""Map a checkpoint's tensors to an artifact's parameters, and load them into a module tree.

The artifact's parameter table states which tensors a parameter is made from. All names and shapes are compared before
anything is loaded. A checkpoint may have tensors that the model does not use: heads that predict several tokens, value
heads, a head beside a base model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.checkpoint.names import spellings
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.source_checks import is_quantization_name, numbered_list
from runtime.checkpoint.source_formats import stated
from runtime.checkpoint.stored_table import StoredTable
from runtime.errors import WeightsError
from runtime.formats.transforms import NO_TRANSFORMS, ModelTransforms
from runtime.language.program import run_conversion
from runtime.model.config import require_same_model
from runtime.patterns import is_in
from runtime.recipe.recipe import some
from runtime.weights.origins import Origin
from runtime.weights.stored_caches import attach_stored_caches
from runtime.weights.tensor_checks import TensorChecks, read_scale

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from runtime.artifact.manifest import ParameterEntry
    from runtime.chain import Artifact
    from runtime.checkpoint.stored import Stored


_COPY_AGAIN = "copy or export the checkpoint again"
_OTHER_MODEL = "use the checkpoint of the model that was compiled"


class Weights:
    """The weights of an artifact's model in a checkpoint.

    Args:
        artifact: states the parameters.
        checkpoint: plain, or compressed by compressed-tensors.
        dtype: of the floating point parameters that follow the run's dtype.
        model: the artifact's module tree, for the classes of compressed modules.

    Attributes:
        checks: checks of the tensors' values.
        transforms: the rotations that are computed while the model runs: the checkpoint's, or a recipe's.

    Raises:
        WeightsError: naming the first tensor that does not fit.
    """

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint, dtype: torch.dtype, model: nn.Module) -> None:
        self.artifact = artifact
        self.checkpoint = checkpoint = artifact.seen(checkpoint)
        self.dtype = dtype
        require_same_model(artifact, checkpoint.directory)
        self.cache_scheme: QuantizationArgs | None = None
        self.has_queries = False
        self.schemes: dict[str, QuantizationScheme] = self._compressed_modules(model)
        self.transforms, others = self._stored_transforms(model)
        self.origins = {name: self._origin(name) for name in artifact.manifest.parameters}
        scales = attach_stored_caches(
            model, self, checkpoint, artifact.manifest, self.cache_scheme, has_queries=self.has_queries
        )
        self.unused = self._unused([*others, *scales])
        for name in self.origins:
            self._require_shape(name)
        self.remarks = tuple(self._remarks())
        targets = artifact.manifest.targets
        self.checks = TensorChecks(checkpoint, self.origins, artifact.manifest.parameters, model, targets)
        self._tables = frozenset(artifact.manifest.lookups)

    def look_through(self, view: Checkpoint) -> None:
        """Read from a view of the checkpoint, which has the same tensors and may add some."""
        self._plain_checkpoint = self.checkpoint
        self.checkpoint = self.checks.checkpoint = view

    def untransformed(self) -> Weights:
        """Return the weights as they were before `look_through`."""
        plain = copy.copy(self)
        plain.checkpoint = self._plain_checkpoint
        return plain

    def load(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Load parameters into the module tree, on `device` and in the run's dtype."""
        for name in names:
            assign(model, name, self.read(name, device))
            self.load_input_parts(model, name)

    def load_input_parts(self, model: nn.Module, name: str) -> None:
        """Load the scales of a compressed module's static inputs, if it has any."""
        scheme = self.origins[name].packed
        if scheme is None:
            return
        from runtime.formats.compressed import input_parts
        from runtime.formats.rounded_inputs import set_input_parts

        parts = input_parts(scheme)
        if parts:
            prefix = _module_key(self.origins[name].keys[0])
            read = {part: read_scale(self.checkpoint, f"{prefix}.{part}") for part in parts}
            set_input_parts(model.get_submodule(name.removesuffix(".weight")), read)

    def read(
        self, name: str, device: torch.device, read_key: Callable[[str], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Read a parameter, [shape in the manifest].

        Args:
            name: of the parameter.
            device: of the result.
            read_key: reads a tensor of the checkpoint; by default the checkpoint itself.
        """
        read = read_key or self.checkpoint.read
        value = self._make(name, [read(key) for key in self.origins[name].keys])
        return value.to(self._used_dtype(name, value)).to(device)

    def table(self, name: str) -> StoredTable | None:
        """Return a lookup table that stays on disk; None for another parameter, and for one that the checkpoint stores
        in another form or dtype.
        """
        key = self.plain_key(name) if name in self._tables else None
        value = self.checkpoint.table(key) if key is not None else None
        return value if value is not None and value.dtype == self._used_dtype(name, value) else None

    def _used_dtype(self, name: str, stored: torch.Tensor) -> torch.dtype:
        """Return the dtype of a parameter in the run."""
        entry = self.artifact.manifest.parameters[name]
        if not stored.is_floating_point():
            return stored.dtype
        dtype: torch.dtype = self.dtype if entry.dtype == "model" else getattr(torch, entry.dtype)
        return dtype

    def is_table(self, name: str) -> bool:
        """Whether a parameter can stay on disk, see `table`."""
        return self.table(name) is not None

    def stored_names(self) -> Iterable[str]:
        """The names of all tensors of the checkpoint."""
        return self.checkpoint

    def stored(self, key: str) -> Stored:
        """Name, dtype and shape of a tensor of the checkpoint."""
        return self.checkpoint.stored(key)

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is read from."""
        return self.checkpoint.source_bytes(key)

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are computed whenever it is read."""
        return self.checkpoint.computed(key)

    def plain_key(self, name: str) -> str | None:
        """Return the checkpoint tensor that equals the parameter, or None if the parameter must be computed."""
        origin = self.origins[name]
        return origin.keys[0] if len(origin.keys) == 1 and origin.conversion < 0 and origin.packed is None else None

    def _make(self, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        origin = self.origins[name]
        if origin.packed is not None:
            from runtime.formats.compressed import decompress_module

            prefix = _module_key(origin.keys[0])
            parts = {key.removeprefix(f"{prefix}."): value for key, value in zip(origin.keys, tensors, strict=True)}
            return decompress_module(parts, origin.packed)
        if origin.conversion < 0:
            return tensors[0] if tensors else self.artifact.constants[self.artifact.manifest.defaults[name]].clone()
        return run_conversion(self.artifact.conversions[origin.conversion], tensors)

    def _compressed_modules(self, model: nn.Module) -> dict[str, QuantizationScheme]:
        config = stated(self.checkpoint.config)
        if not config:
            return {}
        from runtime.formats.checkpoint_config import CheckpointSchemes

        schemes = CheckpointSchemes.from_config(config)
        self.cache_scheme, self.has_queries = schemes.cache, schemes.has_queries
        found = {}
        for name, module in model.named_modules():
            entry = self.artifact.manifest.parameters.get(f"{name}.weight")
            scheme = schemes.find(name, type(module)) if entry is not None else None
            if entry is None or scheme is None:
                continue
            # `ignore` may have the checkpoint's name, where the compiler has named an expert's modules.
            spelled = _module_key(entry.sources[0]) if len(entry.sources) == 1 else name
            if schemes.find(spelled, type(module)) is None:
                continue
            # A regular expression can match modules of any class. Readers treat only Linear as quantized, unless the
            # checkpoint has a scale for another.
            prefixes = self._module_spellings(f"{name}.weight", entry)
            if isinstance(module, nn.Linear) or any(f"{p}.weight_scale" in self.checkpoint for p in prefixes):
                found[name] = scheme
        return found

    def _stored_transforms(self, model: nn.Module) -> tuple[ModelTransforms, list[str]]:
        """Let the model compute the transforms that the config states; return them and the names of their tensors."""
        entry = stated(self.checkpoint.config)
        if entry.get("transform_config") in NO_TRANSFORMS:
            return ModelTransforms(), []
        from runtime.weights.stored_transforms import stored_transforms

        return stored_transforms(self.checkpoint, entry, model, self.artifact.manifest)

    def _origin(self, name: str) -> Origin:
        entry = self.artifact.manifest.parameters[name]
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.schemes:
            return self._packed_origin(name, entry, self.schemes[module])
        own = self._present((name,))  # a tied parameter may be stored under its own name
        keys = self._present(entry.sources) or (own if entry.tied_to or entry.conversion < 0 else None)
        keys = keys or self._saved_as_another(name)
        if keys is None and name in self.artifact.manifest.defaults:
            return Origin(keys=(), conversion=-1)
        if keys is None:
            missing = next(key for key in entry.sources if self._present((key,)) is None)
            raise WeightsError(
                f"missing tensor {missing!r} in {self.checkpoint.directory}, required by parameter {name}",
                hint=_OTHER_MODEL,
            )
        if own is not None and entry.tied_to:
            return Origin(keys=own, conversion=-1)
        return Origin(keys=keys, conversion=entry.conversion)

    def _saved_as_another(self, name: str) -> tuple[str, ...] | None:
        """Return the tensor stored under the name of a parameter that is tied to this one."""
        parameters = self.artifact.manifest.parameters
        owner = parameters[name].tied_to or name
        tied = (other for other, entry in parameters.items() if other == owner or entry.tied_to == owner)
        return next((keys for other in tied if (keys := self._present((other,))) is not None), None)

    def _packed_origin(self, name: str, entry: ParameterEntry, scheme: QuantizationScheme) -> Origin:
        from runtime.formats.compressed import stored_shapes

        marks = ("weight_scale", "weight_packed")
        prefixes = self._module_spellings(name, entry)
        prefix = next((p for p in prefixes if any(f"{p}.{mark}" in self.checkpoint for mark in marks)), None)
        if prefix is None:
            raise WeightsError(
                f"missing compressed tensors of {name} in {self.checkpoint.directory}; its config.json states that "
                "the module is quantized",
                hint=_COPY_AGAIN,
            )
        keys = []
        for suffix, expected in stored_shapes(entry.shape, scheme).items():
            key = f"{prefix}.{suffix}"
            if key not in self.checkpoint:
                raise WeightsError(
                    f"missing tensor {key!r} in {self.checkpoint.directory}, required by quantized module "
                    f"{_module_key(name)}",
                    hint=_COPY_AGAIN,
                )
            found: tuple[int, ...] = self.checkpoint.shape(key)
            if suffix == "weight_shape" and found == expected:
                found, expected = tuple(self.checkpoint.read(key).tolist()), entry.shape
            if found != expected:
                raise WeightsError(self._misfit(key, found, expected, name), hint=_OTHER_MODEL)
            keys.append(key)
        return Origin(keys=tuple(keys), conversion=-1, packed=scheme)

    def _module_spellings(self, name: str, entry: ParameterEntry) -> Iterator[str]:
        """Yield the names that the module of a weight may have in this checkpoint."""
        return (_module_key(key) for source in (*entry.sources, name) for key in self._spellings(source))

    def _present(self, keys: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the keys in this checkpoint's spelling, or None unless it has all of them."""
        found = []
        for key in keys:
            spelling = next((option for option in self._spellings(key) if option in self.checkpoint), None)
            if spelling is None:
                return None
            found.append(spelling)
        return tuple(found)

    def _spellings(self, key: str) -> tuple[str, ...]:
        return spellings(key, self.artifact.manifest.model.base_model_prefix)

    def _unused(self, others: Iterable[str]) -> tuple[str, ...]:
        """Return the tensors that no parameter is made from.

        Raises:
            WeightsError: for one that shows that the artifact misinterprets another tensor.
        """
        used = {key for origin in self.origins.values() for key in origin.keys} | set(others)
        unused = tuple(key for key in self.checkpoint if key not in used)
        modules = {_module_key(key) for key in used}
        packed = {_module_key(origin.keys[0]) for origin in self.origins.values() if origin.packed is not None}
        members = self._members()
        for key in unused:
            module, own = _module_key(key), key.rpartition(".")[2]
            if (module in packed and own != "bias") or (module in modules and is_quantization_name(key)):
                raise WeightsError(
                    f"unexpected tensor {key!r} in {self.checkpoint.directory}: the quantization of {module} that its "
                    "config.json states has no such tensor",
                    hint="use the config.json of this checkpoint",
                )
            for name, numbers in members.items():
                if key.startswith(f"{name}.") and key.removeprefix(f"{name}.").partition(".")[0] not in numbers:
                    raise WeightsError(
                        f"unexpected tensor {key!r} in {self.checkpoint.directory}: the artifact expects only "
                        f"{len(numbers)} members of {name}",
                        hint=_OTHER_MODEL,
                    )
        return unused

    def _members(self) -> dict[str, set[str]]:
        """Return the members' numbers of each list whose members form one parameter, by the list's name."""
        found: dict[str, set[str]] = {}
        for entry in self.artifact.compiled_parameters.values():
            prefix = numbered_list(entry.sources)
            for spelling in self._spellings(prefix) if prefix else ():
                numbers = (key.removeprefix(f"{prefix}.").partition(".")[0] for key in entry.sources)
                found.setdefault(spelling, set()).update(numbers)
        return found

    def _remarks(self) -> Iterator[str]:
        ignored = self.artifact.manifest.model.ignored_keys
        found = [key for key in self.unused if not any(is_in(pattern, key) for pattern in ignored)]
        if found:
            yield (
                f"warning: the model does not use {len(found)} tensors of the checkpoint, which are copied "
                f"and not quantized: {some(found)}"
            )
        hidden = self.checkpoint.hidden
        if hidden:
            yield (
                f"warning: {len(hidden)} scales of inputs or key-value caches, or transforms, in the checkpoint are "
                f"not used: {some(hidden)}"
            )

    def _require_shape(self, name: str) -> None:
        origin, expected = self.origins[name], self.artifact.manifest.parameters[name].shape
        if origin.packed is not None:
            return  # compared in `_packed_origin`
        shapes = [self.checkpoint.shape(key) for key in origin.keys]
        try:
            made = self._make(name, [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes])
            found: Any = tuple(made.shape)
        except (RuntimeError, IndexError):
            found = shapes
        if found != expected:
            raise WeightsError(self._misfit((*origin.keys, name)[0], found, expected, name), hint=_OTHER_MODEL)

    def _misfit(self, key: str, found: Iterable[Any], expected: Iterable[int], name: str) -> str:
        return (
            f"tensor {key!r} of {self.checkpoint.directory} has shape {list(found)}, the artifact expects "
            f"{list(expected)} for parameter {name}"
        )


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set the parameter or buffer of this dotted name.

    A parameter requires gradients as in a freshly loaded model, although none are computed: torch chooses its kernels
    by that, and so the last bits of results.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        made: Any = tensor.as_parameter() if isinstance(tensor, StoredTable) else None
        module._parameters[leaf] = made if made is not None else nn.Parameter(tensor, tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that are computed, not loaded (rotary tables, for instance), to the run's device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def unload(model: nn.Module, names: Iterable[str]) -> None:
    """Free the memory of parameters by moving them to the meta device."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        current = module._parameters.get(leaf)
        tensor = current if current is not None else module._buffers[leaf]
        assert tensor is not None, f"{name} is listed as a parameter and is None"
        assign(model, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _module_key(key: str) -> str:
    return key.rpartition(".")[0]
