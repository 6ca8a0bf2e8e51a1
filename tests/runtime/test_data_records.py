"""Kinds of records, and how conversations are written for the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.data.chats import MERGED_SYSTEM, NO_TEMPLATE, rendered
from runtime.data.documents import Document, as_document
from runtime.data.samples import load_tokens
from runtime.errors import DataError

Messages = list[dict[str, Any]]
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


def content(record: Any, *columns: str) -> Any:
    return as_document(record, "here", columns).content


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a text", "a text"),
        ({"text": "a", "messages": [USER]}, "a"),
        ({"text": None, "messages": [USER]}, [USER]),
        ({"messages": json.dumps([USER, REPLY])}, [USER, REPLY]),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"]}}, [USER, REPLY]),
        ({"messages": ({"role": "user", "content": "hi", "tool_calls": None},)}, [USER]),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, None),
        ({"conversations": TURNS}, [USER, REPLY]),
        ({"conversation": TURNS, "system": "be kind"}, [SYSTEM, USER, REPLY]),
        ({"conversations": [{"from": "system", "value": "be kind"}, *TURNS], "system": "x"}, [SYSTEM, USER, REPLY]),
        ({"conversations": [USER, REPLY]}, [USER, REPLY]),
        ({"instruction": "hi", "output": "yo"}, [USER, REPLY]),
        ({"instruction": "hi", "input": "", "output": "yo", "system": ""}, [USER, REPLY]),
        ({"instruction": "do", "input": "it", "output": ""}, [{"role": "user", "content": "do\n\nit"}]),
        ({"instruction": "do", "context": "it", "response": "yo"}, [{"role": "user", "content": "do\n\nit"}, REPLY]),
        (
            {"instruction": "hi", "output": "yo", "history": [["hi", "yo"]], "system": "be kind"},
            [SYSTEM, USER, REPLY, USER, REPLY],
        ),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"prompt": "a", "completion": "ab"}, "aab"),
        ({"prompt": "a", "chosen": "ab", "rejected": "ac"}, "ab"),
        ({"prompt": [USER], "completion": [REPLY]}, [USER, REPLY]),
        ({"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER]}, [USER, REPLY]),
        ({"prompt": [USER], "chosen": [REPLY]}, [USER, REPLY]),
        ({"chosen": [USER, REPLY]}, [USER, REPLY]),
        ({"chosen": "\n\nHuman: hi", "rejected": "x"}, "\n\nHuman: hi"),
        ({"prompt": "just this"}, "just this"),
        ({"prompt": "hi", "response": "yo"}, [USER, REPLY]),
        ({"question": "hi", "answer": "yo"}, [USER, REPLY]),
        ({"system_prompt": "be kind", "question": "hi", "response": "yo", "id": 3}, [SYSTEM, USER, REPLY]),
        ({"input": "hi", "output": "yo"}, [USER, REPLY]),
        ({"question": "hi", "answer": None}, [USER]),
        ({"text": None}, ""),
        ({"text": float("nan")}, ""),
        ({"messages": None, "n": 1}, ""),
    ],
)
def test_the_kinds_of_records(record: Any, expected: Any) -> None:
    found = content(record)
    if expected is None:
        expected = record["messages"]  # a null content beside tool calls stays
    assert found == expected


def test_calls_and_observations_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": "not JSON"},
    ]
    document = as_document({"conversations": turns, "tools": json.dumps([TOOL])}, "here")
    assert document.content == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "not JSON"},
    ]
    assert document.tools == [TOOL]
    assert as_document({"messages": [USER], "tools": [json.dumps(TOOL)]}, "here").tools == [TOOL]
    assert as_document({"messages": [USER], "tools": ""}, "here").tools is None


def test_parts_of_messages_keep_their_places() -> None:
    parts = [{"type": "image", "image": "cat.png", "text": None}, {"type": "text", "text": "what is it?"}]
    found = as_document({"messages": [{"role": "user", "content": parts}]}, "here")
    assert found.content == [{"role": "user", "content": [{"type": "image"}, parts[1]]}]
    assert [(medium.kind, medium.value) for medium in found.media] == [("image", "cat.png")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["body"], "b"),
        (["chat"], [USER]),
        (["prompt=ask", "completion=reply"], "hiyo"),
        (["question=ask", "answer=reply"], [{"role": "system", "content": "s"}, USER, REPLY]),
        (["a=b"], "odd name"),
        (["nested.de"], "ja"),
        (["empty"], ""),
    ],
)
def test_chosen_columns(columns: list[str], expected: Any) -> None:
    record = {"text": "not this", "body": "b", "chat": [USER], "ask": "hi", "reply": "yo", "system": "s"}
    assert content(record | {"a=b": "odd name", "empty": None, "nested": {"de": "ja"}}, *columns) == (
        [{"role": "system", "content": "s"}, USER] if columns == ["chat"] else expected
    )


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"body": "a"}, ["txt"], r"here has no column 'txt' \(its columns are \['body'\]\)"),
        ({"body": {"de": "a"}}, ["body.en"], r"here has no column 'body.en'"),
        ({"a": "a", "b": "b"}, ["a", "b"], "two columns are the text of here .*FIELD=NAME"),
        ({"body": "a"}, ["words=body"], "'words' is not a field .*text, messages"),
        ({"body": 3}, ["body"], "column 'body' of here is int, not a text or messages"),
        ({"question": "a", "answers": {"text": ["b"]}}, [], "here has neither text nor messages .*--column NAME"),
        ({"messages": "no JSON"}, [], "messages of here is a string that is not JSON"),
        ({"messages": [USER], "tools": 3}, [], "tools of here must be a list of objects"),
        ({"conversations": [{"from": 1, "value": "x"}]}, [], "a message of here is from 1"),
        ({"instruction": "a", "history": [["b"]]}, [], "history of here must be a list of pairs"),
        ({"instruction": "a", "history": 3}, [], "history of here must be a list of pairs"),
        ({"messages": [{**USER, "tool_calls": 3}]}, [], "tool_calls of here must be a list of objects"),
        ({"messages": [{"role": "user", "content": {"path": "x"}}]}, [], "content of a message of here is dict"),
        ({"instruction": 1}, [], "instruction of here must be a string, not int"),
        ({"question": "a", "answer": 3}, [], "answer of here must be a list of objects"),
    ],
)
def test_what_is_no_record(record: Any, columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        content(record, *columns)


def test_a_deeply_nested_record() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = {"content": deep}
    with pytest.raises(DataError, match="here is nested too deeply"):
        content({"messages": [{"role": "user", "content": [deep]}]})


# Templates.


@pytest.fixture
def templated(tmp_path: Path, byte_tokenizer_dir: Path) -> Any:
    """Load the test tokenizer with another chat template."""

    def load(template: str | None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer_dir)
        tokenizer.chat_template = template
        return tokenizer

    return load


STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls %}"
    "{{ c.function.arguments.items() | list }}{% endfor %}{% endfor %}"
)
STRING_CALLS = (
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ 'call:' + c.function.arguments }}{% endfor %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + STRINGS


def text_of(tokenizer: Any, messages: Messages, tools: Any = None) -> tuple[str, Counter[str]]:
    notes: Counter[str] = Counter()
    return rendered(tokenizer, Document("here", messages, tools=tools), notes), notes


def test_content_has_the_form_that_the_template_prints(templated: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "c"}]
    assert text_of(templated(STRINGS), messages)[0] == "[user]a\nb[user]c"
    assert text_of(templated(PARTS), messages)[0] == "[user]ab[user]c"


def test_media_without_a_processor(templated: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    for template in (STRINGS, PARTS, None):
        with pytest.raises(DataError, match="here has a part of type 'image', which a tokenizer cannot read"):
            text_of(templated(template), messages)


def test_arguments_of_calls_are_objects_where_the_template_takes_them(templated: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert text_of(templated(CALLS), messages)[0] == "[('x', 1)]"
    assert text_of(templated(STRING_CALLS), messages)[0] == 'call:{"x": 1}'
    no_content = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    strict = "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}" + STRING_CALLS.replace("m.content", "''")
    assert text_of(templated(strict), no_content)[0] == '[]call:{"x": 1}'


def test_tools_reach_the_template(templated: Any) -> None:
    template = "{% for t in tools %}{{ t.function.name }};{% endfor %}" + STRINGS
    assert text_of(templated(template), [USER], [TOOL])[0] == "f;[user]hi"


def test_a_rejected_system_message_becomes_the_users(templated: Any) -> None:
    assert text_of(templated(NO_SYSTEM), [SYSTEM, USER]) == ("[user]be kind\n\nhi", {MERGED_SYSTEM: 1})
    assert text_of(templated(STRINGS), [SYSTEM, USER]) == ("[system]be kind[user]hi", {})
    with pytest.raises(DataError, match="here does not fit the chat template: no system role"):
        text_of(templated(NO_SYSTEM), [SYSTEM])


def test_without_a_template_conversations_are_plain_text(templated: Any) -> None:
    messages = [SYSTEM, USER, REPLY | {"reasoning_content": "hm", "tool_calls": [{"name": "f"}]}]
    text = 'System: be kind\n\nUser: hi\n\nAssistant: hm\nyo\n{"name": "f"}'
    assert text_of(templated(None), messages) == (text, {NO_TEMPLATE: 1})
    assert text_of(templated(None), [USER], [TOOL])[0].startswith('Tools: [{"type": "function"')


def test_bos_is_never_doubled(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(byte_tokenizer_dir, directory)
    (directory / "chat_template.jinja").write_text("{{ bos_token }}" + STRINGS)
    path = tmp_path / "x.jsonl"
    records = [{"messages": [USER]}, {"text": "<bos>[user]hi"}, {"text": "[user]hi"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = load_tokens(path, tokenizer_dir=directory, pack=False).samples
    assert len({tuple(sample.tolist()) for sample in samples}) == 1
    assert samples[0].tolist().count(0) == 1
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "<bos>hi"}]}))
    assert load_tokens(path, tokenizer_dir=directory, pack=False).samples[0].tolist()[:2] == [0, 2 + ord("h")]
