"""Options that several commands of both command lines share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.data.options import DataOptions

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact

Skew = Annotated[
    bool, typer.Option("--allow-version-skew", help="Accept library sources that differ from the compiled ones.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the model's own code to be executed.")]
ActivationMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for values between subgraphs: 16GiB (host), or device=4GiB,host=16GiB; the rest goes to disk."
    ),
]
StatisticsMemory = Annotated[
    str | None, typer.Option(help="Memory for the statistics of a layer's experts, such as 8GiB; default: no limit.")
]
ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile or seqbuild pack.")
]
_WEIGHTS = "Model directory with safetensors weights, or hub id in the local cache"
WeightsPath = Annotated[str, typer.Option("--weights", help=f"{_WEIGHTS}.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id; the same as ID@REVISION."),
]
_SOURCES = (
    ".txt, .json, .jsonl, .csv, .tsv, .parquet, a directory of such, - for standard input, or the id of a data set"
)
DATA = f"{_SOURCES}; or one file of seqbuild data. Repeatable; SOURCE::weight=0.7 mixes by weight"
DataSources = Annotated[list[str], typer.Option("--data", metavar="SOURCE", help=f"{DATA}.")]
DataArguments = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help=f"{_SOURCES}. SOURCE::weight=0.7 mixes by weight."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, xpu, xpu:N, or auto for an accelerator.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the model's own dtype.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Directory or hub id of the tokenizer; default: that of the weights.")
]
_KEY = "Public key (PEM file); the artifact must be signed with its private key."
Signature = Annotated[Path | None, typer.Option("--require-signature", help=_KEY)]
PublicKey = Annotated[Path | None, typer.Option("--public-key", help=_KEY)]
MachineFile = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="Rates from plan --save-machine, to predict seconds."),
]
BundledWeights = Annotated[str | None, typer.Option("--weights", help=f"{_WEIGHTS}; default: the bundle's.")]
BundledRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML recipe of llm-compressor, or a preset such as W4A16; default: the bundle's."),
]
BundledData = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="SOURCE", help=f"{DATA}. Default: the bundle's. Data-free recipes need none."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Directory for the quantized checkpoint; default for a bundle: quantized/."),
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Maximum size of a weights file, such as 5GB or 500MB.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Parts = Annotated[
    bool,
    typer.Option(
        "--parts", help="Each worker writes OUT.part-R-of-N, without a shared directory; join makes the checkpoint."
    ),
]
CheckpointActivations = Annotated[
    str,
    typer.Option(
        help="What --resume can start from: replay recomputes finished subgraphs (no cost now), save stores the "
        "values between all subgraphs on disk, a number N stores them after every N subgraphs."
    ),
]
PropagateError = Annotated[
    bool,
    typer.Option(help="Later layers see the outputs of quantized layers, or (faster) those of the original layers."),
]
AllExperts = Annotated[bool, typer.Option(help="Measure every expert on all tokens, or only on tokens routed to it.")]
SolveProducts = Annotated[
    str,
    typer.Option(
        help="Dtype of most products of a GPTQ solve: float32, bfloat16 (faster on some CPUs, but results differ "
        "slightly), or auto: bfloat16 if it is faster on all workers."
    ),
]
Log = Annotated[
    Path | None,
    # The second name is for torchrun, which takes --log for an abbreviation of its own options on Python 3.10 and 3.11.
    typer.Option("--log", "--log-file", help="Append events to this file, one JSON object per line."),
]
WorkerTimeout = Annotated[
    str,
    typer.Option(help="Under torchrun, the longest time that a worker waits for another: 600, 90s, 10min or 2h."),
]
Force = Annotated[bool, typer.Option("--force", help="Run even if the plan predicts that it does not fit.")]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Replay the passes that feed later layers as CUDA graphs: faster for small batches."
    ),
]
HashWeights = Annotated[
    bool, typer.Option(help="Record the SHA-256 of the source weights in seqbuild.json; reads them once more.")
]
KeepStatistics = Annotated[
    Path | None,
    typer.Option(
        "--keep-statistics",
        metavar="DIR",
        help="Save the statistics of all inputs of the original model, for --statistics; with --no-propagate-error.",
    ),
]
SavedStatistics = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="DIR",
        help="Solve from saved statistics instead of --data: nothing runs, as with --no-propagate-error.",
    ),
]
ReportPath = Annotated[
    Path | None, typer.Option("--report", help="File for the report page; default: OUT.report.html, beside OUT.")
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no report page.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def directory_of(given: str | None, revision: str | None, what: str) -> Path | None:
    """Return the directory of an option that is a directory or a hub id; see `resolve_directory`."""
    from runtime.errors import UsageError
    from runtime.host.hub import resolve_directory

    if given is not None:
        return resolve_directory(given, revision=revision, what=what)
    if revision is not None:
        raise UsageError(f"--revision {revision} requires a hub id", hint="pass one, or leave it out")
    return None


def _data_options(
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Number of samples.")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=2, help="Tokens per sample; default: the model's maximum, at most 2048."),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Join texts into full samples, or make one sample of each text.")
    ] = True,
    loss_mask: Annotated[
        bool, typer.Option("--loss-mask", help="In conversations, measure only the assistant's messages.")
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME",
            help="Field with the text or the messages; or FIELD=NAME, such as prompt=question. Repeatable.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a data set, such as train or train[:512].")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="Configuration (subset) of a data set.")] = None,
    data_revision: Annotated[
        str | None, typer.Option("--data-revision", help="Branch, tag or commit of a data set.")
    ] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", help="Format of files: text, json, jsonl, csv, tsv or parquet.")
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Take texts in a random order instead of evenly spread ones.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Number that determines the order of --shuffle.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, metavar="N", help="Print the first N samples.")] = 0,
) -> DataOptions:
    """Build the options of the data from the command line."""
    return DataOptions(
        num_samples=samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        columns=tuple(column or ()),
        split=split,
        config=config,
        revision=data_revision,
        format=data_format,
        shuffle=shuffle,
        seed=seed,
        show=show,
    )


def takes_data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of the data, in place of its parameter `data_options`."""
    return takes(command, "data_options", _data_options)


def takes(command: Callable[..., Any], name: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command several options in place of one parameter.

    Args:
        command: the command.
        name: of its parameter.
        build: has the options as parameters, and makes the value of the parameter of them.
    """
    shared = inspect.signature(build, eval_str=True).parameters

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        chosen = {option: values.pop(option) for option in shared}
        return command(**values, **{name: build(**chosen)})

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += shared.values() if parameter.name == name else [parameter]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    shape: Any = wrapped  # typer reads both
    shape.__signature__ = inspect.Signature(keywords)
    shape.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return wrapped


def load_on(
    path: Path, device: str, dtype: str, allow_version_skew: bool, trust_remote_code: bool, public_key: Path | None
) -> tuple[Artifact, torch.device, torch.dtype | None]:
    """Load the artifact and resolve the names of device and dtype."""
    from runtime.chain import load
    from runtime.host.devices import resolve_device, resolve_dtype

    run_dtype, run_device = resolve_dtype(dtype), resolve_device(device)
    loaded = load(
        path, allow_version_skew=allow_version_skew, trust_remote_code=trust_remote_code, public_key=public_key
    )
    return loaded, run_device, run_dtype
