"""Conversations as tokens: written by the tokenizer's chat template, and which of them the assistant says.

A template marks the assistant's text by `{% generation %}` and `{% endgeneration %}`. Where it does, those tokens alone
can be made to count in statistics: they are what the model will have to write.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from runtime.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.data.documents import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    """A conversation as text.

    Raises:
        DataError: when there is no template, or the messages do not fit it.
    """
    text = _apply(tokenizer, document, tokenize=False)
    assert isinstance(text, str)
    return text


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None
) -> tuple[list[int], list[int]]:
    """The ids of a conversation, and for each 1 where the assistant says it, else 0.

    Raises:
        DataError: likewise, and when the template or the tokenizer cannot tell.
    """
    _require_template(tokenizer, document)
    if not tokenizer.is_fast:
        raise DataError(
            "this tokenizer cannot say which token comes from which text, so there is no loss mask",
            hint="take one with a tokenizer.json, or leave --loss-mask out",
        )
    # Without the mark transformers would give a mask of nothing but zeros.
    if not _GENERATION.search(tokenizer.get_chat_template()):
        raise DataError(
            "the tokenizer's chat template does not mark what the assistant says",
            hint="put {% generation %} and {% endgeneration %} around it in the template, or leave --loss-mask out",
        )
    found = _apply(tokenizer, document, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, counts = list(found["input_ids"]), list(found["assistant_masks"])
    kept = slice(None)
    if max_length is not None:
        kept = slice(-max_length, None) if tokenizer.truncation_side == "left" else slice(max_length)
    return ids[kept], counts[kept]


def _require_template(tokenizer: PreTrainedTokenizerBase, document: Document) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{document.where} has messages, and the tokenizer has no chat template",
            hint="take an instruction-tuned model's tokenizer, or give the conversations as text",
        )


def _apply(tokenizer: PreTrainedTokenizerBase, document: Document, **options: Any) -> Any:
    _require_template(tokenizer, document)
    messages: Any = document.content
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and may raise anything
        raise DataError(f"{document.where} does not fit the chat template: {error}") from error
