"""The options of a calibration, in one object from the public call to the end of the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.arguments import require_counts, require_kind
from runtime.checkpoint.writer import DEFAULT_SHARD_BYTES
from runtime.data.lanes import NUM_LANES, TOKENS_PER_LANE
from runtime.errors import UsageError
from runtime.streaming.activations import Budget

if TYPE_CHECKING:
    import torch

    from runtime.workers.group import Workers

AUTO, FLOAT32, BFLOAT16 = "auto", "float32", "bfloat16"
SOLVE_PRODUCTS = (AUTO, FLOAT32, BFLOAT16)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of a calibration.

    Attributes:
        device: where subgraphs run and weights are solved.
        dtype: of the weights and activations in the run; None for the model's own.
        max_shard_bytes: the largest size of one weights file of the checkpoint.
        resume: continue an interrupted run of the same output, artifact, weights, recipe, data and options; the result
            has the same bytes. Begins a new run when there is none.
        parts: each worker writes its tensors into a directory of its own, `OUT.part-R-of-N`, because the workers share
            none; `join` makes the checkpoint.
        checkpoint_activations: save the values between subgraphs to disk after every so many subgraphs, so that a
            resumed run does not repeat the finished ones; 0 for never.
        activation_memory: the memory that these values may take, see `runtime.streaming.activations`; None for no
            bound.
        propagate_error: run later subgraphs on the outputs of quantized ones. False saves one pass for each subgraph.
        moe_calibrate_all_experts: measure every expert of a mixture on all tokens, while a layer's output stays the
            sum over the chosen experts. False measures each expert on the tokens that are routed to it.
        statistics_memory: bytes that the statistics of a layer's experts may take at a time; more are measured in
            several passes, with the same result. None for no bound.
        solve_products: the dtype of most products of a GPTQ solve: `float32`, `bfloat16`, or `auto` for `bfloat16` if
            all workers run on CPUs that multiply it faster. Results differ slightly, see docs/algorithms.md.
        force: run although the plan predicts that memory is short.
        hash_weights: record the SHA-256 of the source weights in seqbuild.json, which reads them once more.
        keep_statistics: write the statistics of the original model's inputs into this directory; it requires
            `propagate_error=False`. None to keep none.
        statistics: solve from the statistics in this directory, without data and without running the model, as with
            `propagate_error=False`; None to measure.
        cuda_graphs: replay the passes that compute the inputs of later subgraphs as CUDA graphs, with the same result.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    resume: bool = False
    parts: bool = False
    checkpoint_activations: int = 0
    activation_memory: Budget | None = None
    propagate_error: bool = True
    moe_calibrate_all_experts: bool = True
    statistics_memory: int | None = None
    solve_products: str = FLOAT32
    force: bool = False
    cuda_graphs: bool = False
    hash_weights: bool = True
    keep_statistics: Path | None = None
    statistics: Path | None = None

    def __post_init__(self) -> None:
        """Reject values of the wrong type.

        Raises:
            UsageError: naming the option.
        """
        if self.cuda_graphs and self.device.type != "cuda":
            raise UsageError(f"CUDA graphs require a CUDA device; got {self.device}", hint="remove --cuda-graphs")
        require_kind("activation_memory", self.activation_memory, Budget, "it must be a runtime.Budget, in bytes")
        require_counts(max_shard_bytes=self.max_shard_bytes, statistics_memory=self.statistics_memory)
        require_counts(checkpoint_activations=self.checkpoint_activations or None)
        if self.solve_products not in SOLVE_PRODUCTS:
            raise UsageError(f"solve_products must be one of {', '.join(SOLVE_PRODUCTS)}; got {self.solve_products!r}")

    def decided(self, workers: Workers) -> RunOptions:
        """Decide `auto`, alike on all workers, which have the same options."""
        if self.solve_products != AUTO:
            return self
        from runtime.algorithms.products import has_quick_bfloat16

        found = workers.exchange(self.device.type == "cpu" and has_quick_bfloat16())
        return replace(self, solve_products=BFLOAT16 if all(found) else FLOAT32)

    def deciding(self, run_dtype: torch.dtype) -> dict[str, object]:
        """The options that decide the bytes of the result, by name."""
        return {
            "dtype": run_dtype,
            "device": self.device.type,
            "shard size": self.max_shard_bytes,
            "propagate_error": self.propagate_error,
            "moe_calibrate_all_experts": self.moe_calibrate_all_experts,
            "lanes": f"{NUM_LANES} of at least {TOKENS_PER_LANE} tokens",
            "solve products": self.solve_products,
        }
