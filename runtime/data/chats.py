"""Tokenize conversations with the tokenizer's chat template, and find the tokens of the assistant.

A template marks the text of the assistant by `{% generation %}` and `{% endgeneration %}`. With these marks, statistics
can be limited to those tokens, which are what the model will generate.
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
    """Render a conversation as text.

    Raises:
        DataError: the tokenizer has no chat template, or the messages do not fit it.
    """
    text = _apply(tokenizer, document, tokenize=False)
    assert isinstance(text, str)
    return text


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and 1 for each token of the assistant, 0 for others.

    Raises:
        DataError: as `rendered`, and if the template or the tokenizer does not mark the assistant's tokens.
    """
    _require_template(tokenizer, document)
    if not tokenizer.is_fast:
        raise DataError(
            "this tokenizer does not map tokens to text, so no loss mask can be made",
            hint="use one with a tokenizer.json, or leave --loss-mask out",
        )
    # Without the marks, transformers returns a mask of zeros.
    if not _GENERATION.search(tokenizer.get_chat_template()):
        raise DataError(
            "the tokenizer's chat template does not mark the text of the assistant",
            hint="enclose it in {% generation %} and {% endgeneration %} in the template, or leave --loss-mask out",
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
            f"{document.where} has messages, but the tokenizer has no chat template",
            hint="use the tokenizer of an instruction-tuned model, or give the conversations as text",
        )


def _apply(tokenizer: PreTrainedTokenizerBase, document: Document, **options: Any) -> Any:
    _require_template(tokenizer, document)
    messages: Any = document.content
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        raise DataError(f"{document.where} does not fit the chat template: {error}") from error
