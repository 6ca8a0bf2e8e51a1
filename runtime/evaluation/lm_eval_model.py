"""The model of `lm_eval --model seqbuild`, registered in lm-eval when this module is imported."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from runtime.chain import load
from runtime.console import complain
from runtime.errors import UsageError
from runtime.evaluation.options import PassOptions
from runtime.evaluation.requests import TokenRequest
from runtime.evaluation.scoring import Score, ScoringOptions, default_memory, require_scoring, scoring
from runtime.evaluation.streamed_model import StreamedLM
from runtime.evaluation.tasks import TaskOptions, encoder_of
from runtime.host.devices import resolve_device, resolve_dtype
from runtime.host.hub import resolve_directory
from runtime.streaming.activations import Budget
from runtime.streaming.lines import Lines

_DEFAULT_DEVICE = "cuda:0"  # of lm-eval's command line, also on hosts without a GPU


@register_model("seqbuild")
class SeqbuildLM(StreamedLM):
    """The model of `lm_eval --model seqbuild`; the arguments are those of `--model_args`.

    Args:
        artifact: directory of the compiled model.
        weights: directory or hub id of a checkpoint.
        tokenizer: its directory; by default that of the weights.
        device: `cpu`, `cuda`; by default an accelerator.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the model's own.
        batch_size: sequences of a batch; `auto`, and lm-eval's default of 1, for as many as suit their length.
        max_batch_size: not used.
        max_length: the most tokens that the model reads at once.
        add_bos_token: begin texts with BOS.
        prefix_token_id: the token in place of a missing context.
        activation_memory: as `--activation-memory` of `seqbuild evaluate`.
        trust_remote_code: allow the model's own code to be executed.

    Attributes:
        latest: the model that lm-eval has made last.
    """

    latest: SeqbuildLM | None = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SeqbuildLM:
        """Create the model; `--model_args` go before the options of lm-eval.

        Raises:
            UsageError: for an argument that is missing, unknown, or no number.
        """
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if others.get("device") == _DEFAULT_DEVICE:
            del others["device"]
        known = list(inspect.signature(cls).parameters)
        for name in arg_dict:
            if name not in known:
                raise UsageError(f"--model_args has the unknown argument {name!r}", hint=f"pass {', '.join(known)}")
        for name in ("artifact", "weights"):
            if name not in arg_dict:
                raise UsageError(f"--model_args has no {name}", hint="pass artifact=ARTIFACT,weights=CKPT")
        for name in ("max_length", "prefix_token_id"):
            if not isinstance(arg_dict.get(name), int | None):
                raise UsageError(f"{name}={arg_dict[name]!r} in --model_args is not a number", hint="pass a number")
        return cls(**{**others, **arg_dict})

    def __init__(
        self,
        artifact: str,
        weights: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        activation_memory: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        loaded = load(Path(artifact), trust_remote_code=trust_remote_code)
        require_scoring(loaded.manifest)
        directory = resolve_directory(weights, revision=None, what="weights")
        source = directory if tokenizer is None else resolve_directory(tokenizer, revision=None, what="tokenizer")
        settings = TaskOptions(
            names=(), max_length=max_length, add_bos_token=add_bos_token, prefix_token_id=prefix_token_id
        )
        encoder = encoder_of(loaded, source, settings)
        place = resolve_device(device or "auto")
        options = PassOptions(
            device=place,
            dtype=resolve_dtype(dtype),
            activation_memory=default_memory(place) if activation_memory is None else Budget.parse(activation_memory),
            watchers=[Lines(complain)],
        )
        size = None if str(batch_size).partition(":")[0] in ("None", "auto", "1") else int(str(batch_size))

        def answers(requests: list[TokenRequest]) -> list[Score]:
            how = ScoringOptions(max_length=encoder.max_length, batch_size=size)
            with scoring(loaded, directory, requests, how, options) as (scores, _):
                return scores

        super().__init__(encoder, answers)
        SeqbuildLM.latest = self
