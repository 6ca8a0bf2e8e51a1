"""The result of one call, its summary, and its facts as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import human_bytes

if TYPE_CHECKING:
    from runtime.evaluation import Evaluation
    from runtime.streaming.report import Calibration


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """The result of one call.

    Attributes:
        calibration: the result of its calibration.
        artifact: the compiled model.
        recipe: the name of the recipe.
        original_bytes: size of the model's weights.
        before: the perplexity of the model; None if it was not measured.
        after: that of the result.
        not_measured: the reason why perplexity was not measured; empty if it was.
        seconds: time by step.
        peak_host_bytes: peak memory of this process.
        peak_device_bytes: peak memory on the device.
        serving: a command or code that loads the result.
    """

    calibration: Calibration
    artifact: Path
    recipe: str
    original_bytes: int
    before: Evaluation | None
    after: Evaluation | None
    not_measured: str
    seconds: Mapping[str, float]
    peak_host_bytes: int
    peak_device_bytes: int
    serving: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The directory of the quantized checkpoint."""
        return self.calibration.path


def summary(result: Quantized) -> Iterator[str]:
    """Summarize the result, one line for each fact."""
    done, seconds = result.calibration, result.seconds
    memory = human_bytes(result.peak_host_bytes)
    if result.peak_device_bytes:
        memory += f", {human_bytes(result.peak_device_bytes)} on the device"
    share = done.num_bytes / max(result.original_bytes, 1)
    caches = f" and {done.num_caches} key-value caches" if done.num_caches else ""
    yield f"quantized    {len(done.modules)} modules{caches} with {result.recipe}, in {done.path}"
    yield f"size         {human_bytes(result.original_bytes)} before, {human_bytes(done.num_bytes)} after ({share:.0%})"
    yield f"perplexity   {_perplexity(result)}"
    yield f"time         {sum(seconds.values()):.1f} s: {', '.join(f'{name} {s:.1f} s' for name, s in seconds.items())}"
    yield f"peak memory  {memory}"


def _perplexity(result: Quantized) -> str:
    before, after = result.before, result.after
    if before is None or after is None:
        return f"not measured: {result.not_measured}"
    change = after.perplexity / before.perplexity - 1
    return (
        f"{before.perplexity:.4f} before, {after.perplexity:.4f} after ({change:+.2%}), "
        f"{after.num_tokens:,} held-out tokens"
    )


def facts(result: Quantized) -> dict[str, Any]:
    """Return the result as JSON values."""
    done, before, after = result.calibration, result.before, result.after
    return {
        "path": str(done.path),
        "artifact": str(result.artifact),
        "recipe": result.recipe,
        "modules": len(done.modules),
        "bytes": {"before": result.original_bytes, "after": done.num_bytes},
        "perplexity": None
        if before is None or after is None
        else {"before": before.perplexity, "after": after.perplexity, "tokens": after.num_tokens},
        "perplexity_not_measured": result.not_measured,
        "seconds": dict(result.seconds),
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
        "resumed_at": done.resumed_at,
        "remarks": list(done.remarks),
        "serving": list(result.serving),
    }
