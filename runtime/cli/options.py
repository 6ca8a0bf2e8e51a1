"""Options that several commands of both command lines share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
WeightsPath = Annotated[Path, typer.Option("--weights", help="Model directory with safetensors weights.")]
_DATA_FILES = ".txt, .jsonl, .parquet, or .safetensors from seqbuild data"
DataPath = Annotated[Path, typer.Option("--data", help=f"{_DATA_FILES}.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, xpu, xpu:N, or auto for an accelerator.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the model's own dtype.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per sample.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Number of samples.")]
Pack = Annotated[
    bool, typer.Option("--pack/--no-pack", help="Join texts into full samples, or make one sample of each text.")
]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="Directory of the tokenizer; default: that of the weights.")
]
_KEY = "Public key (PEM file); the artifact must be signed with its private key."
Signature = Annotated[Path | None, typer.Option("--require-signature", help=_KEY)]
PublicKey = Annotated[Path | None, typer.Option("--public-key", help=_KEY)]
BundledWeights = Annotated[
    Path | None, typer.Option("--weights", help="Model directory with safetensors weights; default: the bundle's.")
]
BundledRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML recipe of llm-compressor, or a preset such as W4A16; default: the bundle's."),
]
BundledData = Annotated[
    Path | None,
    typer.Option("--data", help=f"{_DATA_FILES}; default: the bundle's. Data-free recipes need none."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Directory for the quantized checkpoint; default for a bundle: quantized/."),
]
LossMask = Annotated[bool, typer.Option("--loss-mask", help="In conversations, measure only the assistant's messages.")]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Maximum size of a weights file, such as 5GB or 500MB.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
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
Log = Annotated[Path | None, typer.Option("--log", help="Append events to this file, one JSON object per line.")]
Force = Annotated[bool, typer.Option("--force", help="Run even if the plan predicts that it does not fit.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
