"""Tokenize documents.

A text gets the special tokens that its tokenizer adds, once; a conversation those of its chat template.

Shapes: S tokens of a document, T tokens of a target.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.data.chats import assistant_tokens, has_template, rendered
from runtime.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from runtime.data.documents import Document

# By tokenizer, the ids that it adds before and after a text.
_ADDED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[int], list[int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class DocumentTokens:
    """The tokens of one document.

    Attributes:
        ids: int64 [S].
        counts: whether each counts in statistics, bool [S].
        is_cut: whether tokens at the end were left out.
    """

    ids: Tensor
    counts: Tensor
    is_cut: bool


def document_tokens(
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    max_length: int | None,
    loss_mask: bool,
    notes: Counter[str],
) -> DocumentTokens:
    """Tokenize one document; `notes` counts conversations that had to be changed, by what was done."""
    import torch

    if loss_mask and not isinstance(document.content, str):
        if has_template(tokenizer):
            _require_characters(rendered(tokenizer, document, Counter()), document)
        ids, counts = assistant_tokens(tokenizer, document, notes)
        _require_tokens(ids, document)
        is_cut = max_length is not None and len(ids) > max_length
        kept = slice(None)
        if is_cut and max_length is not None:
            kept = slice(-max_length, None) if tokenizer.truncation_side == "left" else slice(max_length)
        return DocumentTokens(
            torch.tensor(ids[kept], dtype=torch.int64), torch.tensor(counts[kept], dtype=torch.bool), is_cut
        )
    ids_S, is_cut = _token_ids(tokenizer, document, max_length, notes)
    return DocumentTokens(ids_S, torch.ones(len(ids_S), dtype=torch.bool), is_cut)


def target_tokens(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None) -> Tensor:
    """Return the ids [T] of the text that the model should generate."""
    assert document.target is not None
    _require_characters(document.target, document)
    target = _without_added_tokens(tokenizer, document.target)
    return _encoded(tokenizer, document, max_length, text_target=target)[0]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None, notes: Counter[str]
) -> tuple[Tensor, bool]:
    """Return the ids [S] of one document; a tokenizer that truncates it keeps its own special tokens."""
    content = document.content
    text = content if isinstance(content, str) else rendered(tokenizer, document, notes)
    is_text = isinstance(content, str) or not has_template(tokenizer)
    _require_characters(text, document)
    if is_text:
        text = _without_added_tokens(tokenizer, text)
    ids_S, is_cut = _encoded(tokenizer, document, max_length, text=text, add_special_tokens=is_text)
    bos = tokenizer.bos_token_id
    if not is_text and bos is not None and ids_S[:2].tolist() == [bos, bos]:
        ids_S = ids_S[1:]  # the template and the text of the first message both begin with it
    return ids_S, is_cut


def _encoded(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None, **options: Any
) -> tuple[Tensor, bool]:
    """Return ids, and whether the text was cut at `max_length`."""
    import torch

    truncation = max_length is not None
    found: Any = tokenizer(truncation=truncation, max_length=max_length, verbose=False, **options)
    # Some tokenizers exceed a length that has room for special tokens only.
    ids = torch.tensor(found["input_ids"][:max_length], dtype=torch.int64)
    _require_tokens(ids, document)
    encodings = getattr(found, "encodings", None)
    is_cut = bool(encodings[0].overflowing) if encodings else len(ids) == max_length
    return ids, is_cut


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Remove special tokens at the ends of a text that the tokenizer will add again.

    Texts that were rendered by a chat template usually begin with one.
    """
    if tokenizer not in _ADDED:
        _ADDED[tokenizer] = _added_ids(tokenizer)
    before, after = _ADDED[tokenizer]
    for token, token_id in _named(tokenizer, "bos", "cls"):
        if before[:1] == [token_id]:
            text = text.removeprefix(token)
    for token, token_id in _named(tokenizer, "eos", "sep"):
        if after[-1:] == [token_id]:
            text = text.removesuffix(token)
    return text


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after those of a text."""
    for probe in ("a", "1", "."):  # some vocabularies have few characters
        plain = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def _named(tokenizer: PreTrainedTokenizerBase, *kinds: str) -> list[tuple[str, int]]:
    """List the special tokens of these kinds, each once, with their ids."""
    tokens = {getattr(tokenizer, f"{kind}_token", None): kind for kind in kinds}
    return [(token, getattr(tokenizer, f"{kind}_token_id")) for token, kind in tokens.items() if token]


def _require_characters(text: str, document: Document) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{document.where} has an unpaired surrogate, which is not a character") from error


def _require_tokens(ids: Sequence[int] | Tensor, document: Document) -> None:
    if not len(ids):
        raise DataError(f"{document.where} has no tokens", hint="remove it")
