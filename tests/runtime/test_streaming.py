"""Weights come in once, tensors go out once, and modifiers do what they say."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import runtime
import runtime.calibration
import seqbuild.build
from runtime.chain import LoadedSubgraph
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.checkpoint.writer import ShardWriter
from runtime.host.event_log import EventLog
from runtime.streaming.run import StreamingRun
from runtime.streaming.schedule import Step
from runtime.streaming.work import Work
from runtime.weights.parameters import Weights
from runtime.weights.stream import WeightStream
from tests.runtime.small import (
    NARROW,
    NARROW_W4,
    RECIPES,
    Small,
    calibrate,
    directory_bytes,
    load_transformers,
    raw_bytes,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    save_model,
    stop_at,
    token_batches,
)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """How often each tensor is read from the checkpoint, and written to the new one."""
    reads: Counter[str] = Counter()
    writes: Counter[str] = Counter()
    real_read, real_write = Checkpoint._read_into, ShardWriter.write_bytes

    def read_into(self: Checkpoint, place: Any, memory: memoryview) -> None:
        reads[place.stored.name] += 1
        real_read(self, place, memory)

    def write_bytes(self: ShardWriter, name: str, pieces: Iterable[memoryview]) -> int:
        writes[name] += 1
        return real_write(self, name, pieces)

    monkeypatch.setattr(Checkpoint, "_read_into", read_into)
    monkeypatch.setattr(ShardWriter, "write_bytes", write_bytes)
    return reads, writes


@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
@pytest.mark.parametrize("name", ["sharded_llama", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_tensor_is_read_once_and_written_once(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    touched: tuple[Counter[str], Counter[str]],
    name: str,
    modifier: str,
    dtype: torch.dtype | None,
) -> None:
    small: Small = request.getfixturevalue(name)
    scheme = RECIPES["W4A16"] if name == "sharded_llama" else NARROW_W4
    calibrate(small, recipe(scheme, modifier=modifier), tmp_path / "out", dtype=dtype)
    reads, writes = touched
    assert reads == dict.fromkeys(read_tensors(small.weights), 1)
    assert writes == dict.fromkeys(read_tensors(tmp_path / "out"), 1)


def test_weights_that_layers_share_are_read_once(tmp_path: Path, touched: tuple[Counter[str], Counter[str]]) -> None:
    sizes = {key: NARROW[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    config = transformers.AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3)
    weights = save_model(transformers.AlbertModel(config).eval(), tmp_path / "model")
    small = Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path).path)
    batch = token_batches([(2, 20)])[0]
    known = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    inputs = {entry.name: known[entry.name] for entry in small.load().manifest.inputs}
    plan = recipe(NARROW_W4.replace("Linear", "'re:.*ffn$'"), modifier="GPTQModifier")
    calibrate(small, plan, tmp_path / "out", batches=[inputs])
    assert max(touched[0].values()) == 1


def test_changed_weights_are_kept_for_later_subgraphs(
    tmp_path: Path, touched: tuple[Counter[str], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the attention of layers that share weights, the second subgraph has a part of the first one's."""
    sizes = {key: NARROW[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    config = transformers.AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3)
    weights = save_model(transformers.AlbertModel(config).eval(), tmp_path / "model")
    artifact = seqbuild.build.build(weights, out=tmp_path, targets=["AlbertAttention"]).path
    small = Small(weights=weights, artifact=artifact)
    batch = token_batches([(2, 20)])[0]
    known = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    inputs = {entry.name: known[entry.name] for entry in small.load().manifest.inputs}
    plan = recipe(NARROW_W4.replace("lm_head", "nothing"), modifier="GPTQModifier")
    kept: list[list[str]] = []
    real = StreamingRun._attempt

    def attempt(self: StreamingRun, step: Step, *, is_retry: bool) -> None:
        real(self, step, is_retry=is_retry)
        kept.append(sorted(self.kept))

    monkeypatch.setattr(StreamingRun, "_attempt", attempt)
    calibrate(small, plan, tmp_path / "expected", batches=[inputs])
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    assert kept == [[f"{layer}.ffn.weight", f"{layer}.ffn_output.weight"], []]
    assert max(touched[0].values()) == 1
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "expected").eval()
    with torch.no_grad():
        expected = loaded(**inputs).last_hidden_state
    assert torch.equal(run_weights(small, tmp_path / "expected", inputs)["last_hidden_state"], expected)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt)  # measured, gone on, and measured
        with pytest.raises(KeyboardInterrupt):
            calibrate(small, plan, tmp_path / "out", batches=[inputs])
    assert calibrate(small, plan, tmp_path / "out", batches=[inputs], resume=True).resumed_at == 1
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_a_step_that_is_not_run_holds_one_weight_at_a_time(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round-to-nearest needs a weight, and when it is done with it, no longer."""
    held: list[list[str]] = []
    real = Work.packed

    def packed(self: Work, *args: Any) -> None:
        named = self.model.named_parameters(remove_duplicate=False)
        held.append([name for name, tensor in named if not tensor.is_meta])
        real(self, *args)

    monkeypatch.setattr(Work, "packed", packed)
    result = calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "out")
    assert held == [[f"{report.name}.weight"] for report in result.modules]


def test_the_next_weights_come_to_the_page_cache_while_this_step_computes(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer waits until the next one's weights were asked for: without prefetch that would be never."""
    announced: dict[str, None] = {}
    monkeypatch.setattr(Checkpoint, "announce", lambda self, keys: announced.update(dict.fromkeys(keys)))
    real = LoadedSubgraph.forward

    def forward(self: LoadedSubgraph, model: Any, **inputs: Any) -> dict[str, Any]:
        layer = int(self.entry.targets[0].rpartition(".")[2])
        end = time.monotonic() + 30
        while layer < 2 and f"model.layers.{layer + 1}.mlp.up_proj.weight" not in announced:
            assert time.monotonic() < end, "nobody asks for them"
            time.sleep(0.001)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert parameters[f"model.layers.{layer}.mlp.up_proj.weight"].device.type == "cpu"
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    assert not any(key.startswith("model.layers.0.") for key in announced)


def test_on_a_gpu_they_are_read(narrow_llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by the device's name alone, which tensors here do not have."""
    artifact = narrow_llama.load()
    model = artifact.empty_model()
    source = Weights(artifact, Checkpoint(narrow_llama.weights), torch.float32, model)
    loads = {index: part.entry.parameters for index, part in enumerate(artifact.subgraphs[:2])}
    stream = WeightStream(source, loads, torch.device("cpu"))
    monkeypatch.setattr(stream, "_is_ahead", True)
    asked: list[str] = []
    monkeypatch.setattr(Checkpoint, "announce", lambda self, keys: asked.extend(keys))
    with stream:
        stream.load(model, 0)
        tensors, _ = stream._pending[1].result()
        assert list(tensors) == list(loads[1])
    assert not asked


def test_what_is_announced_is_what_tensors_are_made_from(tmp_path: Path) -> None:
    """By the page: whoever asks for what lies in no shard would hear so."""
    save_file({"a": torch.zeros(70_000), "b": torch.zeros(3), "c": torch.zeros(0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    asked: list[list[str]] = []
    real = checkpoint.announce
    made = Derived(stored=Stored("d", "F32", (3,)), sources=("a", "b"), make=lambda inner, part: inner.read("b"))
    seen = DerivedCheckpoint(checkpoint, {"d": made, "e": dataclasses.replace(made, stored=Stored("e", "F32", (3,)))})

    def announce(keys: Iterable[str]) -> None:
        asked.append(list(keys))
        real(asked[-1])

    checkpoint.announce = announce  # type: ignore[method-assign]
    seen.announce(["d", "e", "c"])
    assert asked == [["a", "b", "c"]]
    assert checkpoint.bytes_read == 0


def test_an_error_while_reading_ahead_is_the_runs(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.read

    def read(self: Checkpoint, key: str) -> torch.Tensor:
        if key.startswith("model.layers.1."):
            raise runtime.WeightsError(f"tensor {key} cannot be read")
        return real(self, key)

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(runtime.WeightsError, match=r"model\.layers\.1\."):
        calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class DoubleNorm:
    """Doubles what a norm gives and halves the weights after it, as algorithms that smooth do: the sum is the same."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def measures(self, names: Sequence[str]) -> bool:
        return bool(names)

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        layers = dict.fromkeys(name.split(".self_attn")[0].split(".mlp")[0] for name in names)
        return [
            f"{layer}.{norm}.weight" for layer in layers for norm in ("input_layernorm", "post_attention_layernorm")
        ]

    def apply(self, work: Work) -> None:
        if not work.step.modules:
            return
        before = len(work.reports)
        work.run_batches()
        assert len(work.reports) == before
        for name in self.rewrites(work.step.modules):
            work.rewrite(name, work.model.get_parameter(name) * 2)
            self.seen.append(name)
        for name in work.step.modules:
            if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                work.change(f"{name}.weight", work.weight(name) / 2)


@pytest.fixture
def smoothed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], DoubleNorm]:
    def arrange() -> DoubleNorm:
        modifier = DoubleNorm()
        plain = runtime.calibration.calibrate
        monkeypatch.setattr(runtime.calibration, "calibrate", functools.partial(plain, own_modifiers=[modifier]))
        return modifier

    return arrange


def test_a_modifier_may_rewrite_norms_before_weights_are_rounded(
    narrow_llama: Small, tmp_path: Path, smoothed: Callable[[], DoubleNorm]
) -> None:
    """Powers of two change no rounding, so the model computes what it computes without the modifier, to the bit."""
    plan = recipe(NARROW_W4, modifier="GPTQModifier")
    calibrate(narrow_llama, plan, tmp_path / "plain")
    modifier = smoothed()
    calibrate(narrow_llama, plan, tmp_path / "out")
    assert len(modifier.seen) == 6
    before, after = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "out")
    assert list(before) == list(after)
    for name, tensor in before.items():
        if "layernorm" in name:
            assert torch.equal(after[name], tensor * 2)
        elif name.endswith("weight_packed"):
            assert torch.equal(after[name], tensor), name
    inputs = token_batches([(2, 17)], seed=5)[0]
    got = run_weights(narrow_llama, tmp_path / "out", inputs)["logits"]
    assert torch.equal(got, run_transformers(tmp_path / "plain", inputs))
    assert torch.equal(got, run_transformers(tmp_path / "out", inputs))
    assert load_transformers(tmp_path / "out") is not None


def test_a_resumed_run_has_the_rewritten_norms(
    narrow_llama: Small, tmp_path: Path, smoothed: Callable[[], DoubleNorm], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(NARROW_W4, modifier="GPTQModifier")
    smoothed()
    calibrate(narrow_llama, plan, tmp_path / "expected")
    with monkeypatch.context() as patch:
        stop_at(patch, 20, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(narrow_llama, plan, tmp_path / "out")
    assert calibrate(narrow_llama, plan, tmp_path / "out", resume=True).resumed_at == 2
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with EventLog(Path("/dev/full")) as log:
        log.tell("warning", text="first")
        log.tell("warning", text="second")
    complaint = capfd.readouterr().err
    assert complaint.count("cannot write the log /dev/full (No space left on device); the run continues") == 1
    with pytest.raises(runtime.OutputError, match="part of the path is not a directory"):
        EventLog(Path("/dev/null/log"))


def test_events(narrow_llama: Small, tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        plan = recipe(NARROW_W4, modifier="GPTQModifier")
        result = calibrate(narrow_llama, plan, tmp_path / "out", watchers=[log])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    steps = [*(["module"] * 7 + ["subgraph"]) * 3, "subgraph"]
    assert kinds == ["run", "inputs", "begin", "plan", *steps, "published", "end"]
    modules = [event for event in events if event["event"] == "module"]
    assert [event["loss"] for event in modules] == [report.loss for report in result.modules]
    assert {(event["num_tokens"], event["damping"], event["num_dead"], event["fallback"]) for event in modules} == {
        (366, 0.01, 0, "")
    }
    tensors = read_tensors(tmp_path / "out")
    for event in modules:
        own = [tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{event['name']}.")]
        assert event["num_bytes"] == sum(own)
    written = sum(event["bytes_written"] for event in events if event["event"] == "subgraph")
    assert written == result.num_bytes
    assert [event["tokens"] for event in events if event["event"] == "subgraph"] == [2 * 366, 2 * 366, 366, 0]
    assert events[2]["total_tokens"] == 5 * 366


def test_the_relative_error_is_that_of_the_output(narrow_llama: Small, tmp_path: Path) -> None:
    """All 32 rows are few enough to be measured in full."""
    result = calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    model = load_transformers(narrow_llama.weights)
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in token_batches():
            model(**batch, use_cache=False)
    output = torch.cat(seen).double() @ module.get_parameter("weight").double().T
    report = result.modules[0]
    assert report.error == pytest.approx((report.loss / output.square().sum().item()) ** 0.5, rel=1e-3)


def test_what_passes_through_has_the_same_bytes_whatever_its_dtype(tmp_path: Path, narrow_llama: Small) -> None:
    """Zeros with a sign, the smallest number and the largest."""
    tensors = read_tensors(narrow_llama.weights)
    odd = torch.tensor([0x7F7FFFFF, 0x00800001, 0x80000001 - 2**32, 0x80000000 - 2**32, 1]).to(torch.int32)
    tensors["lm_head.weight"][0, :5] = odd.view(torch.float32)
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(narrow_llama.weights, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", weights=tmp_path / "model")
    found = read_tensors(tmp_path / "out")
    assert raw_bytes(found["lm_head.weight"]) == raw_bytes(tensors["lm_head.weight"])
