"""Compare the chain with the model's plain call: `model(input_ids, attention_mask)`, with `labels` for a decoder.

If model and chain receive the same complete inputs, an input that real data does not contain goes unnoticed. So the
model is also run on a plain call's inputs, and the chain on the inputs that the runtime derives from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.manifest import UNKNOWN_ABSENCE
from runtime.data.decoder import LABELS
from runtime.data.inputs import DECODER_IDS, model_inputs
from seqbuild.sample.plain import left_out_of_plain_calls
from seqbuild.verify.difference import Difference, difference
from seqbuild.verify.running import run_chain, run_model

if TYPE_CHECKING:
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact

LOGITS = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainReference:
    """Inputs of a plain call, and the model's output for them: all fields, or with labels the logits only."""

    given: Mapping[str, torch.Tensor]
    output: Mapping[str, Any]


def plain_reference(manifest: Manifest, model: nn.Module, sample: Mapping[str, torch.Tensor]) -> PlainReference | None:
    """Run the model's plain call; None if the artifact's sample is already a plain call."""
    left_out = [entry.name for entry in manifest.inputs if entry.absent != UNKNOWN_ABSENCE]
    has_labels = DECODER_IDS in sample and bool(manifest.decoder)
    if not left_out and not has_labels:
        return None
    given = {name: value for name, value in sample.items() if name not in left_out}
    if not has_labels:
        return PlainReference(given=given, output=run_model(model, given))
    given[LABELS] = labels_BT = given.pop(DECODER_IDS)
    output = run_model(model, given)
    if output[LOGITS].shape[:-1] != labels_BT.shape:  # FSMT ignores labels; its collator does this
        made = model.prepare_decoder_input_ids_from_labels(labels_BT.clone())  # type: ignore[operator]
        output = run_model(model, {**given, DECODER_IDS: made})
    return PlainReference(given=given, output={LOGITS: output[LOGITS]})


def plain_difference(artifact: Artifact, twin: nn.Module, reference: PlainReference) -> Difference:
    """Return the difference between a plain call and the chain on the inputs that the runtime derives from it."""
    got = run_chain(artifact.subgraphs, twin, model_inputs(artifact.manifest, reference.given))
    found = difference({name: got[name] for name in got if name in reference.output}, reference.output)
    return replace(found, output=f"{found.output} of a plain call") if found.output else found


def missing_input_remarks(manifest: Manifest, model: type[nn.Module]) -> list[str]:
    """Return a sentence for each input that text data must contain although a plain call omits it."""
    if any(entry.dtype == "model" or "float" in entry.dtype for entry in manifest.inputs):
        return []  # not text only: a processor creates all inputs
    names = [entry.name for entry in manifest.inputs if entry.absent == UNKNOWN_ABSENCE]
    return [
        f"The artifact requires input {name}, which a plain call omits and which has no default: batches must have it."
        for name in left_out_of_plain_calls(model, names)
    ]
