"""`oneshot`: quantize a model from Python in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from runtime.workers.start import require_one_process
from seqbuild.onecall.arguments import parse_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# Further arguments that `runtime.calibrate` takes.
_RUN = (
    "resume",
    "force",
    "max_shard_bytes",
    "activation_memory",
    "checkpoint_activations",
    "statistics_memory",
    "hash_weights",
    "keep_statistics",
    "statistics",
    "watchers",
    "own_modifiers",
)


def oneshot(  # noqa: D417 - `OneshotOptions` describes the other arguments
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: Any = None,
    recipe: Any = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    load: bool = False,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    processor: str | os.PathLike[str] | ProcessorMixin | None = None,
    num_calibration_samples: int = 512,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    dataset_config_name: str | None = None,
    splits: str | Sequence[str] | dict[str, str] | None = None,
    text_column: str = "text",
    preprocessing_func: Callable[[Any], Any] | None = None,
    data_collator: str | Callable[[list[Any]], Any] = "truncation",
    concatenate_data: bool = False,
    shuffle_calibration_samples: bool = True,
    seed: int = 0,
    use_loss_mask: bool = False,
    sequential_targets: Sequence[str] | str | None = None,
    sequential_targets_per_subgraph: int = 1,
    ignore: Sequence[str] | str | None = None,
    moe_calibrate_all_experts: bool = True,
    propagate_error: bool = True,
    precision: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    model_revision: str | None = "main",
    trust_remote_code_model: bool = False,
    artifacts: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    **others: Any,
) -> Any:
    """Quantize a model and write the checkpoint. See `seqbuild.onecall.arguments.OneshotOptions` for all arguments.

    Args:
        model: a hub id in the local cache, a directory, or a model in memory, which is read without a copy on disk and
            not changed.
        dataset: a data set of the datasets library, a DataLoader, an iterable of texts, records or tokenized rows; or a
            path, the id of a data set, or another data argument of the command line.
        recipe: YAML text, a file, the name of a preset, a `runtime.Recipe`, or modifiers of `seqbuild.modifiers`.
        output_dir: of the checkpoint; may be left out with `load=True`.
        load: return the quantized model of transformers instead of the result of `runtime.calibrate`.
        others: further arguments of `runtime.calibrate` and of llm-compressor.

    Raises:
        SeqbuildError: one of its classes, for anything that the caller can fix.
    """
    given = {name: value for name, value in locals().items() if name != "others"}
    require_one_process("seqbuild.oneshot")
    options = parse_arguments(given, others, _RUN)
    from seqbuild.onecall.in_python import run_oneshot

    return run_oneshot(options)
