"""Pairs of source and target, from a text file to a checkpoint: what an encoder-decoder model reads and writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runtime
import seqbuild.cli.app
from runtime.data.decoder import NOT_A_LABEL
from runtime.data.inputs import model_inputs
from runtime.data.masks import require_tokens, token_mask
from runtime.data.samples import batches, load_tokens, save_tokens
from runtime.data.token_file import DataOrigin
from runtime.errors import DataError
from tests.runtime.place import Run, assert_refused
from tests.runtime.small import NARROW_W4, Small, read_tensors, recipe

BOS = 0
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
PAIRS = (("abc", "xy"), ("defgh", "z"), ("ijk", "vw"), ("lm", "stu"))


@pytest.fixture(scope="module")
def bart(small: Callable[..., Small]) -> Small:
    return small("BartForConditionalGeneration", "BartConfig", BART)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    names = ("source", "input", "source", "source")
    records = [{name: source, "target": target} for name, (source, target) in zip(names, PAIRS, strict=True)]
    return jsonl(tmp_path / "pairs.jsonl", *records, {"source": " ", "target": "blank"})


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids(text: str) -> list[int]:
    return [BOS, *(2 + byte for byte in text.encode())]


def lists(tensors: Any) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def loaded(small: Small) -> Any:
    return transformers.BartForConditionalGeneration.from_pretrained(small.weights).eval()


# Files.


def test_a_pair_is_a_sample_and_its_target(pairs: Path, byte_tokenizer_dir: Path) -> None:
    for pack in (True, False):  # pairs are never joined
        found = load_tokens(pairs, tokenizer_dir=byte_tokenizer_dir, seq_len=16, pack=pack)
        assert lists(found.samples) == [ids(source) for source, _ in PAIRS]
        assert lists(found.targets) == [ids(target) for _, target in PAIRS]
    cut = load_tokens(pairs, tokenizer_dir=byte_tokenizer_dir, seq_len=2, num_samples=2)
    assert (lists(cut.samples), lists(cut.targets)) == ([ids("a"), ids("i")], [ids("x"), ids("v")])


def test_a_target_is_tokenized_as_targets_are(tmp_path: Path, pairs: Path, byte_tokenizer_dir: Path) -> None:
    from transformers import MBart50Tokenizer, PreTrainedTokenizerFast

    assert PreTrainedTokenizerFast.from_pretrained(byte_tokenizer_dir)(text_target="xy")["input_ids"] == ids("xy")
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    vocabulary += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    own = MBart50Tokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")
    own.save_pretrained(tmp_path / "own")
    found = load_tokens(pairs, tokenizer_dir=tmp_path / "own", seq_len=16)
    assert {sample[0].item() for sample in found.samples} == {own.convert_tokens_to_ids("en_XX")}
    assert {target[0].item() for target in found.targets or ()} == {own.convert_tokens_to_ids("de_DE")}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"source": "a", "target": "b"}, {"text": "c"}], "line 2 of .* has no target, but other records have one"),
        ([{"source": 3, "target": "b"}], "source of line 1 of .* must be a string, not int"),
        ([{"source": "a", "target": ["b"]}], "target of line 1 of .* must be a string, not list"),
        ([{"target": "b"}], "source of line 1 of .* must be a string, not NoneType"),
        ([{"source": "a"}], "line 1 of .* has neither text nor messages"),
    ],
)
def test_what_is_no_pair(tmp_path: Path, byte_tokenizer_dir: Path, records: list[Any], message: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", *records)
    with pytest.raises(DataError, match=message):
        load_tokens(path, tokenizer_dir=byte_tokenizer_dir, seq_len=8)


def test_parquet_holds_pairs(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"input": ["ab"], "target": ["c"]}), tmp_path / "x.parquet")
    found = load_tokens(tmp_path / "x.parquet", tokenizer_dir=byte_tokenizer_dir, seq_len=8)
    assert (lists(found.samples), lists(found.targets)) == ([ids("ab")], [ids("c")])


def test_a_token_file_keeps_pairs(tmp_path: Path, pairs: Path, byte_tokenizer_dir: Path, run: Run) -> None:
    out = tmp_path / "pairs.safetensors"
    command = ["data", str(byte_tokenizer_dir), str(pairs), "-o", str(out), "--seq-len", "16"]
    code, said, _ = run(command, seqbuild.cli.app.main)
    facts = "4 samples, 17 tokens, and 12 target tokens; lengths 3 to 6, median 4; 1 blank record skipped"
    assert (code, said.strip()) == (0, f"{out}: {facts}")
    first = out.read_bytes()
    assert b'\\"version\\":\\"1.2\\"' in first
    found = load_tokens(out, num_samples=2, seq_len=3)
    assert lists(found.samples) == [ids("ab"), ids("ij")]
    assert lists(found.targets) == [ids("xy"), ids("vw")]
    assert_refused(run(command, seqbuild.cli.app.main), "already exists (pass --force", program="seqbuild")
    run([*command, "--force"], seqbuild.cli.app.main)
    assert out.read_bytes() == first
    refused = run([*command, "--loss-mask", "--force"], seqbuild.cli.app.main)
    assert_refused(refused, "pairs of source and target have no loss mask", program="seqbuild")
    with pytest.raises(DataError, match="token id 124, but the model's vocabulary has 123 entries"):
        load_tokens(out, vocab_size=123)  # "y"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_offsets": torch.tensor([0, 2])}, "has 1 targets for 2 samples"),
        ({"target_offsets": torch.tensor([0, 0, 2])}, "its target_offsets do not increase from 0 to the 2 tokens"),
        ({"targets": torch.tensor([1, 9])}, "token id 9 is outside its vocabulary of 9"),
        ({"target_offsets": None}, "it has no tensor target_offsets"),
    ],
)
def test_broken_targets(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from safetensors.torch import load, save

    path = tmp_path / "x.safetensors"
    origin = DataOrigin(tokenizer="", tokenizer_digest="", vocab_size=9, sources=())
    save_tokens(path, [torch.tensor([1]), torch.tensor([2])], seq_len=4, origin=origin, targets=[torch.tensor([3])] * 2)
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = load(content) | changes
    path.write_bytes(save({name: value for name, value in tensors.items() if value is not None}, metadata=metadata))
    with pytest.raises(DataError, match=message):
        load_tokens(path)


def test_batches_of_pairs_have_no_padding() -> None:
    samples = [torch.tensor(sample) for sample in ([1, 2], [3, 4], [5, 6], [7])]
    targets = [torch.tensor(target) for target in ([1], [2, 2], [3], [4])]
    found = batches(samples, 8, targets=targets)
    assert [(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in found] == [
        ([[3, 4]], [[2, 2]]),
        ([[1, 2], [5, 6]], [[1], [3]]),
        ([[7]], [[4]]),
    ]


# Perplexity.


def test_perplexity_of_targets(bart: Small, pairs: Path, run: Run, tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    model, losses = loaded(bart), []
    for source, target in PAIRS:
        labels = torch.tensor([ids(target)])
        with torch.no_grad():
            losses.append(model(input_ids=torch.tensor([ids(source)]), labels=labels).loss.item() * labels.numel())
    command = ["evaluate", str(bart.artifact), "--weights", str(bart.weights), "--device", "cpu", "--json"]
    code, said, _ = run([*command, "--data", str(pairs)])
    assert code == 0
    found = json.loads(said)
    assert found["tokens"] == 12
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 12), rel=1e-5)
    tokens = tmp_path / "pairs.safetensors"
    run(["data", str(byte_tokenizer_dir), str(pairs), "-o", str(tokens)], seqbuild.cli.app.main)
    again = json.loads(run([*command, "--data", str(tokens)])[1])
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-12)


def test_perplexity_of_a_text_that_is_its_own_target(bart: Small, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "x.txt"
    data.write_text("the whole text is to be written again")
    labels = torch.tensor([ids(data.read_text())])
    with torch.no_grad():
        wanted = loaded(bart)(input_ids=labels, labels=labels).loss.exp().item()
    command = ["evaluate", str(bart.artifact), "--weights", str(bart.weights), "--device", "cpu", "--json", "--no-pack"]
    code, said, _ = run([*command, "--data", str(data)])
    assert code == 0
    assert json.loads(said)["perplexity"] == pytest.approx(wanted, rel=1e-5)


def test_pairs_for_a_model_without_a_decoder(llama: Small, pairs: Path, run: Run) -> None:
    command = ["evaluate", str(llama.artifact), "--weights", str(llama.weights), "--data", str(pairs)]
    assert_refused(run(command), "pairs of source and target, but LlamaForCausalLM is not an encoder-decoder model")


def test_a_target_that_is_too_long(bart: Small, tmp_path: Path, run: Run) -> None:
    data = jsonl(tmp_path / "x.jsonl", {"source": "a", "target": "b" * 99})
    command = ["evaluate", str(bart.artifact), "--weights", str(bart.weights), "--data", str(data), "--seq-len", "99"]
    assert_refused(run(command), "a sample has 99 tokens, but the model's config allows 64")


@pytest.mark.parametrize("layers", [(3, 1), (1, 2)])
def test_encoder_and_decoder_of_different_depth(small: Callable[..., Small], layers: tuple[int, int]) -> None:
    sizes = {"d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "vocab_size": 258, "decoder_start_token_id": 0}
    depths = {"num_layers": layers[0], "num_decoder_layers": layers[1]}
    t5 = small("T5ForConditionalGeneration", "T5Config", sizes | depths)
    ids_BS, labels_BT = torch.arange(24).reshape(2, 12), torch.arange(14).reshape(2, 7)  # token 0 is a token
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5.weights).eval()
    with torch.no_grad():
        wanted = model(input_ids=ids_BS, labels=labels_BT).loss.exp().item()
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BT}
    found = runtime.evaluate(t5.load(), weights=t5.weights, batches=[batch])
    assert (found.perplexity, found.num_tokens) == (pytest.approx(wanted, rel=1e-5), 14)


# Calibration.

_STATIC = "{num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}"
_FP8 = (
    "config_groups: {a: {targets: ['re:.*decoder.layers.0.*'], weights: {num_bits: 8, type: float, strategy: tensor},"
    f" input_activations: {_STATIC}}}}}"
)


def observed(model: Any, name: str, counts: Callable[[torch.Tensor], torch.Tensor], **inputs: torch.Tensor) -> float:
    """The largest magnitude that a module of the plain call sees, over the tokens that count."""
    found: list[float] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(counts(args[0]).abs().max().item()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return max(found)


def test_the_decoder_sees_what_a_plain_call_gives_it(bart: Small, tmp_path: Path) -> None:
    """Static scales of the decoder's first layer: what its embeddings give for the labels, moved to the right."""
    generator = torch.Generator().manual_seed(5)
    ids_BS, labels_BT = (torch.randint(2, 258, size, generator=generator) for size in ((3, 9), (3, 6)))
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BT}
    done = runtime.calibrate(
        bart.load(), weights=bart.weights, recipe=recipe(_FP8), batches=[batch], out=tmp_path / "out"
    )
    assert {module.name for module in done.modules} == {
        f"model.decoder.layers.0.{part}"
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkv"),
            *(f"encoder_attn.{name}_proj" for name in "qkv"),
            *("self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"),
        )
    }
    scales = read_tensors(tmp_path / "out")
    for name in ("self_attn.q_proj", "encoder_attn.k_proj"):  # what comes later is behind rounded modules
        path = f"model.decoder.layers.0.{name}"
        wanted = observed(loaded(bart), path, lambda inputs: inputs, input_ids=ids_BS, labels=labels_BT) / 448
        assert scales[f"{path}.input_scale"].item() == pytest.approx(wanted, rel=1e-5), name


def test_padding_counts_neither_in_the_encoder_nor_in_the_decoder(bart: Small, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    ids_BS, labels_BT = (torch.randint(2, 258, size, generator=generator) for size in ((3, 9), (3, 6)))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, -4:], labels_BT[1, -3:] = 0, NOT_A_LABEL
    batch = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BT}
    done = runtime.calibrate(
        bart.load(), weights=bart.weights, recipe=recipe(_FP8), batches=[batch], out=tmp_path / "out"
    )
    num_tokens = {module.name.rpartition("layers.0.")[2]: module.num_tokens for module in done.modules}
    assert num_tokens["self_attn.q_proj"] == num_tokens["fc1"] == 3 * 6 - 3
    assert num_tokens["encoder_attn.k_proj"] == num_tokens["encoder_attn.v_proj"] == 3 * 9 - 4
    scales, plain = read_tensors(tmp_path / "out"), {"input_ids": ids_BS, "attention_mask": mask_BS}
    for name, counts in (("self_attn.q_proj", labels_BT != NOT_A_LABEL), ("encoder_attn.k_proj", mask_BS != 0)):
        path = f"model.decoder.layers.0.{name}"
        seen = observed(loaded(bart), path, lambda inputs, counts=counts: inputs[counts], **plain, labels=labels_BT)
        assert scales[f"{path}.input_scale"].item() == pytest.approx(seen / 448, rel=1e-5)


def test_masks_of_equal_shape_that_differ_cannot_be_told_apart() -> None:
    ids_BS = torch.ones(2, 4, dtype=torch.int64)
    labels = ids_BS.masked_fill(torch.tensor([[False] * 3 + [True], [False] * 4]), NOT_A_LABEL)
    batch = {"input_ids": ids_BS, "decoder_input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    require_tokens([batch | {"labels": ids_BS}])
    assert token_mask(batch | {"labels": ids_BS}) is None
    with pytest.raises(DataError, match="batch 0 has as many labels as input_ids, but other padding"):
        require_tokens([batch | {"labels": labels}])
    require_tokens([batch | {"labels": labels, "attention_mask": (labels != NOT_A_LABEL).long()}])
    require_tokens([{"input_ids": ids_BS, "labels": labels}])  # of a causal model, which looks at none


def test_a_batch_of_pairs_can_be_halved(bart: Small, pairs: Path, tmp_path: Path) -> None:
    from runtime.data.batches import split_batches

    manifest = bart.load().manifest
    labels = torch.arange(8).reshape(4, 2)
    batch = model_inputs(
        manifest, {"input_ids": labels + 9, "attention_mask": torch.ones_like(labels), "labels": labels}
    )
    parts = split_batches(manifest, [batch], 2)
    assert parts is not None
    assert [part["labels"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [part["decoder_input_ids"][:, 1].tolist() for part in parts] == [[0, 2], [4, 6]]


def test_gptq_from_the_command_line(bart: Small, pairs: Path, run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "recipe.yaml"
    plan.write_text(f"GPTQModifier: {{{NARROW_W4}}}\n")
    command = ["calibrate", bart.artifact, "--weights", bart.weights, "--data", pairs, "--recipe", plan]
    code, said, _ = run([str(part) for part in (*command, "-o", tmp_path / "out", "--device", "cpu", "--json")])
    assert code == 0
    counts = {module["name"]: module["num_tokens"] for module in json.loads(said)["modules"]}
    assert counts["model.encoder.layers.0.fc1"] == counts["model.decoder.layers.1.encoder_attn.v_proj"] == 17
    assert counts["model.decoder.layers.0.fc1"] == counts["model.decoder.layers.1.self_attn.q_proj"] == 12
