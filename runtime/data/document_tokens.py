"""Turn documents into token ids.

A text gets the special tokens that its tokenizer adds, once; a conversation those that its chat template writes.

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

Tokens: TypeAlias = "tuple[Tensor, Tensor]"  # ids, and which of them count
# By tokenizer, the ids that it puts before and after a text.
_ADDED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[list[int], list[int]]] = weakref.WeakKeyDictionary()


def document_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None, loss_mask: bool
) -> Tokens:
    """The ids [S] of one document, and which of them count, bool [S]."""
    import torch

    if loss_mask and not isinstance(document.content, str):
        _require_characters(rendered(tokenizer, document), document)
        ids, counts = assistant_tokens(tokenizer, document, max_length)
        _require_tokens(ids, document)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(counts, dtype=torch.bool)
    ids_S = _token_ids(tokenizer, document, max_length)
    return ids_S, torch.ones(len(ids_S), dtype=torch.bool)


def target_tokens(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None) -> Tensor:
    """The ids [T] of what is to be written."""
    import torch

    assert document.target is not None
    _require_characters(document.target, document)
    found: Any = tokenizer(
        text_target=_without_added_tokens(tokenizer, document.target),
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
    )
    ids_T = torch.tensor(found["input_ids"][:max_length], dtype=torch.int64)
    _require_tokens(ids_T, document)
    return ids_T


def _token_ids(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None) -> Tensor:
    """The ids [S] of one document. Where it is too long, the tokenizer keeps room for its special tokens."""
    import torch

    is_text = isinstance(document.content, str)
    text = document.content if isinstance(document.content, str) else rendered(tokenizer, document)
    _require_characters(text, document)
    encoding: dict[str, Any] = tokenizer(
        _without_added_tokens(tokenizer, text) if is_text else text,
        add_special_tokens=is_text,
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
    )
    # A length with no room for anything but special tokens is not kept by every tokenizer.
    ids_S = torch.tensor(encoding["input_ids"][:max_length], dtype=torch.int64)
    _require_tokens(ids_S, document)
    return ids_S


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the special tokens at its ends that the tokenizer adds itself, so that none is there twice.

    Texts that were written by a chat template mostly begin with one.
    """
    if tokenizer not in _ADDED:  # the same for all of its documents
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
    """The ids that the tokenizer puts before and after those of a text."""
    for probe in ("a", "1", "."):  # some know few characters
        plain = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def _named(tokenizer: PreTrainedTokenizerBase, *kinds: str) -> list[tuple[str, int]]:
    """Special tokens of these kinds that the tokenizer has, each once, with their ids."""
    tokens = {getattr(tokenizer, f"{kind}_token", None): kind for kind in kinds}
    return [(token, getattr(tokenizer, f"{kind}_token_id")) for token, kind in tokens.items() if token]


def _require_characters(text: str, document: Document) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{document.where} has half of a surrogate pair, which is no character") from error


def _require_tokens(ids: Sequence[int] | Tensor, document: Document) -> None:
    if not len(ids):
        raise DataError(f"{document.where} gives no tokens", hint="take it out")
