"""Determine the plain call of a model and the inputs that it omits.

A plain call is `model(input_ids, attention_mask)`, with `labels` for an encoder-decoder model. Text data provides these
inputs, and quality metrics are measured with them. A forward takes further inputs, and a filled input is not always
equivalent to a missing one: GPT-2 adds the embedding of token 0 if `token_type_ids` are zeros, and nothing if they are
missing. A sample therefore contains an input that a plain call omits only if a value that represents its absence is
known. This is tested: a small random copy of the model runs with and without the value, and the outputs must be equal
in every bit.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.manifest import PAD, START
from runtime.console import quiet
from runtime.data.decoder import NOT_A_LABEL, shifted
from runtime.errors import TraceError
from seqbuild.sample.audio import is_input, replaces_text, with_audio
from seqbuild.sample.shape import SampleShape
from seqbuild.sample.thin import random_copy
from seqbuild.sample.tokens import text_inputs

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, torch.Tensor]

# Candidate values that represent the absence of an input, by its name without `decoder_`.
_STANDS_FOR_ABSENCE = {"token_type_ids": 0, "bbox": 0, "lang_ids": 0, "decoder_attention_mask": 1}
_STARTS = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
# Shapes of the samples that are tried.
_SHAPES = (
    SampleShape(),
    SampleShape(batch=2, sequence=19, padding="left", seed=1),
    SampleShape(batch=1, sequence=24, padding="right", seed=2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainCall:
    """Properties of a model's plain call.

    Attributes:
        absent: inputs that it omits but a sample may contain: the number that represents absence, used everywhere in
            the tensor; None if the model does not run without the input.
        decoder: the rule that derives the decoder's inputs from labels, see `runtime.data.decoder`; empty if unknown.
    """

    absent: Mapping[str, int | None] = field(default_factory=dict)
    decoder: Mapping[str, int] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, PlainCall] = weakref.WeakKeyDictionary()


def is_left_out(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a plain call omits this input because its default is None."""
    return _value_for(name) is not None and name in parameters and parameters[name].default is None


def left_out_of_plain_calls(model: nn.Module | type[nn.Module], names: Collection[str]) -> list[str]:
    """Return those of these inputs that a plain call of text omits."""
    parameters = inspect.signature(model.forward).parameters
    return [name for name in names if is_left_out(name, parameters)]


def plain_call(model: nn.Module, names: Collection[str] = ()) -> PlainCall:
    """Determine the plain call of a model, which is neither run nor modified; cached for each model.

    Args:
        model: the model to be called.
        names: the given inputs; if one of them is not text, the result is unknown.
    """
    parameters = inspect.signature(model.forward).parameters
    if replaces_text(parameters):
        is_plain = all(map(is_input, names))
    else:
        text = text_inputs(getattr(model, "config", None), parameters, _SHAPES[0])
        is_plain = "input_ids" in parameters and set(names) <= text.keys()
    if not is_plain:
        return PlainCall()
    if model not in _known:
        _known[model] = _find(model)
    return _known[model]


def _row(model: Any, parameters: Mapping[str, inspect.Parameter], shape: SampleShape) -> Row:
    if replaces_text(parameters):
        return with_audio(model, parameters, shape)
    return text_inputs(getattr(model, "config", None), parameters, shape)


def _find(model: nn.Module) -> PlainCall:
    parameters = inspect.signature(model.forward).parameters
    text = text_inputs(getattr(model, "config", None), parameters, _SHAPES[0])
    config: Any = getattr(model, "config", None)
    left_out = [name for name in text if is_left_out(name, parameters)]
    read = text.get("decoder_input_ids")
    has_labels = "labels" in parameters and read is not None and read.dim() == 2  # not several streams of codes
    if not left_out and not has_labels:
        return PlainCall()
    try:
        trial = _AbsenceTrial(random_copy(model))
        rows = [_row(trial.model, parameters, shape) for shape in _SHAPES]
    except TraceError:
        return PlainCall()
    absent = _stand_ins(trial, rows, left_out)
    if not has_labels:
        return PlainCall(absent=absent)
    decoder = _rule(trial, config, rows[0], absent)
    if decoder is None:  # there may be a rule without the decoder's other inputs
        fewer = {name: value for name, value in absent.items() if not name.startswith("decoder_") or value is None}
        decoder = _rule(trial, config, rows[0], fewer)
        absent = absent if decoder is None else fewer
    return PlainCall(absent=absent, decoder=decoder or {})


def _value_for(name: str) -> int | None:
    return _STANDS_FOR_ABSENCE.get(name, _STANDS_FOR_ABSENCE.get(name.removeprefix("decoder_")))


def with_stand_ins(row: Row, absent: Mapping[str, int | None]) -> Row:
    """Fill the inputs that have a value representing absence with that value."""
    values = {name: absent.get(name) for name in row}
    return {
        name: tensor if (value := values[name]) is None else torch.full_like(tensor, value)
        for name, tensor in row.items()
    }


def _stand_ins(trial: _AbsenceTrial, rows: Sequence[Row], left_out: Sequence[str]) -> dict[str, int | None]:
    """Return the inputs among `left_out` that a sample may contain, as in `PlainCall.absent`."""
    needed = _needed(trial, rows[0], left_out)
    others = [name for name in left_out if name not in needed]
    plain = [{name: value for name, value in row.items() if name not in others} for row in rows]
    wanted = [trial.run(row) for row in plain]
    if any(output is None for output in wanted):
        return dict.fromkeys(needed)
    found: dict[str, int | None] = dict.fromkeys(needed)
    for name in others:
        tried = found | {name: _value_for(name)}
        given = [{key: row[key] for key in row if key not in others or key in tried} for row in rows]
        given = [with_stand_ins(row, tried) for row in given]
        if all(_is_same(trial.run(row), output) for row, output in zip(given, wanted, strict=True)):
            found = tried
    return found


def _needed(trial: _AbsenceTrial, row: Row, left_out: Sequence[str]) -> list[str]:
    """Return the inputs among `left_out` that the model requires, as few as possible."""
    plain = {name: value for name, value in row.items() if name not in left_out}
    if trial.run(plain) is not None:
        return []
    for name in left_out:
        if trial.run(plain | {name: row[name]}) is not None:
            return [name]
    return list(left_out) if trial.run(row) is not None else []


def _rule(trial: _AbsenceTrial, config: Any, row: Row, absent: Mapping[str, int | None]) -> dict[str, int] | None:
    """Find the rule that derives the decoder's inputs from labels, by trials on labels with and without padding.

    The reference is the model called with labels. FSMT ignores labels, so its reference is the method that
    transformers' collator calls.
    """
    kept = {name: value for name, value in row.items() if name in absent or not is_left_out(name, trial.parameters)}
    given = with_stand_ins(kept, absent)
    labels_BT = given.pop("decoder_input_ids")
    padded_BT = labels_BT.clone()
    padded_BT[0, -3:] = NOT_A_LABEL
    labels = (labels_BT, padded_BT)
    plain = {name: value for name, value in given.items() if not name.startswith("decoder_") or absent[name] is None}
    references = [
        [trial.run(plain | {"labels": each}) for each in labels],
        [
            trial.run(plain | {"decoder_input_ids": made})
            for each in labels
            if (made := trial.prepared(each)) is not None
        ],
    ]
    for wanted in references:
        for here, there in _candidates(trial.config, config) if len(wanted) == len(labels) else ():
            tried = [trial.run(given | {"decoder_input_ids": shifted(each, here)}) for each in labels]
            if all(map(_predicts_alike, tried, wanted, labels)):
                return there
    return None


def _candidates(thin: Any, config: Any) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Return candidate rules for the copy and for the model, whose token ids may differ."""
    padding = [{PAD: _token(one, "pad_token_id") or 0} for one in (thin, config)]
    for name in _STARTS:
        start, own = _token(thin, name), _token(config, name)
        if start is not None and own is not None:
            yield padding[0] | {START: start}, padding[1] | {START: own}
    yield padding[0], padding[1]


def _token(config: Any, name: str) -> int | None:
    """Return a special token's id; some models state it in a nested config."""
    parts = [config, config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config]
    found = [getattr(part, name, None) for part in parts]
    return next((value for value in found if type(value) is int and value >= 0), None)


class _AbsenceTrial:
    """A random copy of the model, run to test the absence of inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config
        self.parameters = inspect.signature(model.forward).parameters

    def run(self, row: Row) -> dict[str, Any] | None:
        """Return the outputs by field, or None if the model does not run."""
        extra = {"use_cache": False} if "use_cache" in self.parameters else {}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), quiet("transformers"):
                torch.manual_seed(0)
                output = self.model(**{name: value.clone() for name, value in row.items()}, **extra)
        except MemoryError:
            raise
        except Exception:  # the model's code may raise anything
            return None
        return dict(output) if isinstance(output, Mapping) else {"output": output}

    def prepared(self, labels_BT: torch.Tensor) -> torch.Tensor | None:
        """Return the result of the model's own method for labels; None if it has no working one."""
        prepare = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        try:
            made = None if prepare is None else prepare(labels_BT.clone())
        except MemoryError:
            raise
        except Exception:  # as in `run`
            return None
        return made if isinstance(made, torch.Tensor) and made.shape == labels_BT.shape else None


def _is_same(got: Any, wanted: Any) -> bool:
    """Return whether two outputs are equal in every bit."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(got, torch.Tensor) and torch.equal(got, wanted)
    if isinstance(wanted, Mapping):
        return isinstance(got, Mapping) and list(got) == list(wanted) and all(_is_same(got[k], wanted[k]) for k in got)
    if isinstance(wanted, (tuple, list)):
        is_alike = isinstance(got, (tuple, list)) and len(got) == len(wanted)
        return is_alike and all(map(_is_same, got, wanted))
    return got is not None and type(got) is type(wanted)


def _predicts_alike(got: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, labels_BT: torch.Tensor) -> bool:
    """Return whether logits are equal at every position with a label."""
    pair = [None if output is None else output.get("logits") for output in (got, wanted)]
    ours, theirs = pair
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
        return False
    if ours.shape[:2] != labels_BT.shape:
        return False
    is_label = labels_BT != NOT_A_LABEL
    return torch.equal(ours[is_label], theirs[is_label])
