"""Options that several commands have, in both command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Skew = Annotated[bool, typer.Option("--allow-version-skew", help="Go on with other sources of transformers.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Execute the code that the model brings.")]
ActivationMemory = Annotated[
    str | None,
    typer.Option(help="For values between subgraphs: 16GiB of host memory, or device=4GiB,host=16GiB; then disk."),
]
StatisticsMemory = Annotated[
    str | None, typer.Option(help="For the statistics of a layer's experts, 8GiB say; by default no bound.")
]
ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory written by seqbuild compile, or by seqbuild pack.")
]
WeightsPath = Annotated[Path, typer.Option("--weights", help="Model directory with safetensors weights.")]
DataPath = Annotated[Path, typer.Option("--data", help=".txt, .jsonl, .parquet, or .safetensors from seqbuild data.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, xpu or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the model's own.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples that run at a time.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens of a sample.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="How many samples to use.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join texts into full samples, or one sample a text.")]
Tokenizer = Annotated[Path | None, typer.Option("--tokenizer", help="Directory; by default that of the weights.")]
Signature = Annotated[Path | None, typer.Option("--require-signature", help="Public key that must have signed it.")]
BundledWeights = Annotated[
    Path | None, typer.Option("--weights", help="Model directory with safetensors weights; a bundle may hold it.")
]
BundledRecipe = Annotated[
    Path | None, typer.Option("--recipe", help="YAML, in llm-compressor's dialect; a bundle holds one.")
]
BundledData = Annotated[
    Path | None, typer.Option("--data", help="As for evaluate; not needed by a recipe without statistics.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the quantized checkpoint.")]
LossMask = Annotated[bool, typer.Option("--loss-mask", help="Of conversations, count only what the assistant says.")]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of a file of weights: 5GB, 500MB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
CheckpointActivations = Annotated[
    str,
    typer.Option(
        help="For a resume: replay finished subgraphs (costs nothing now), save the values between them "
        "(costs their bytes on disk), or a number N to save after every N subgraphs."
    ),
]
PropagateError = Annotated[
    bool, typer.Option(help="Later layers see what quantized ones return, or (faster) what the original ones do.")
]
AllExperts = Annotated[
    bool, typer.Option(help="Measure every expert on all tokens, or each on those that are sent to it.")
]
Log = Annotated[Path | None, typer.Option("--log", help="Append events to this file, a JSON object a line.")]
Force = Annotated[bool, typer.Option("--force", help="Go on where the plan says that it does not fit.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
