"""Render conversations with the tokenizer's chat template, and find the tokens of the assistant.

Templates differ in what they accept, so a conversation is adapted to them:

- Content that is a list of text parts becomes a string, or a string becomes a list, whichever the template prints.
- Arguments of tool calls become objects, as most templates expect, or JSON if the template rejects objects.
- If the template rejects a message without content, its content becomes an empty string.
- If the template rejects a system message, it becomes the beginning of the user's first message.

Without a template, messages are written as `User: ...`, separated by blank lines.

A template marks the text of the assistant by `{% generation %}` and `{% endgeneration %}`. With these marks, statistics
can be limited to those tokens, which are what the model will generate.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runtime.data.records import TEXT_KINDS, Messages
from runtime.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.data.documents import Document

NO_TEMPLATE = "conversations written as plain text, because the tokenizer has no chat template"
MERGED_SYSTEM = "system messages merged into the user's first message"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "seqbuild"
# By tokenizer, the kind of content that its template prints: str or list; None if it prints neither.
_CONTENT_KINDS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, type | None] = weakref.WeakKeyDictionary()


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can render conversations."""
    return tokenizer.chat_template is not None


def rendered(tokenizer: PreTrainedTokenizerBase, document: Document, notes: Counter[str]) -> str:
    """Render a conversation as text.

    Args:
        tokenizer: has the chat template.
        document: the conversation.
        notes: counts conversations that had to be changed, by what was done.

    Raises:
        DataError: the messages do not fit the chat template, or name images, audio or video.
    """
    if not has_template(tokenizer):
        notes[NO_TEMPLATE] += 1
        return _plain_text(document)
    text = _apply(tokenizer, document, notes, tokenize=False)
    assert isinstance(text, str)
    return text


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, notes: Counter[str]
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and 1 for each token of the assistant, 0 for others.

    Raises:
        DataError: as `rendered`, and if no template or tokenizer marks the assistant's tokens.
    """
    if not has_template(tokenizer):
        raise DataError(
            f"{document.where} has messages, but the tokenizer has no chat template, which a loss mask requires",
            hint="use the tokenizer of an instruction-tuned model, or leave --loss-mask out",
        )
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
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _apply(tokenizer, document, notes, **options)
    return list(found["input_ids"]), list(found["assistant_masks"])


def _apply(tokenizer: PreTrainedTokenizerBase, document: Document, notes: Counter[str], **options: Any) -> Any:
    """Apply the template to the first form of the conversation that it accepts."""
    failure: Exception | None = None
    for note, messages in _forms(document, _content_kind(tokenizer)):
        try:
            found = tokenizer.apply_chat_template(messages, tools=document.tools, **options)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            failure = failure or error
            continue
        notes.update([note] if note else [])
        return found
    why = str(failure).strip().partition("\n")[0]
    raise DataError(f"{document.where} does not fit the chat template: {why}", hint="change or remove it") from failure


def _content_kind(tokenizer: PreTrainedTokenizerBase) -> type | None:
    """Determine which content the template prints; some drop a string, others print a list as Python writes it."""
    if tokenizer not in _CONTENT_KINDS:
        _CONTENT_KINDS[tokenizer] = None
        contents: tuple[Any, ...] = (_PROBE, [{"type": "text", "text": _PROBE}])
        for content in contents:
            try:
                text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            except MemoryError:
                raise
            except Exception:  # a template is a program and can raise anything
                continue
            if isinstance(text, str) and _PROBE in text and "'type'" not in text:
                _CONTENT_KINDS[tokenizer] = type(content)
                break
    return _CONTENT_KINDS[tokenizer]


def _forms(document: Document, kind: type | None) -> Iterator[tuple[str, Messages]]:
    """Yield the forms in which a template may accept a conversation, and what to note about each."""
    given: Any = document.content
    messages = [_with_content(message, kind, document.where) for message in given]
    with_objects = [_with_arguments(message, dict) for message in messages]
    with_texts = [_with_arguments(message, str) for message in messages]
    yield "", with_objects
    yield from (("", form) for form in (with_texts,) if form != with_objects)
    if any(message.get("content") is None for message in messages):
        empty = _with_content({"content": ""}, kind, document.where)
        for form in (with_objects, with_texts):
            yield "", [message if message.get("content") is not None else message | empty for message in form]
    if len(messages) > 1 and messages[0].get("role") == "system" and messages[1].get("role") == "user":
        system, user, *rest = with_objects
        both = [_text_of(message, document.where) for message in (system, user)]
        merged = {**user, "content": "\n\n".join(text for text in both if text)}
        yield MERGED_SYSTEM, [_with_content(merged, kind, document.where), *rest]


def _with_content(message: dict[str, Any], kind: type | None, where: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        text = _text_of(message, where)
        return {**message, "content": text} if kind is str else message
    if kind is list and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def _text_of(message: dict[str, Any], where: str) -> str:
    """Return the text of a message; its parts must be texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_KINDS or not isinstance(text, str):
            raise DataError(
                f"{where} has a part of type {kind!r}, which a tokenizer cannot read",
                hint="use messages of text, or a model with a processor",
            )
        texts.append(text)
    return "\n".join(texts)


def _with_arguments(message: dict[str, Any], kind: type) -> dict[str, Any]:
    """Write the arguments of tool calls as objects, or as JSON in a string, as OpenAI's format has them."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_converted(call, kind) for call in calls]} if isinstance(calls, list) else message


def _converted(call: Any, kind: type) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _converted(call["function"], kind)}
    arguments = call.get("arguments")
    if isinstance(arguments, dict) and kind is str:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) and kind is dict else None
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


def _plain_text(document: Document) -> str:
    """Write a conversation as text, for a tokenizer without a chat template."""
    given: Any = document.content
    lines = [f"Tools: {json.dumps(document.tools, default=str)}"] if document.tools else []
    for message in given:
        texts = [str(message["reasoning_content"])] if message.get("reasoning_content") else []
        texts += [text for text in [_text_of(message, document.where)] if text]
        texts += [json.dumps(call, default=str) for call in message.get("tool_calls") or ()]
        lines.append(f"{str(message.get('role', '')).capitalize()}: " + "\n".join(texts))
    return "\n\n".join(lines)
