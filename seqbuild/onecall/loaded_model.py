"""A model that the caller has loaded: its config and code on disk, to compile, and its tensors in memory, to read.

Compilation starts from a config and a class, so a model that was changed after it was built from them would give a
wrong result without a message. Such changes are rejected: replaced modules, replaced forwards, adapters, quantization.
Changed values of weights are what is read. The model itself is never changed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.arguments import shown
from runtime.checkpoint.companions import copy_companions
from runtime.checkpoint.in_memory import MemoryCheckpoint
from runtime.console import quiet
from runtime.errors import ModelError, UsageError
from runtime.host.hub import cached_snapshot
from seqbuild.model.source import Source, loaded_name
from seqbuild.onecall.saved_tensors import saved_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The libraries whose modules are built from a config; torch's wrappers are not among them.
_LIBRARIES = ("torch", "transformers")
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "torch.ao")
_MERGE = "merge the adapter into the weights with merge_and_unload(), and pass the model that it returns"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        source: its description on disk, without weights.
        checkpoint: its tensors.
        attention: the implementation that it was loaded with; None for the default of transformers.
        origin: the directory that it was loaded from, or the cached snapshot of its hub id; None if it is not known.
    """

    source: Source
    checkpoint: MemoryCheckpoint
    attention: str | None
    origin: Path | None


@contextlib.contextmanager
def loaded_model(model: PreTrainedModel, preparers: Sequence[Any] = ()) -> Iterator[LoadedModel]:
    """Describe a model in memory in a temporary directory, which lasts as long as the block.

    Args:
        model: is not changed.
        preparers: its tokenizer or processor, saved beside the config; by default the files of the directory or hub id
            that the model was loaded from.

    Raises:
        ModelError: if the model is not what its config describes, or has no weights in this process.
    """
    require_as_built(model)
    origin = _origin_of(model)
    name = loaded_name(model.config, type(model).__name__)
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as parent:
        directory = Path(parent) / name
        directory.mkdir()
        tensors = saved_tensors(model)
        with quiet("transformers"):
            _write_config(model, directory)
            for preparer in preparers:
                preparer.save_pretrained(directory)
        if not preparers and origin is not None:
            copy_companions(origin, directory)
        config_file = directory / "config.json"
        source = Source(
            name=name,
            directory=directory,
            config_file=config_file,
            config=json.loads(config_file.read_text(encoding="utf-8")),
            tensors={key: held.stored.shape for key, held in tensors.items()},
        )
        checkpoint = MemoryCheckpoint(directory, tensors)
        yield LoadedModel(source=source, checkpoint=checkpoint, attention=_attention(model), origin=origin)


def _origin_of(model: PreTrainedModel) -> Path | None:
    """Return the directory that a model was loaded from, or the cached snapshot of its hub id; None without one."""
    given = str(model.config.name_or_path or "")
    if not given:
        return None
    return Path(given) if Path(given).is_dir() else cached_snapshot(given)


def require_model(value: Any) -> PreTrainedModel:
    """Return an argument that must be a model of transformers.

    Raises:
        UsageError: it is anything else, such as a wrapper of a model.
    """
    from transformers import PreTrainedModel

    if isinstance(value, PreTrainedModel):
        return value
    what, hint = f"model is {shown(value)}", "pass a hub id, a directory or a PreTrainedModel"
    kind = type(value).__module__
    if kind.partition(".")[0] == "peft":
        hint = _MERGE
    elif hasattr(value, "_orig_mod"):
        hint = "pass the model that was given to torch.compile: model._orig_mod"
    elif isinstance(value, nn.Module) and isinstance(getattr(value, "module", None), PreTrainedModel):
        hint = "pass the wrapped model: model.module"
    raise UsageError(what, hint=hint)


def require_as_built(model: PreTrainedModel) -> None:
    """Require that a model is what its class builds from its config.

    Raises:
        ModelError: naming the first difference.
    """
    kind = type(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError("the model has a PEFT adapter", hint="pass a model without one, or " + _MERGE)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ModelError("the model is quantized already", hint="load the original weights, without quantization")
    if not model.is_remote_code():
        import transformers

        if getattr(transformers, kind.__name__, None) is not kind:
            raise ModelError(
                f"{kind.__module__}.{kind.__name__} is not a class of transformers",
                hint="register its code with register_for_auto_class, for the class and its config, and set "
                "trust_remote_code_model=True",
            )
    for name, module in model.named_modules():
        _require_module(name, module, kind.__module__)


def _require_module(name: str, module: nn.Module, own: str) -> None:
    kind = type(module)
    is_known = kind.__module__.partition(".")[0] in _LIBRARIES and not kind.__module__.startswith(_WRAPPERS)
    package = own.rpartition(".")[0]
    is_own = kind.__module__ == own or (package != "" and kind.__module__.startswith(f"{package}."))
    where = f"{name} of the model" if name else "the model"
    if not is_known and not is_own:
        raise ModelError(
            f"{where} is {kind.__module__}.{kind.__name__}, which its config does not describe",
            hint="pass the model as transformers loads it, without replaced modules",
        )
    # accelerate keeps the class's own forward in its hooks.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise ModelError(f"{where} has a replaced forward, which would not be compiled", hint="remove the replacement")


def _attention(model: PreTrainedModel) -> str | None:
    """Return an attention implementation to compile with, unless it is the usual one."""
    used = str(getattr(model.config, "_attn_implementation", None))
    return used if used == "eager" else None


def _write_config(model: PreTrainedModel, directory: Path) -> None:
    """Write config.json, generation_config.json and the model's own code, as `save_pretrained` would."""
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    try:
        if model.is_remote_code():
            custom_object_save(model, directory, config=config)  # type: ignore[arg-type]  # or a config
        config.save_pretrained(directory)
    except Exception as error:  # transformers validates with many kinds of exceptions
        raise ModelError(f"the config of {type(model).__name__} cannot be saved: {error}") from error
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(directory / "generation_config.json")
