from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

import runtime
import runtime.calibration
import seqbuild
import seqbuild.cli.app
from runtime.algorithms.awq import ScaleSearch, search_scales
from runtime.algorithms.gptq import SolveOptions, factor_siblings, solve_tiles
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.rtn import quantize_rtn
from runtime.chain import Artifact
from runtime.checkpoint.reader import Checkpoint
from runtime.formats.compressed import compress_rows, decompress_module, join_rows, joined_rows
from runtime.formats.presets import scheme_from_preset
from runtime.host.event_log import EventLog
from runtime.planning.costs import search_bytes, solve_bytes
from runtime.planning.fit import Limits, shortages
from runtime.planning.forecast import Forecast
from runtime.planning.predict import KERNEL_BYTES, PlannedRun
from runtime.planning.request import plan_artifact, require_plan
from runtime.planning.shapes import ShapeRun
from runtime.quantize.assignments import assign_jobs
from runtime.quantize.nearest import round_to_nearest
from runtime.quantize.preparation import prepare
from runtime.quantize.recipe_modifier import RecipeModifier
from runtime.streaming.activations import Activations, Budget
from runtime.streaming.schedule import plan_steps
from runtime.weights.origins import StatedParameters
from runtime.weights.parameters import Weights
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import NARROW_W4, RECIPES, Small, calibrate, read_tensors, recipe, token_batches
from tests.sweep import sweep

CPU = torch.device("cpu")


def planned(artifact: Artifact, **options: Any) -> Forecast:
    sizes = {"num_samples": 8, "seq_len": 40, "batch_size": 4}
    plan, _, _ = plan_artifact(artifact, **{**sizes, **options})
    return plan


def allocated(call: Callable[[], Any]) -> int:
    """The most memory that torch has beyond what it had, while something runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        kept = call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    del kept
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


def loaded_model(small: Small, artifact: Artifact) -> nn.Module:
    model = artifact.empty_model()
    source = Weights(artifact, Checkpoint(small.weights), torch.float32, model)
    source.load(model, artifact.manifest.parameters, CPU)
    return model


# Shapes


def unpadded(values: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a subgraph with masks as for samples that are not padded."""
    full = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    masks = {name: torch.ones_like(value) for name, value in full.items() if name == "attention_mask"}
    masks |= {name: torch.ones_like(value).tril() for name, value in full.items() if value.dtype == torch.bool}
    return {**values, **masks}


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_working_memory_and_results_are_those_of_the_run(name: str, request: pytest.FixtureRequest) -> None:
    small: Small = request.getfixturevalue(name)
    artifact = small.load()
    model, empty = loaded_model(small, artifact), artifact.empty_model()
    ids = torch.randint(2, 250, (8, 64))
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    values["attention_mask"][0, :3] = 0  # a plan assumes that attention needs its mask
    shapes: dict[str, Any] = {key: value.to("meta") for key, value in values.items()}
    with ShapeRun(artifact, empty, torch.float32, "cpu") as run, torch.no_grad():
        for subgraph in artifact.subgraphs:
            given = {key: values[key] for key in subgraph.input_names}
            footprint = run(subgraph, {key: shapes[key] for key in subgraph.input_names})
            assert footprint is not None
            subgraph.forward(model, **given)  # what is made once, and kept
            measured = allocated(partial(subgraph.forward, model, **given))
            most = 1.2 if name == "qwen3_moe" else 1.15  # the plan assumes that an expert gets all tokens
            assert 0.85 * measured <= footprint.working_bytes <= most * measured
            assert allocated(partial(subgraph.forward, model, **unpadded(given))) <= 1.05 * measured
            values |= subgraph.forward(model, **given)
            shapes |= footprint.outputs
            for key, value in footprint.outputs.items():
                if isinstance(value, torch.Tensor):
                    assert (value.shape, value.dtype) == (values[key].shape, values[key].dtype)


def test_modules_with_one_input_share_one_sum(llama: Small) -> None:
    artifact = llama.load()
    model = artifact.empty_model()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".1." in name]
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": ids}
    with ShapeRun(artifact, model, torch.float32, "cpu") as run:
        first = run(artifact.subgraphs[0], values)
        assert first is not None
        assert first.seen == ()
        found = run(artifact.subgraphs[1], values | dict(first.outputs), names)
    assert found is not None
    groups = [tuple(name.rpartition(".")[2] for name in names) for names in found.seen]
    assert groups == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_the_model_is_given_back_as_it_was(gemma2: Small) -> None:
    artifact = gemma2.load()
    model = artifact.empty_model()
    before = dict(model.named_buffers())
    with ShapeRun(artifact, model, torch.float32, "cpu"):
        assert all(buffer.is_meta for buffer in model.buffers())
    assert [(name, buffer) for name, buffer in model.named_buffers() if buffer is not before[name]] == []


# Costs


SHAPES = ([(512, 512)], [(256, 1024)], [(1024, 256)], [(512, 256), (512, 256)], [(2600, 512), (500, 512)])


@pytest.mark.parametrize(
    ("shapes", "kind"),
    sweep(
        [(shapes, kind) for shapes in SHAPES for kind in ("gptq", "gptq in place", "corrected", "rtn", "data-free")],
        *(([(512, 512)], "corrected"), ([(1024, 256)], "corrected"), ([(256, 1024)], "corrected")),
        *(([(512, 512)], "rtn"), ([(1024, 256)], "data-free"), ([(512, 512)], "gptq in place")),
        *(([(2600, 512), (500, 512)], "rtn"), ([(2600, 512), (500, 512)], "data-free")),
        *(([(256, 1024)], "gptq"), ([(1024, 256)], "gptq in place"), ([(512, 256), (512, 256)], "gptq")),
        ([(2600, 512), (500, 512)], "gptq"),
    ),
)
def test_a_solve_takes_what_the_formula_says(shapes: list[tuple[int, int]], kind: str) -> None:
    modifier = "QuantizationModifier" if kind in ("rtn", "data-free") else "GPTQModifier"
    (job,) = recipe(RECIPES["W4A16"], modifier=modifier).assign({"one": "Linear"}).values()
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs_TI = torch.randn(2 * shapes[0][1], shapes[0][1])
    overwrites = kind in ("gptq in place", "corrected")

    options = SolveOptions(args=job.scheme.weights, scale_dtype=torch.bfloat16)

    def solve(hessian_II: torch.Tensor, drift: list[torch.Tensor]) -> list[object]:
        """As a run does: each piece is packed at once, and the run goes on with the weights that readers unpack."""
        if kind == "rtn":
            return [quantize_rtn(weights[0], job.scheme.weights, scale_dtype=torch.bfloat16)]
        if kind == "data-free":
            rows = round_to_nearest(weights[0], job, None, scale_dtype=torch.bfloat16, global_scale=None)
            return [joined_rows([compress_rows("one", part, job.scheme) for part in rows], job.scheme)]
        found = factor_siblings(
            weights, hessian_II, options, overwrite_hessian=overwrites, drift_II=drift.pop() if drift else None
        )
        packed: list[list[dict[str, torch.Tensor]]] = [[] for _ in shapes]
        for one in solve_tiles(weights, tiles_of(shapes, options.args, "cpu"), found, options):
            packed[one.piece.weight].append(compress_rows("one", one.rows, job.scheme))
            del one
        del found
        dense: list[object] = []
        for parts, (_, num_in) in zip(packed, shapes, strict=True):
            dense.append(decompress_module(join_rows("one", parts, num_in, job.scheme, {}), job.scheme))
        return dense

    hessians = [inputs_TI.t() @ inputs_TI for _ in range(2)]
    drifts = [[hessian_II / 9] if kind == "corrected" else [] for hessian_II in hessians]
    solve(hessians[0], drifts[0])
    measured = allocated(lambda: solve(hessians[1], drifts[1]))
    facts = {"is_measured": kind != "data-free", "is_corrected": kind == "corrected"}
    said = solve_bytes(shapes, job, overwrites=overwrites, device_type="cpu", **facts)
    assert measured * 0.85 <= said <= measured * 1.35


@pytest.mark.parametrize("shapes", [[(512, 512)], [(256, 1024)], [(1024, 256), (1024, 256)]])
def test_a_search_takes_what_the_formula_says(shapes: list[tuple[int, int]]) -> None:
    args = scheme_from_preset("W4A16", ["Linear"]).weights
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs_TI = torch.randn(2 * shapes[0][1], shapes[0][1])
    hessian_II, mean_abs_I = inputs_TI.t() @ inputs_TI, inputs_TI.abs().mean(dim=0)

    def search() -> ScaleSearch:
        copies = (weight.float() for weight in weights)
        kinds = [args] * len(weights)
        return search_scales(copies, hessian_II, mean_abs_I, kinds, scale_dtype=torch.bfloat16, n_grid=2)

    search()
    measured = allocated(search)
    assert measured * 0.85 <= search_bytes(shapes, "awq") <= measured * 1.35


# A whole run, to the byte


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "with head"])
def test_read_and_written_are_what_a_run_reads_and_writes(llama: Small, tmp_path: Path, scheme: str) -> None:
    modifier = "GPTQModifier" if scheme == "W4A16" else "QuantizationModifier"
    plan = planned(llama.load(), recipe=recipe(RECIPES[scheme], modifier=modifier))
    with EventLog(tmp_path / "events") as log:
        result = runtime.calibrate(
            llama.load(),
            weights=llama.weights,
            recipe=recipe(RECIPES[scheme], modifier=modifier),
            batches=token_batches([(4, 40), (4, 40)]),
            out=tmp_path / "out",
            watchers=[log],
        )
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "subgraph"]
    assert plan.output_bytes == result.num_bytes
    assert [step.written for step in plan.steps] == [step["bytes_written"] for step in steps]
    # Which step counts what the reading thread has read ahead is a matter of chance.
    assert sum(step.read for step in plan.steps) == plan.read_bytes == sum(step["bytes_read"] for step in steps)
    assert [step.num_modules for step in plan.steps] == [step["num_modules"] for step in steps]


_CACHE = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}"
KINDS = {
    "gptq": f"GPTQModifier: {{{NARROW_W4}}}",
    "awq": f"AWQModifier: {{}}\nQuantizationModifier: {{{NARROW_W4}}}",
    "key-value cache": f"QuantizationModifier: {{{RECIPES['FP8_DYNAMIC']}, {_CACHE}}}",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sharded_llama", "gemma2", "qwen3_moe"])
def test_with_the_checkpoint_every_subgraph_reads_and_writes_what_is_planned(
    name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied weights are read with the first subgraph that uses them, and a tensor that no subgraph uses is copied."""
    small: Small = request.getfixturevalue(name)
    shutil.copytree(small.weights, tmp_path / "model")
    unused = {"unused.weight": torch.ones(3, 5)}
    save_file(unused, tmp_path / "model" / "more.safetensors", metadata={"format": "pt"})
    index = tmp_path / "model" / "model.safetensors.index.json"
    names = dict.fromkeys(read_tensors(small.weights), "model.safetensors")
    found = json.loads(index.read_text())["weight_map"] if index.exists() else names
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**found, "unused.weight": "more.safetensors"}}))
    plans: list[Forecast] = []

    def plan(*args: Any, **options: Any) -> Forecast:
        plans.append(require_plan(*args, **options))
        return plans[0]

    monkeypatch.setattr(runtime.calibration, "require_plan", plan)
    with EventLog(tmp_path / "events") as log:
        text = runtime.Recipe.from_text(KINDS[kind], "recipe.yaml")
        result = calibrate(small, text, tmp_path / "out", weights=tmp_path / "model", watchers=[log])
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "subgraph"]
    assert [step.written for step in plans[0].steps] == [step["bytes_written"] for step in steps]
    assert plans[0].output_bytes == result.num_bytes == sum(step["bytes_written"] for step in steps) + 60
    assert plans[0].read_bytes == sum(step["bytes_read"] for step in steps) + 60
    tensors = read_tensors(tmp_path / "out")
    assert result.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama of two models"])
def test_values_between_subgraphs_take_what_is_planned(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *both = name.split(" of ")
    small: Small = request.getfixturevalue(name)
    most = [0]
    real = Activations.store

    def store(self: Activations, batch: int, values: Any) -> None:
        real(self, batch, values)
        most[0] = max(most[0], sum(self.used_bytes.values()))

    monkeypatch.setattr(Activations, "store", store)
    text = "config_groups: {a: {targets: [Linear], weights: {num_bits: 8, strategy: channel}}}, ignore: [lm_head]"
    text += ", target: original" if both else ""
    batches = token_batches([(4, 40)] * 4)
    runtime.calibrate(
        small.load(),
        weights=small.weights,
        recipe=recipe(text, modifier="GPTQModifier"),
        batches=batches,
        out=tmp_path / "out",
    )
    plan = planned(small.load(), recipe=recipe(text, modifier="GPTQModifier"), num_samples=16)
    inputs = sum(value.nbytes for batch in batches for value in batch.values())  # the caller's; not counted there
    assert plan.activation_bytes - inputs <= most[0] * 1.15
    assert plan.activation_bytes >= most[0]


# What is measured

_STATIC = (
    "config_groups: {a: {targets: [Linear], weights: {num_bits: 8, strategy: channel}, "
    "input_activations: {num_bits: 8, strategy: tensor, dynamic: false}}}, ignore: [lm_head]"
)
MEASURING = {
    "static inputs": f"QuantizationModifier: {{{_STATIC}}}",
    "awq": f"AWQModifier: {{}}\nQuantizationModifier: {{{RECIPES['W4A16_ASYM']}}}",
    "smoothquant": f"SmoothQuantModifier: {{}}\nQuantizationModifier: {{{RECIPES['W8A8']}}}",
    "key-value cache": f"QuantizationModifier: {{{RECIPES['FP8_DYNAMIC']}, {_CACHE}}}",
}
MEASURING["observer"] = (
    "QuantizationModifier: {config_groups: {a: {targets: [Linear], weights: {num_bits: 4, strategy: group, "
    "group_size: 128, observer: imatrix_mse}}}, ignore: [lm_head]}"
)


@pytest.mark.parametrize("name", MEASURING)
def test_what_measures_without_gptq_is_planned_to_run_and_refused_without_data(
    llama: Small, tmp_path: Path, run: Run, name: str
) -> None:
    text = MEASURING[name]
    plan = planned(llama.load(), recipe=runtime.Recipe.from_text(text, "recipe.yaml"))
    assert [step.runs for step in plan.steps] == [True, True, True, False]
    assert all(step.working > 0 for step in plan.steps[:3])
    has_matrices = name in (
        "awq",
        "observer",
        "static inputs",
    )  # 128 wide, float32, q and o; 256 wide after the activation
    assert all((step.statistics > 2 * 128 * 128 * 4 + 256 * 256 * 4) is has_matrices for step in plan.steps[:3])
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    options = ["--weights", str(llama.weights), "--recipe", str(file), "-o", str(tmp_path / "out"), "--device", "cpu"]
    code, said, _ = run(["doctor", str(llama.artifact), *options])
    assert code == 1
    assert "needs calibration data (pass --data)" in said
    assert_refused(run(["calibrate", str(llama.artifact), *options]), "needs calibration data")


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_what_measures_nothing_is_planned_without_a_run(llama: Small, scheme: str) -> None:
    plan = planned(llama.load(), recipe=recipe(RECIPES[scheme]))
    assert not any(step.runs or step.statistics for step in plan.steps)


def test_the_names_at_the_top_plan(llama: Small) -> None:
    sizes = {"num_samples": 8, "seq_len": 40, "batch_size": 4}
    found = seqbuild.plan(runtime.load(llama.artifact), limits=runtime.Limits(host=10**6), **sizes)
    assert seqbuild.plan is runtime.plan_artifact
    assert isinstance(found, runtime.Planned)
    assert not found.fits
    assert found.advice
    assert runtime.plan_artifact(llama.load(), budget=runtime.Budget(host_bytes=0), **sizes).fits


# Models of other kinds


@pytest.mark.parametrize("name", sweep(["t5", "bart", "mamba", "bert"], "t5", "mamba"))
def test_encoders_and_recurrent_models_are_planned(name: str, compiled: Callable[..., Path]) -> None:
    artifact = runtime.load(compiled(name, attn_implementation="eager"))
    text = "config_groups: {a: {targets: [Linear], weights: {num_bits: 8, strategy: channel}}}, ignore: [lm_head]"
    plan = planned(artifact, recipe=recipe(text, modifier="GPTQModifier"))
    assert plan.read_bytes == sum(entry.bytes for entry in artifact.manifest.parameters.values() if not entry.tied_to)
    assert 0 < plan.output_bytes < plan.read_bytes
    assert all(step.working > 0 and step.statistics > 0 for step in plan.steps if step.num_modules)


def test_pixels_are_assumed_unless_they_are_stated(compiled: Callable[..., Path], run: Run) -> None:
    artifact = compiled("image-text-to-text/llava", attn_implementation="eager", leaves="target")
    code, said, _ = run(["plan", str(artifact), "--batch-size", "2"])
    assert code == 0
    assert "assumed pixel_values_0 = 2 (change it with --size pixel_values_0=N)" in said
    images = [f"--size=pixel_values_{place}={size}" for place, size in enumerate((5, 3, 56, 56))]
    code, said, _ = run(["plan", str(artifact), "--json", "--batch-size", "2", *images])
    assert code == 0
    assert json.loads(said)["work"]["sizes"]["pixel_values_0"] == 5
    assert not any("assumed" in remark for remark in json.loads(said)["remarks"])


# What fits


def test_what_is_advised_fits(place: Place, run: Run) -> None:
    command = ["plan", str(place.artifact), "--samples", "512", "--seq-len", "256", "--device-memory", "640MB"]
    code, said, _ = run([*command, "--json"])
    plan = json.loads(said)
    assert code == 1
    assert plan["fits"] is False
    assert plan["work"]["device"] == "cuda"
    assert "device memory: " in plan["shortages"][0]
    assert plan["advice"]
    for option in plan["advice"]:
        assert run([*command, *option.partition(" (")[0].split()])[0] == 0


def test_less_memory_for_activations_is_advised(llama: Small) -> None:
    artifact = llama.load()
    options = {"num_samples": 4096, "seq_len": 256}
    plan = planned(artifact, **options)
    limits = Limits(host=plan.host_bytes - plan.activation_bytes // 2)
    _, missing, mended = plan_artifact(artifact, **{"batch_size": 4, **options}, limits=limits)  # type: ignore[arg-type]
    assert len(missing) == 1
    assert missing[0].startswith("host memory: ")
    assert mended[0].startswith("--activation-memory 0.")
    budget = Budget.parse(mended[0].split()[1])
    again, missing, _ = plan_artifact(
        artifact,
        **{"batch_size": 4, **options},
        limits=limits,
        budget=budget,  # type: ignore[arg-type]
    )
    assert missing == []
    assert again.spilled_bytes > 0
    assert again.disk_bytes == again.output_bytes + again.spilled_bytes


def test_what_no_option_can_make_fit_is_said(llama: Small) -> None:
    _, missing, mended = plan_artifact(
        llama.load(), num_samples=8, seq_len=8, batch_size=1, limits=Limits(host=10**6), device_type="cpu"
    )
    assert len(missing) == 1
    (line,) = mended
    assert line.startswith("a larger machine: model.layers.0 alone needs ")


def test_peaks_do_not_grow_with_depth(small: Callable[..., Small], narrow_llama: Small) -> None:
    from tests.runtime.small import NARROW

    deep = planned(small("LlamaForCausalLM", "LlamaConfig", {**NARROW, "num_hidden_layers": 9}).load())
    assert planned(narrow_llama.load()).device_bytes == deep.device_bytes
    assert len(deep.steps) == 10


def test_a_table_counts_unless_it_is_left_on_disk(llama: Small) -> None:
    """It is left if the checkpoint stores it as the run uses it."""
    artifact, key = llama.load(), "model.embed_tokens.weight"
    work = planned(artifact, num_samples=1, seq_len=8, batch_size=1).work  # the solve takes most
    table = artifact.manifest.parameters[key].bytes
    text = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    prepared = prepare(artifact, None, text, torch.float32)
    modifier = RecipeModifier(artifact, prepared.source, text, prepared.jobs)
    schedule = plan_steps(artifact, prepared.source, prepared.jobs, [modifier])
    run = PlannedRun(artifact=artifact, source=prepared.source, schedule=schedule, needs=modifier.needs)
    left = run.forecast(work).steps[0].device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatedParameters, "is_table", lambda self, name: False)
        assert run.forecast(work).steps[0].device - left == table
    assert prepared.source.is_table(key)
    assert not StatedParameters(artifact, torch.bfloat16).is_table(key)


def test_a_run_that_does_not_fit_is_refused(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.calibration.memory_here", lambda device: Limits(host=10**6))
    before = place.tree()
    assert_refused(run(place.calibrate()), "the run does not fit: host memory: ", "or run anyway with --force")
    assert place.tree() == before
    code, said, _ = run(place.calibrate("--force"))
    assert code == 0
    assert "warning: the run may not fit: host memory" in said


def test_a_plan_needs_nothing_but_the_artifact(place: Place, run: Run) -> None:
    for path in place.weights.iterdir():
        path.unlink()
    said = {}
    for main in (runtime.cli.app.main, seqbuild.cli.app.main):
        code, said[main], _ = run(["plan", str(place.artifact), "--recipe", str(place.recipe), "--json"], main)
        assert code == 0
    steps = [json.loads(text)["subgraphs"] for text in said.values()]
    assert [step["weights"] for step in steps[0]] == [step["weights"] for step in steps[1]]
    assert run(["plan", str(place.artifact)])[1].splitlines()[-1] == "fits"


def test_the_shortages_of_a_cpu_are_the_hosts(llama: Small) -> None:
    plan = planned(llama.load())
    assert shortages(plan, Limits(device=1)) == []
    assert shortages(plan, Limits(disk=1))[0].startswith("disk: ")
    assert plan.host_bytes == plan.device_bytes + plan.work.process_bytes + KERNEL_BYTES


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--device-memory=much", "--device-memory must be a size; got 'much'"),
        ("--size=pixels=3", "--size names 'pixels', which is not a size of the artifact (it has batch, sequence)"),
        ("--size=batch", "--size must be NAME=N with N >= 1; got 'batch'"),
        ("--device=tpu", "--device must be one of cpu, cuda, xpu, auto; got 'tpu'"),
        ("--dtype=int8", "got 'int8'"),
        ("--recipe=nowhere.yaml", "the recipe 'nowhere.yaml' cannot be read"),
    ],
)
def test_bad_options_are_refused(place: Place, run: Run, option: str, part: str) -> None:
    assert_refused(run(["plan", str(place.artifact), option]), part)


def test_jobs_without_a_checkpoint_are_those_with_one(qwen3_moe: Small) -> None:
    artifact = qwen3_moe.load()
    model = artifact.empty_model()
    source = Weights(artifact, Checkpoint(qwen3_moe.weights), torch.float32, model)
    plan = recipe("config_groups: {a: {targets: [Linear], weights: {num_bits: 8, strategy: channel}}}")
    stated = StatedParameters(artifact, torch.float32)
    assert assign_jobs(artifact, model, stated, plan) == assign_jobs(artifact, model, source, plan)
