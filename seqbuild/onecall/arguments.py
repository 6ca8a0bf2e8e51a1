"""The arguments of `oneshot`, checked before anything is loaded. Their names are those of llm-compressor."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.arguments import as_path, require_count, shown
from runtime.errors import UsageError

# Arguments of llm-compressor that decide how fast it runs, what it prints, or how it traces: any value is accepted, and
# changes nothing.
WITHOUT_EFFECT = (
    "clear_sparse_session",
    "dataloader_num_workers",
    "overwrite_cache",
    "preprocessing_num_workers",
    "quantization_aware_calibration",
    "remove_columns",
    "sequential_prefetch",
    "streaming",
    "tracing_ignore",
)
_PADDING = "samples of equal length form a batch, so nothing is padded; leave it out"
# Arguments that are accepted only with these values, and why.
_LIMITED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "config_name": ((None,), "the config is that of the model; change it in the model's directory or in memory"),
    "distill_teacher": ((None,), "nothing is trained"),
    "dvc_data_repository": ((None, ""), "download the data, and pass its path as dataset"),
    "min_tokens_per_module": ((None,), "set min_tokens in a modifier, which counts the tokens of each module"),
    "pad_to_max_length": ((False,), _PADDING),
    "pipeline": (
        (None, "independent", "sequential", "datafree"),
        "subgraphs are always calibrated one after the other; propagate_error=False calibrates all of them with the "
        "original weights, as the basic pipeline does",
    ),
    "raw_kwargs": ((None, {}), "load the data set with the datasets library, and pass it as dataset"),
    "recipe_args": ((None, [], {}), "write the values into the recipe"),
    "save_compressed": ((True,), "checkpoints are always compressed"),
    "sequential_offload_device": (
        ("cpu",),
        "values between subgraphs are kept in memory or on disk, by activation_memory",
    ),
    "stage": ((None,), "all modifiers of a recipe are applied; pass a recipe with those that you want"),
    "tie_word_embeddings": ((True, None), "embeddings stay tied as in the model; untie them in the model"),
}
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_COLLATORS = ("truncation", "padding")


@dataclass(frozen=True, kw_only=True, slots=True)
class OneshotOptions:
    """The arguments of `oneshot`.

    Attributes:
        model: hub id in the local cache, directory, or `PreTrainedModel` in memory.
        recipe: YAML text, path, name of a preset, `Recipe`, modifier or list of modifiers.
        dataset: data set in memory, path, or id of a data set; None for the built-in text, if the recipe needs data.
        output_dir: of the checkpoint; None only with `load`.
        load: return the quantized model of transformers instead of the result of the calibration.
        tokenizer: for texts and records; by default the model's. A hub id, a directory or an object.
        processor: as `tokenizer`.
        dataset_config_name: the configuration of a data set that `dataset` names.
        splits: the split of a data set, such as `train` or `train[:512]`.
        text_column: the field of a record that has the text or the messages; `text` finds it.
        preprocessing_func: called with each row; returns the row to use.
        data_collator: called with a list of `batch_size` rows; returns a batch. A name is accepted and has no effect.
        concatenate_data: join texts, and cut samples of `max_seq_length` tokens.
        num_calibration_samples: the largest number of samples; a DataLoader is used whole.
        shuffle_calibration_samples: choose rows at random instead of the first ones.
        seed: of that choice.
        max_seq_length: the largest number of tokens of a sample; None for the model's limit, at most 2,048. Tokenized
            rows are cut only if it is given.
        batch_size: the largest number of samples of a batch; they have equal lengths.
        use_loss_mask: measure only the tokens of the assistant in conversations.
        model_revision: branch, tag or commit of a hub id.
        trust_remote_code_model: allow executing the model's own code.
        sequential_targets: the modules to cut at; by default those of the recipe, or the model's layers.
        sequential_targets_per_subgraph: the number of these in each subgraph.
        ignore: modules that a preset does not apply to, besides those that are never quantized.
        moe_calibrate_all_experts, propagate_error: as in `RunOptions`.
        precision: dtype of weights and activations in the run; `auto` for the model's own.
        device: where subgraphs run; `auto` for a GPU if there is one.
        log_dir: a directory for the event log.
        artifacts: the directory of compiled models; None for that of the user's cache.
        progress: called with each line of progress.
        is_data_free: reject a recipe that needs data instead of using the built-in text.
        run: further arguments of `calibrate`.
    """

    model: Any
    recipe: Any
    dataset: Any = None
    output_dir: Path | None = None
    load: bool = False
    tokenizer: Any = None
    processor: Any = None
    dataset_config_name: str | None = None
    splits: str | None = None
    text_column: str = "text"
    preprocessing_func: Callable[[Any], Any] | None = None
    data_collator: str | Callable[[Any], Any] = "truncation"
    concatenate_data: bool = False
    num_calibration_samples: int = 512
    shuffle_calibration_samples: bool = True
    seed: int = 0
    max_seq_length: int | None = None
    batch_size: int = 1
    use_loss_mask: bool = False
    model_revision: str | None = "main"
    trust_remote_code_model: bool = False
    sequential_targets: tuple[str, ...] = ()
    sequential_targets_per_subgraph: int = 1
    ignore: tuple[str, ...] = ()
    moe_calibrate_all_experts: bool = True
    propagate_error: bool = True
    precision: Any = "auto"
    device: Any = "auto"
    log_dir: Path | None = None
    artifacts: Path | None = None
    progress: Callable[[str], None] | None = None
    is_data_free: bool = False
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values that do not depend on others.

        Raises:
            UsageError: naming the argument.
        """
        for name in ("num_calibration_samples", "batch_size", "sequential_targets_per_subgraph"):
            require_count(name, getattr(self, name))
        if self.max_seq_length is not None:
            require_count("max_seq_length", self.max_seq_length)
        for entry in fields(self):
            if entry.type == "bool" and not isinstance(getattr(self, entry.name), bool):
                raise UsageError(f"{entry.name} is {shown(getattr(self, entry.name))}", hint="it must be True or False")
        for name in ("output_dir", "log_dir", "artifacts"):
            if getattr(self, name) is not None:
                self._set(name, as_path(name, getattr(self, name)))
        if self.recipe is None:
            raise UsageError("no recipe was given", hint="pass the name of a preset such as W4A16, or modifiers")
        self._set("precision", _dtype_name(self.precision))
        for name in ("sequential_targets", "ignore"):
            self._set(name, _names(name, getattr(self, name)))
        self._set("splits", _one_split(self.splits))
        _require_functions(self)
        if self.output_dir is None and not self.load:
            raise UsageError(
                "no output_dir was given", hint="pass one, or load=True to get the quantized model in memory only"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as frozen dataclasses do

    @property
    def is_named(self) -> bool:
        """Whether the data set is a path or an id."""
        return isinstance(self.dataset, (str, os.PathLike))


def parse_arguments(given: Mapping[str, Any], others: Mapping[str, Any], run: Sequence[str]) -> OneshotOptions:
    """Make the options of a call.

    Args:
        given: the arguments of `oneshot`, by name.
        others: further arguments.
        run: the names of further arguments that `calibrate` takes.

    Raises:
        UsageError: an argument is unknown, unsupported or has an invalid value.
    """
    is_data_free = others.get("pipeline") == "datafree"
    for name, value in others.items():
        if name in _LIMITED:
            accepted, why = _LIMITED[name]
            if not any(value is one or (type(value) is type(one) and value == one) for one in accepted):
                raise UsageError(f"{name}={shown(value)} is not supported", hint=why)
        elif name not in run and name not in WITHOUT_EFFECT and name != "dataset_path":
            names = sorted({*given, *run, *_LIMITED, *WITHOUT_EFFECT, "dataset_path"})
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
            raise UsageError(
                f"oneshot has no argument {name!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else "help(seqbuild.oneshot) lists them",
            )
    values = dict(given)
    if others.get("dataset_path") is not None:
        values["dataset"] = others["dataset_path"]
    if is_data_free and values.get("dataset") is not None:
        raise UsageError("pipeline='datafree' was given with a data set", hint="leave one of them out")
    return OneshotOptions(
        **values, is_data_free=is_data_free, run={name: others[name] for name in run if name in others}
    )


def _dtype_name(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"precision is {shown(value)}", hint=f"it must be one of {', '.join(_DTYPES)}")
    return name


def _names(name: str, value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if value is not None and (found is None or not all(isinstance(one, str) for one in found)):
        raise UsageError(f"{name} is {shown(value)}", hint="pass a name or a list of names")
    return found or ()


def _one_split(value: Any) -> str | None:
    """Return the split; llm-compressor also takes a list of one, and a mapping with the key `calibration`."""
    if isinstance(value, Mapping):
        value = value.get("calibration", value)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, str) and value):
        return value
    raise UsageError(f"splits is {shown(value)}", hint="pass the name of one split, such as train or train[:512]")


def _require_functions(options: OneshotOptions) -> None:
    function, collate = options.preprocessing_func, options.data_collator
    if function is not None and not callable(function):
        raise UsageError(
            f"preprocessing_func is {shown(function)}", hint="pass a function that takes a row and returns one"
        )
    if not callable(collate) and collate not in _COLLATORS:
        raise UsageError(
            f"data_collator is {shown(collate)}",
            hint=f"pass a function that makes a batch of a list of rows, or one of {', '.join(_COLLATORS)}",
        )
    if options.progress is not None and not callable(options.progress):
        raise UsageError(f"progress is {shown(options.progress)}", hint="pass a function that takes one line of text")
    if options.is_named and (function is not None or callable(collate)):
        name = "preprocessing_func" if function is not None else "data_collator"
        raise UsageError(
            f"{name} is not applied to the data set {options.dataset!r}, which is a path or an id",
            hint="load it, with the datasets library for instance, and pass it as dataset",
        )
