"""A model of the zoo, saved and compiled, and its loss by `evaluate` and by transformers' plain call."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import runtime
from runtime.data.inputs import model_inputs
from seqbuild.build import build
from seqbuild.sample.tokens import vocabulary
from seqbuild.verify.running import EAGER_EXPERTS, configured
from tests.zoo import Case, small_model

NOT_A_LABEL = -100
START = 3  # the decoder's first token, where a default config states none
PADDINGS = ("", "left", "right")


def saved(case: Case, directory: Path) -> tuple[Any, runtime.Artifact]:
    """The case's model as transformers loads it from `directory`, and its artifact, compiled from there.

    Some weights are not saved: Marian's tables of positions are made when it is loaded.
    """
    model = small_model(case)
    if model.config.is_encoder_decoder:
        state_start(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
        model = type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        path = build(directory, out=directory / "artifacts", attn_implementation="eager", text_only=True).path
    return model, runtime.load(path)


def state_start(config: Any) -> None:
    """Say what real checkpoints' configs say: with which token the decoder begins."""
    if getattr(config, "decoder_start_token_id", None) is None and config.model_type not in ("mbart", "plbart", "fsmt"):
        config.decoder_start_token_id = START
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0


def token_batch(config: Any, padding: str, *, seed: int = 1, prefix: str = "", size: tuple[int, int] = (3, 21)) -> Any:
    """Random ids and their mask, int64 [B, S]: row i is padded by four tokens less i at one end."""
    generator = torch.Generator().manual_seed(seed)
    count = vocabulary(config, prefix)
    ids_BS = torch.randint(min(10, count - 2), max(12, count // 2), size, generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    for row in range(size[0]):
        if padding:
            mask_BS[row, slice(4 - row) if padding == "left" else slice(size[1] - 4 + row, None)] = 0
    return ids_BS, mask_BS


def plain_logits(model: Any, **inputs: Any) -> torch.Tensor:
    """What the plain call gives, float32 [B, S, V]; experts run one after the other, as in a portable artifact."""
    with torch.no_grad(), configured(model, EAGER_EXPERTS):
        torch.manual_seed(3)
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def plain_causal_loss(model: Any, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> tuple[float, int]:
    """The summed loss of tokens that follow a token, neither of them padding, and how many there are."""
    given = {} if mask_BS is None else {"attention_mask": mask_BS}
    logits_BSV = plain_logits(model, input_ids=ids_BS, **given)
    counted = [
        (row, place)
        for row in range(len(ids_BS))
        for place in range(1, ids_BS.shape[1])
        if mask_BS is None or (mask_BS[row, place] and mask_BS[row, place - 1])
    ]
    losses = [cross_entropy(logits_BSV[row, place - 1].double(), ids_BS[row, place]) for row, place in counted]
    return float(torch.stack(losses).sum()), len(counted)


def evaluated(artifact: runtime.Artifact, weights: Path, **batch: torch.Tensor) -> tuple[float, int]:
    """The summed loss that `evaluate` measures, and over how many tokens."""
    batches = [model_inputs(artifact.manifest, batch)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = runtime.evaluate(artifact, weights=weights, batches=batches)
    return math.log(found.perplexity) * found.num_tokens, found.num_tokens


def plain_target_loss(model: Any, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None, labels_BT: torch.Tensor) -> Any:
    """The summed loss of `model(input_ids, labels=labels)` over the labels that are some, and how many they are.

    FSMT looks at no labels: it is given what its own method for transformers' collator makes of them.
    """
    given = {"input_ids": ids_BS} if mask_BS is None else {"input_ids": ids_BS, "attention_mask": mask_BS}
    if model.config.model_type == "fsmt":
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels_BT.clone())
    else:
        given["labels"] = labels_BT.clone()
    logits_BTV = plain_logits(model, **given)
    is_label_BT = labels_BT != NOT_A_LABEL
    losses = cross_entropy(logits_BTV[is_label_BT].double(), labels_BT[is_label_BT], reduction="sum")
    return float(losses), int(is_label_BT.sum())
