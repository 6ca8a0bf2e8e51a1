"""The kinds of records that become documents, and what is read from each.

The first kind whose fields are present decides; a field that is null counts as missing.

    text                                    a text
    messages                                a conversation: role and content, `tool_calls`, `reasoning_content` ...
    conversations, conversation             a conversation of ShareGPT: from and value
    source (or input), target               a pair for an encoder-decoder model
    instruction, input, output              Alpaca: a user's message (instruction, blank line, input) and the answer
    prompt with completion or chosen        the text of both joined, or a conversation if they are lists of messages
    prompt with response or answer          a user's message and the answer; the same for
    question, query, problem or input with answer, response, solution, output or chosen
    chosen                                  a text or a conversation
    prompt                                  a text or a conversation

Conversations may have `tools`, and `system` (or `system_prompt`) unless their first message is a system message;
Alpaca records may have `history`, the pairs of earlier messages. Lists may be JSON in a string, as tables have them. A
null in a message or tool is the same as no field (tables fill in fields that other rows have), except `content`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from runtime.data.media import MEDIA_FIELDS
from runtime.errors import DataError

Messages: TypeAlias = "list[dict[str, Any]]"
Content: TypeAlias = "str | Messages"
Parts: TypeAlias = "tuple[Content, str | None, list[Any] | None]"  # content, target, tools

TEXT_KINDS = ("text", "input_text", "output_text")  # types of parts of messages
_SOURCES = ("source", "input")
_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("question", "query", "problem", "prompt", "input")
_ANSWERS = ("answer", "response", "solution", "output", "chosen")
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_BESIDES = ("tools", *_SYSTEMS, "history")
FIELDS = tuple(
    dict.fromkeys(
        ("text", *_CHATS, *_SOURCES, "target", "instruction", "completion", *_INPUTS, *_QUESTIONS, *_ANSWERS, *_BESIDES)
    )
)
_STARTS = ("text", *_CHATS, "target", "instruction", *_QUESTIONS, "chosen")  # a record of each kind has one of these
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response", "function"), "tool"),
}
_MESSAGES_HINT = 'each message looks like {"role": "user", "content": "..."}'


def content_of(record: Mapping[str, Any], where: str) -> Parts:
    """Return what the chat template or the tokenizer reads of a record; a blank text if its fields are null.

    Raises:
        DataError: the record is of no known kind, or a value is invalid.
    """
    known = {name: record[name] for name in FIELDS if name in record and not _is_null(record[name])}
    if "text" in known:
        return _string(known, "text", where), None, None
    for name in _CHATS:
        if name in known:
            return _conversation(known, messages_of(known[name], name, where), where)
    source = next((name for name in _SOURCES if name in known), None)
    if "target" in known:
        return _pair(known, source, where)
    if "instruction" in known:
        return _conversation(known, _alpaca(known, where), where)
    if "prompt" in known and ("completion" in known or "chosen" in known):
        return _continued(known, where)
    question = next((name for name in _QUESTIONS if name in known), None)
    answer = next((name for name in _ANSWERS if name in known), None)
    if question is not None and answer is not None:
        return _conversation(known, _turn(known, question, answer, where), where)
    alone = next((name for name in ("chosen", "prompt") if name in known), None)
    if alone is not None:
        return _text_or_chat(known, alone, where)
    if isinstance(known.get(question or ""), str) and any(name in record for name in _ANSWERS):
        return _conversation(known, [{"role": "user", "content": known[str(question)]}], where)  # without an answer
    if any(name in record for name in _STARTS) and not any(name in known for name in _STARTS):
        return "", None, None
    if any(not _is_null(record.get(name)) for name in MEDIA_FIELDS):
        return "", None, None
    raise DataError(
        f"{where} has neither text nor messages",
        hint=f"its fields are {list(record)}; choose one with --column NAME",
    )


def chosen_columns(names: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    """Return the columns of a table that its records need.

    Args:
        names: all columns of the table.
        columns: those that the user chose, as for `with_columns`.
        where: the table, for messages.

    Raises:
        DataError: a column does not exist, or none is known.
    """
    wanted = [column if column in names else column.partition("=")[2] or column for column in columns]
    wanted = [name if name in names else name.partition(".")[0] for name in wanted]
    for column in wanted:
        if column not in names:
            raise DataError(f"{where} has no column {column!r}", hint=f"its columns are {list(names)}")
    chosen = [name for name in names if name in wanted or name in FIELDS or name in MEDIA_FIELDS]
    if not chosen:
        hint = f"its columns are {list(names)}; choose one with --column NAME"
        raise DataError(f"{where} has no column text or messages", hint=hint)
    return chosen


def with_columns(record: Mapping[str, Any], where: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return the fields that the user chose, under the names that `content_of` knows.

    Args:
        record: fields by name.
        where: its place, for messages.
        columns: `NAME` or `FIELD=NAME`; a name with dots is a path into nested fields.

    Raises:
        DataError: the record has no such field, its value is neither a text nor a list, or two are the same field.
    """
    found = {name: record[name] for name in _BESIDES if name in record}
    for column in columns:
        field, equals, name = column.partition("=")
        if column in record or not equals:
            field, name = "", column
        elif field not in (*FIELDS, *MEDIA_FIELDS):
            raise DataError(f"--column {column}: {field!r} is not a field", hint=f"fields are {', '.join(FIELDS)}")
        value = _value_at(record, name, where)
        if not field:
            field = "text" if _is_null(value) or isinstance(value, str) else "messages"
            if field == "messages" and not isinstance(_plain(value), (list, Mapping)):
                raise DataError(f"column {name!r} of {where} is {type(value).__name__}, not a text or messages")
        if field in found and field not in _BESIDES:
            raise DataError(f"two columns are the {field} of {where}", hint="write --column FIELD=NAME for each")
        found[field] = value
    return found


def _value_at(record: Mapping[str, Any], name: str, where: str) -> Any:
    value: Any = record
    for key in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise DataError(f"{where} has no column {name!r}", hint=f"its columns are {list(record)}")
        value = value[key]
    return value


def messages_of(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation, each with a role.

    Args:
        value: a list of messages, of OpenAI's or ShareGPT's form; or that as JSON.
        name: its field, for messages.
        where: its place, for messages.

    Raises:
        DataError: it is not a list of messages.
    """
    messages = _plain(_parsed(value, name, where))
    if isinstance(messages, Mapping):  # some tables store a list of objects as an object of lists
        rows = [_plain(column) for column in messages.values()]
        if rows and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            messages = [dict(zip(messages, row, strict=True)) for row in zip(*rows, strict=True)]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        raise DataError(f"{name} of {where} must be a list of objects", hint=_MESSAGES_HINT)
    return [_message(_without_nulls(message), where) for message in messages]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("tool_calls", []), list):
        message = {**message, "tool_calls": _objects(message["tool_calls"], "tool_calls", where) or []}
    content = message.get("content")
    if not isinstance(content, (str, list)) and not _is_null(content):
        raise DataError(f"the content of a message of {where} is {type(content).__name__}", hint=_MESSAGES_HINT)
    if "role" in message or "from" not in message:
        return message
    role, value = message.pop("from"), message.pop("value", "")
    if role == "function_call":
        calls = _calls(value)
        if calls is not None:
            return {"role": "assistant", "content": "", "tool_calls": calls, **message}
    if not isinstance(role, str):
        raise DataError(f"a message of {where} is from {role!r}", hint="roles are strings, such as human and gpt")
    return {"role": _ROLES.get(role.lower(), role), "content": value, **message}


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """Return the calls that a message of ShareGPT has as JSON; None if it is not JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def _conversation(known: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> Parts:
    """Add the system message and the tools of a record."""
    system = next((known[name] for name in _SYSTEMS if name in known), None)
    if isinstance(system, str) and system.strip() and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages, None, _objects(known.get("tools"), "tools", where)


def _objects(value: Any, name: str, where: str) -> list[Any] | None:
    """Return the list of tools, or of their calls; None for none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = _plain(_parsed(value, name, where))
    found = [found] if isinstance(found, Mapping) else found
    if isinstance(found, list):
        found = [_without_nulls(_parsed(item, name, where)) for item in found]
        if all(isinstance(item, dict) for item in found):
            return found or None
    raise DataError(f"{name} of {where} must be a list of objects", hint="each describes one function")


def _alpaca(known: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = []
    history = _plain(known.get("history") or [])
    for turn in history if isinstance(history, list) else [history]:
        pair = _plain(turn)
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history of {where} must be a list of pairs of strings", hint='[["...", "..."]]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parts = [_string(known, "instruction", where)]
    parts += [_string(known, name, where) for name in _INPUTS if name in known]
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    answer = next((name for name in ("output", "response", "answer", "completion") if name in known), None)
    if answer is not None and (text := _string(known, answer, where)).strip():
        messages.append({"role": "assistant", "content": text})
    return messages


def _turn(known: Mapping[str, Any], question: str, answer: str, where: str) -> list[dict[str, Any]]:
    """Return the messages of a question and an answer; the answer may be the whole conversation."""
    if not isinstance(known[question], str):
        before = messages_of(known[question], question, where)
    else:
        before = [{"role": "user", "content": known[question]}]
    if not isinstance(known[answer], str):
        return _joined(before, messages_of(known[answer], answer, where))
    return [*before, {"role": "assistant", "content": known[answer]}]


def _continued(known: Mapping[str, Any], where: str) -> Parts:
    """Return a prompt and its continuation: text if both are, otherwise a conversation."""
    name = "completion" if "completion" in known else "chosen"
    prompt, rest = known["prompt"], known[name]
    if isinstance(prompt, str) and isinstance(rest, str):
        is_whole = name == "chosen" and prompt and rest.startswith(prompt)
        return (rest if is_whole else prompt + rest), None, None
    return _conversation(known, _turn(known, "prompt", name, where), where)


def _joined(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join messages; those after may repeat those before."""
    return after if after[: len(before)] == before else [*before, *after]


def _text_or_chat(known: Mapping[str, Any], name: str, where: str) -> Parts:
    if isinstance(known[name], str):
        return known[name], None, None
    return _conversation(known, messages_of(known[name], name, where), where)


def _pair(known: Mapping[str, Any], source: str | None, where: str) -> Parts:
    texts = []
    for label, text in (("source", known.get(source or "")), ("target", known["target"])):
        if not isinstance(text, str):
            raise DataError(
                f"{label} of {where} must be a string, not {type(text).__name__}",
                hint='a pair looks like {"source": "...", "target": "..."}',
            )
        texts.append(text)
    return texts[0], texts[1], None


def _string(known: Mapping[str, Any], name: str, where: str) -> str:
    value = known[name]
    if not isinstance(value, str):
        raise DataError(f"{name} of {where} must be a string, not {type(value).__name__}")
    return value


def _parsed(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} of {where} is a string that is not JSON: {error}", hint=_MESSAGES_HINT) from error


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # pandas writes a missing text as NaN


def _plain(value: Any) -> Any:
    """Convert an array or tuple to a list; return other values unchanged."""
    if isinstance(value, tuple):
        return list(value)
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _without_nulls(item) for name, item in value.items() if not (_is_null(item) and name != "content")
        }
    if getattr(getattr(value, "dtype", None), "kind", None) == "O":  # other arrays may be images
        value = _plain(value)
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value
