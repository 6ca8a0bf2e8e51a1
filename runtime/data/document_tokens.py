"""Tokenize documents.

A text gets the special tokens that its tokenizer adds, once; a conversation those of its chat template.

Shapes: S tokens of a document, T tokens of a target.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from runtime.data.chats import assistant_tokens, rendered
from runtime.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from runtime.data.documents import Document

Tokens: TypeAlias = "tuple[Tensor, Tensor]"  # ids, and whether each counts in statistics
# By tokenizer, the ids that it adds before and after a text.
_ADDED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[int], list[int]]] = weakref.WeakKeyDictionary()


def document_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None, loss_mask: bool
) -> Tokens:
    """Return the ids [S] of one document, and whether each counts in statistics, bool [S]."""
    import torch

    if loss_mask and not isinstance(document.content, str):
        _require_characters(rendered(tokenizer, document), document)
        ids, counts = assistant_tokens(tokenizer, document, max_length)
        _require_tokens(ids, document)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(counts, dtype=torch.bool)
    ids_S = _token_ids(tokenizer, document, max_length)
    return ids_S, torch.ones(len(ids_S), dtype=torch.bool)


def target_tokens(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None) -> Tensor:
    """Return the ids [T] of the text that the model should generate."""
    assert document.target is not None
    _require_characters(document.target, document)
    target = _without_added_tokens(tokenizer, document.target)
    return _encoded(tokenizer, document, max_length, text_target=target)


def _token_ids(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None) -> Tensor:
    """Return the ids [S] of one document; a tokenizer that truncates it keeps its own special tokens."""
    is_text = isinstance(document.content, str)
    text = document.content if isinstance(document.content, str) else rendered(tokenizer, document)
    _require_characters(text, document)
    if is_text:
        text = _without_added_tokens(tokenizer, text)
    return _encoded(tokenizer, document, max_length, text=text, add_special_tokens=is_text)


def _encoded(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None, **options: Any) -> Tensor:
    import torch

    truncation = max_length is not None
    found: Any = tokenizer(truncation=truncation, max_length=max_length, verbose=False, **options)
    # Some tokenizers exceed a length that has room for special tokens only.
    ids = torch.tensor(found["input_ids"][:max_length], dtype=torch.int64)
    _require_tokens(ids, document)
    return ids


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
