"""Which tokens count in calibration: from conversations and token files to what modules have seen.

With the test tokenizer a byte b of the text is the token 2 + b, so what is expected can be counted by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import runtime
from runtime.data.samples import batches, load_tokens
from runtime.data.token_file import DataOrigin, save_tokens
from seqbuild.ship.tokens import tokenize_files
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import read_tensors

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }};"
    "{% endgeneration %}{% else %}{{ message.content }}:{% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LONG = [*CHAT, {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]


def ids(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


@pytest.fixture
def marking(tmp_path: Path, byte_tokenizer_dir: Path) -> Path:
    """The test tokenizer with a template that marks what the assistant says."""
    directory = Path(shutil.copytree(byte_tokenizer_dir, tmp_path / "marking"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in ({"messages": CHAT}, {"messages": LONG})))
    return path


def lists(tensors: tuple[torch.Tensor, ...] | None) -> list[list[int]]:
    assert tensors is not None
    return [tensor.to(torch.int64).tolist() for tensor in tensors]


def test_what_the_assistant_says_counts(marking: Path, chats: Path) -> None:
    found = load_tokens(chats, tokenizer_dir=marking, pack=False, loss_mask=True)
    assert lists(found.samples) == [ids("hi:yo;"), ids("hi:yo;why:because;")]
    assert lists(found.masks) == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, *[1] * 8]]


def test_masks_are_cut_with_their_tokens(marking: Path, chats: Path) -> None:
    cut = load_tokens(chats, tokenizer_dir=marking, pack=False, seq_len=5, loss_mask=True)
    assert lists(cut.samples) == [ids("hi:yo")] * 2
    assert lists(cut.masks) == [[0, 0, 0, 1, 1]] * 2
    packed = load_tokens(chats, tokenizer_dir=marking, seq_len=8, loss_mask=True)
    assert lists(packed.samples) == [ids("hi:yo;hi"), ids(":yo;why:"), ids("because;")]
    assert lists(packed.masks) == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0], [1] * 8]


def test_texts_count_whole(marking: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "ab"}) + "\n")
    assert lists(load_tokens(path, tokenizer_dir=marking, pack=False, loss_mask=True).masks) == [[1, 1, 1]]
    assert load_tokens(path, tokenizer_dir=marking, pack=False).masks is None


def test_a_template_without_marks_is_refused(byte_tokenizer_dir: Path, chats: Path) -> None:
    with pytest.raises(runtime.DataError, match=r"not mark the text of the assistant \(enclose it in {% generation %}"):
        load_tokens(chats, tokenizer_dir=byte_tokenizer_dir, pack=False, loss_mask=True)


@pytest.mark.parametrize(("seq_len", "pack"), [(2, False), (None, False)])
def test_a_mask_that_leaves_no_token_is_rejected(
    marking: Path, tmp_path: Path, seq_len: int | None, pack: bool
) -> None:
    """Cut before the assistant says anything, or without an assistant at all."""
    path, out = tmp_path / "chats.jsonl", tmp_path / "calib.safetensors"
    path.write_text(json.dumps({"messages": CHAT if seq_len else CHAT[:1]}) + "\n")
    with pytest.raises(runtime.DataError, match=r"the loss mask excludes all tokens of .*chats\.jsonl"):
        tokenize_files(marking, [path], num_samples=None, seq_len=seq_len, pack=pack, out=out, loss_mask=True)
    assert not out.exists()


def test_token_files_keep_masks(marking: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "calib.safetensors"
    tokenize_files(marking, [chats], num_samples=None, seq_len=None, pack=False, out=out, loss_mask=True)
    with safe_open(out, "pt") as file:
        assert file.get_tensor("loss_mask").tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, *[1] * 8]
        assert json.loads(file.metadata()["seqbuild_tokens"])["version"] == "1.1"
    found = load_tokens(out, seq_len=4, num_samples=1)
    assert (lists(found.samples), lists(found.masks)) == ([ids("hi:y")], [[0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.ones(3, dtype=torch.uint8), "its loss_mask has 3 numbers for 4 tokens"),
        (torch.tensor([0, 1, 2, 1]), "its loss_mask has other numbers than 0 and 1"),
        (torch.ones(4), "loss_mask is torch.float32 of shape"),
    ],
)
def test_broken_masks_are_refused(tmp_path: Path, mask: torch.Tensor, why: str) -> None:
    path = tmp_path / "x.safetensors"
    origin = DataOrigin(tokenizer="", tokenizer_digest="", vocab_size=9, sources=())
    save_tokens(path, [torch.tensor([1, 2, 3, 4])], seq_len=4, origin=origin, masks=[torch.ones(4)])
    from safetensors.torch import load, save

    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    path.write_bytes(save(load(content) | {"loss_mask": mask}, metadata=metadata))
    with pytest.raises(runtime.DataError, match=why):
        load_tokens(path)


def test_batches_of_unequal_length_keep_masks_with_their_samples() -> None:
    samples = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7])]
    masks = [torch.tensor([True, False]), torch.tensor([False, True, True]), torch.tensor([False, False])]
    first, second = batches(samples, 4, masks)
    assert (first["input_ids"].tolist(), first["loss_mask"].tolist()) == ([[3, 4, 5]], [[0, 1, 1]])
    assert (second["input_ids"].tolist(), second["loss_mask"].tolist()) == ([[1, 2], [6, 7]], [[1, 0], [0, 0]])


def masked_file(path: Path, last: int) -> Path:
    """Samples of 30 and 20 tokens whose last 5 are all `last`, and do not count."""
    generator = torch.Generator().manual_seed(4)
    samples = [torch.randint(2, 250, (length,), generator=generator) for length in (30, 20, 30, 30)]
    masks = [torch.ones(len(sample), dtype=torch.bool) for sample in samples]
    for sample, mask in zip(samples, masks, strict=True):
        sample[-5:], mask[-5:] = last, False
    origin = DataOrigin(tokenizer="bytes", tokenizer_digest="", vocab_size=258, sources=())
    save_tokens(path, samples, seq_len=30, origin=origin, masks=masks)
    return path


@pytest.mark.parametrize("before", ["", "AWQModifier: {}\n", "SmoothQuantModifier: {}\n"])
def test_a_calibration_does_not_see_what_is_masked(place: Place, run: Run, tmp_path: Path, before: str) -> None:
    """Causal attention: what comes last reaches no token that counts, so it cannot change a byte."""
    place.recipe.write_text(before + place.recipe.read_text())
    found = []
    for last in (7, 99):
        place.data = masked_file(tmp_path / f"{last}.safetensors", last)
        place.out = tmp_path / f"out {last}"
        code, said, _ = run(place.calibrate("--json", "--device", "cpu"))
        assert code == 0
        assert {module["num_tokens"] for module in json.loads(said)["modules"]} == {25 + 15 + 25 + 25}
        found.append(read_tensors(place.out))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_conversations_can_be_calibrated_with(place: Place, run: Run, marking: Path, chats: Path) -> None:
    place.data = chats
    options = ["--tokenizer", str(marking), "--no-pack", "--device", "cpu", "--json"]
    code, said, _ = run(place.calibrate(*options, "--loss-mask"))
    assert code == 0
    assert {module["num_tokens"] for module in json.loads(said)["modules"]} == {3 + 11}


def test_a_token_file_without_a_mask_is_refused_where_one_is_asked_for(place: Place, run: Run) -> None:
    assert_refused(run(place.calibrate("--loss-mask")), "has no loss mask (make it again with `seqbuild data")


def test_perplexity_is_of_all_tokens(place: Place, run: Run, tmp_path: Path) -> None:
    place.data = masked_file(tmp_path / "7.safetensors", 7)
    code, said, _ = run(place.evaluate("--json", "--device", "cpu"))
    assert code == 0
    assert json.loads(said)["tokens"] == 29 + 19 + 29 + 29
