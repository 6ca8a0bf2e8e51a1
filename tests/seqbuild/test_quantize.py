"""`seqbuild quantize`, on tiny models with random weights."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import runtime.cli.app
import seqbuild.cli.app
from runtime.provenance.record import read_record
from runtime.provenance.serving import serving_lines
from seqbuild.onecall.options import user_artifacts
from seqbuild.text import builtin_text
from tests.runtime.place import assert_refused
from tests.runtime.small import NARROW, WIDTHS, Stop, directory_bytes, nameless_bytes, read_tensors, save_model, stop_at

FEW = ("--samples", "8", "--seq-len", "32")
Call = Callable[..., tuple[int, str, str]]


def model_in(folder: Path, tokenizer: Path, class_name: str, config_class: str, sizes: dict[str, Any]) -> Path:
    config = getattr(transformers, config_class)(**sizes)
    return save_model(getattr(transformers, class_name)(config), folder, tokenizer)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny llama"
    return model_in(folder, byte_tokenizer_dir, "LlamaForCausalLM", "LlamaConfig", WIDTHS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache, which the tests of this file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command line in an empty directory: exit code, what it printed, what it complained about."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("SEQBUILD_CACHE", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(*arguments: str | Path, main: Callable[[list[str]], int] = seqbuild.cli.app.main) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


def test_one_command(call: Call, llama_dir: Path, cache: Path) -> None:
    command = ("quantize", llama_dir, "--scheme", "w4a16", "-o", "out dir", *FEW)
    code, printed, complaint = call(*command)
    assert (code, complaint) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == f"quantizing {llama_dir} to out dir"
    assert lines[1].startswith(f"artifact: {cache}/seqbuild/artifacts/tiny llama-")
    assert lines[2].startswith("recipe: gptq W4A16, 21 modules, ")
    assert lines[3].startswith(f"{builtin_text()}: 8 samples, 256 tokens; 32 tokens each")
    facts = {line.split("  ")[0]: line for line in lines}
    assert "21 modules with gptq W4A16, in out dir" in facts["quantized"]
    assert " before, " in facts["perplexity"] and "held-out tokens" in facts["perplexity"]
    assert facts["report"].endswith("out dir.report.html")
    assert facts["load it"].endswith("vllm serve 'out dir'")
    config = json.loads(Path("out dir/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert {path.name for path in Path.cwd().iterdir()} == {"out dir", "out dir.report.html"}, "nothing else is left"

    assert_refused(call(*command), "output directory out dir is not empty", program="seqbuild")
    assert_refused(call(*command, "--resume"), "out dir is already complete", program="seqbuild")

    # The steps give the same bytes, with the name of a preset as the recipe.
    (artifact,) = (path for path in user_artifacts().iterdir() if path.is_dir())
    steps = ("calibrate", artifact, "--weights", llama_dir, "--recipe", "W4A16", "--data", builtin_text())
    assert call(*steps, *FEW, "-o", "steps")[0] == 0
    assert nameless_bytes(Path("steps")) == nameless_bytes(Path("out dir"))
    measured = read_record(Path("out dir")).evaluation
    assert measured is not None and read_record(Path("steps")).evaluation is None
    assert f"perplexity   {measured.before:.4f} before, {measured.after:.4f} after" in facts["perplexity"]
    code, printed, _ = call("evaluate", artifact, "--weights", "steps", "--data", builtin_text(), *FEW)
    assert code == 0 and "\nperplexity " in printed

    # A recipe that needs no data reads none, and JSON is all that is printed.
    code, printed, complaint = call(
        "quantize",
        llama_dir,
        "--recipe",
        "fp8_dynamic",
        "-o",
        "fp8",
        "--json",
        "--seq-len",
        "32",
        "--log",
        "log",
    )
    assert (code, complaint) == (0, "")
    found = json.loads(printed)
    events = [json.loads(line) for line in Path("log").read_text().splitlines()]
    measured = {event["which"]: event["perplexity"] for event in events if event["event"] == "evaluation"}
    assert measured == {which: found["perplexity"][which] for which in ("before", "after")}
    assert (events[0]["recipe"]["name"], events[-1]["event"], events[-1]["path"]) == ("fp8_dynamic", "end", "fp8")
    assert (found["path"], found["modules"], found["recipe"]) == ("fp8", 21, "fp8_dynamic")
    assert found["bytes"]["after"] == sum(
        tensor.numel() * tensor.element_size() for tensor in read_tensors(Path("fp8")).values()
    )
    assert found["perplexity"]["before"] > 1 < found["perplexity"]["after"]
    assert found["serving"] == ["vllm serve fp8"]


def test_an_interrupted_call_is_resumed(call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", llama_dir, "--scheme", "W4A16", "--no-evaluate", *FEW, "-o")
    assert call(*command, "new/../whole")[0] == 0  # as of a variable
    Path("new").rmdir()
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt)
        code, printed, complaint = call(*command, "out")
    assert code == 130
    assert complaint == "seqbuild: interrupted; 1 finished subgraph is kept, continue with --resume\n"
    before = call(*command, "out")
    assert_refused(before, "an interrupted run has left 1 finished subgraph of out", "--resume", program="seqbuild")
    assert "artifact" not in before[1], "found before the model is compiled"
    code, printed, complaint = call(*command, "out", "--resume")
    assert (code, complaint) == (0, "")
    assert "resuming after 1 of 4 subgraphs" in printed
    assert "perplexity   not measured: evaluation is off" in printed
    assert directory_bytes(Path("out")) == directory_bytes(Path("whole"))
    assert {path.name for path in Path.cwd().iterdir()} == {"out", "out.report.html", "whole", "whole.report.html"}


def test_a_call_that_is_interrupted_in_its_evaluation_is_complete(
    call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.evaluation.evaluate", interrupt)
    code, _, complaint = call("quantize", llama_dir, "--scheme", "W4A16", *FEW, "-o", "out", "--log", "log")
    assert (code, complaint) == (130, "seqbuild: interrupted; output directory out is complete\n")
    assert Path("out/config.json").is_file()
    published, last = (json.loads(line) for line in Path("log").read_text().splitlines()[-2:])
    assert (published["event"], published["path"]) == ("published", "out")
    assert (last["event"], last["signal"], last["exit_code"]) == ("interrupted", "SIGINT", 130)
    assert last["text"] == "interrupted; output directory out is complete"


def test_a_full_disk_is_found_before_the_run(call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stop_at(monkeypatch, 1, Stop)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total used free")(9, 8, 1))
    result = call("quantize", llama_dir, "--scheme", "W4A16", *FEW, "-o", "out")
    assert_refused(result, "out needs at least", "free disk space", program="seqbuild")
    assert calls == [0] and not list(Path.cwd().iterdir())


def test_a_dry_run_writes_nothing(call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stop_at(monkeypatch, 1, Stop)
    command = ("quantize", llama_dir, "--scheme", "W4A16", *FEW, "-o", "out", "--dry-run")
    code, printed, complaint = call(*command)
    assert (code, complaint) == (0, "")
    assert ": 8 samples, 256 tokens; " in printed and printed.splitlines()[-1] == "fits"
    code, printed, _ = call(*command, "--json")
    assert code == 0 and json.loads(printed)["fits"] is True
    assert calls == [0] and not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere/model", "-s", "W4A16"], ["nowhere/model"]),
        (["MODEL"], ["no scheme was given", "--scheme W4A16"]),
        (["MODEL", "-s", "W4A61"], ["unknown scheme 'W4A61'", "did you mean W4A16?"]),
        (["MODEL", "-s", "W4A16", "--algorithm", "gptk"], ["got 'gptk'", "did you mean gptq?"]),
        (["MODEL", "-s", "W4A16", "--recipe", "rtn"], ["both --scheme and --recipe"]),
        (["MODEL", "--recipe", "rtn", "--ignore", "x"], ["--ignore cannot be combined with --recipe"]),
        (["MODEL", "--recipe", "NVFP"], ["there is no recipe 'NVFP'", "did you mean NVFP4?"]),
        (["MODEL", "--recipe", "nowhere.yaml"], ["the recipe 'nowhere.yaml' cannot be read"]),
        (["MODEL", "-s", "W4A16", "--ignore", "re:("], ["'re:(' is not a valid regular expression"]),
        (["MODEL", "-s", "W4A16", "--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["MODEL", "-s", "W4A16", "--eval-data", "nowhere.jsonl", *FEW], ["nowhere.jsonl"]),
        (
            ["MODEL", "-s", "FP8", "--data", "MODEL/x.txt", "--eval-data", "MODEL/x.txt"],
            ["is given for calibration and"],
        ),
        (["MODEL", "-s", "W4A16", "--seq-len", "4096"], ["--seq-len 256 or less"]),
        (["MODEL", "-s", "W4A16", "--device", "cuda:99"], ["device 'cuda:99' is not available"]),
        (["MODEL/config.json", "-s", "W4A16"], ["is a config without weights"]),
        (["MODEL", "-s", "W4A16", "--max-shard-size", "2"], ["--max-shard-size is '2', a size without a unit"]),
        (
            ["MODEL", "-s", "W4A16", "--log", "nowhere/events"],
            ["cannot write the log nowhere/events", "does not exist"],
        ),
        (["MODEL", "-s", "W4A16", "--log", "MODEL"], ["cannot write the log", "Is a directory"]),
        (["--model", "MODEL", "--bits", "4"], ["has no option --model", "pass MODEL first"]),
        (["MODEL", "--output_dir=out"], ["has no option --output_dir", "use --out"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Call, llama_dir: Path, arguments: list[str], parts: list[str]) -> None:
    filled = [argument.replace("MODEL", str(llama_dir)) for argument in arguments]
    assert_refused(call("quantize", *filled, "-o", "out"), *parts, program="seqbuild")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--data", "nowhere", "no file or directory nowhere exists"),
        ("--eval-data", "owner/nowhere", "the data set owner/nowhere "),
        ("--data", "MODEL/model.safetensors.index.yaml", "cannot be read"),
        ("--data", "MODEL/tokenizer_config.json::split=train", "is a file, which has no split"),
        ("--log", "nowhere/events", "its directory does not exist"),
    ],
)
def test_wrong_places_are_found_before_the_model_is_compiled(
    call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, part: str
) -> None:
    monkeypatch.setattr("seqbuild.onecall.run.compile_model_for", Stop)
    result = call("quantize", llama_dir, "-s", "W4A16", option, value.replace("MODEL", str(llama_dir)), "-o", "out")
    assert_refused(result, part, program="seqbuild")


def test_a_directory_without_permission_is_found_before_the_model_is_compiled(
    call: Call, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqbuild.onecall.run.compile_model_for", Stop)
    Path("file").write_text("")
    result = call("quantize", llama_dir, "-s", "W4A16", "-o", "file/out")
    assert_refused(result, "cannot write file/out", "part of the path is not a directory", program="seqbuild")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    result = call("quantize", llama_dir, "-s", "W4A16", "-o", "new/out")
    assert_refused(result, f"cannot write new/out: no permission to create files in {Path.cwd()}", program="seqbuild")
    assert not Path("new").exists()


def test_a_download_without_tokenizer_is_continued(
    call: Call, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, folder = "0123456789" * 4, tmp_path / "hub" / "models--owner--name"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_dir / name, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = call("quantize", "owner/name", "-s", "W4A16", *FEW, "-o", "out")
    parts = ("only partly downloaded", "tokenizer_config.json or tokenizer.json", "hf download owner/name")
    assert_refused(result, *parts, program="seqbuild")
    (tmp_path / "local").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_dir / name, tmp_path / "local")
    result = call("quantize", tmp_path / "local", "-s", "W4A16", *FEW, "-o", "out")
    assert_refused(result, "local has no tokenizer", program="seqbuild")


def test_samples_that_are_much_too_short_are_reported(call: Call, llama_dir: Path) -> None:
    Path("short.jsonl").write_text('{"text": "Hello"}\n' * 40)
    command = ("quantize", llama_dir, "-s", "FP8", "--data", "short.jsonl", "--no-evaluate", "-o")
    code, _, complaint = call(*command, "alone", "--no-pack")
    assert code == 0 and "tokens on average" in complaint and "--pack" in complaint
    code, _, complaint = call(*command, "joined")
    assert code == 0 and "on average" not in complaint


def test_the_output_is_outside_of_the_model(call: Call, llama_dir: Path) -> None:
    before = directory_bytes(llama_dir)
    result = call("quantize", llama_dir, "-s", "W4A16", "-o", llama_dir / "out")
    assert_refused(result, "is inside the input directory", program="seqbuild")
    assert directory_bytes(llama_dir) == before


def test_an_encoder_has_no_perplexity(call: Call, byte_tokenizer_dir: Path, tmp_path: Path) -> None:
    sizes = {key: value for key, value in WIDTHS.items() if key != "num_key_value_heads"}
    folder = model_in(tmp_path / "bert", byte_tokenizer_dir, "BertModel", "BertConfig", sizes)
    code, printed, complaint = call("quantize", folder, "-s", "W8A8", *FEW, "-o", "out")
    assert (code, complaint) == (0, "")
    assert "evaluation: none, BertModel returns" in printed
    assert "perplexity is defined for causal and encoder-decoder language models" in printed
    assert "from transformers import BertModel; model = BertModel.from_pretrained('out'" in printed


def test_a_head_of_any_name_that_shares_its_weight_is_not_quantized(
    call: Call, byte_tokenizer_dir: Path, tmp_path: Path
) -> None:
    sizes = {key: value for key, value in WIDTHS.items() if key != "num_key_value_heads"}
    folder = model_in(tmp_path / "bert", byte_tokenizer_dir, "BertForMaskedLM", "BertConfig", sizes)
    code, _, complaint = call("quantize", folder, "-s", "FP8_DYNAMIC", "-o", "out")
    assert (code, complaint) == (0, "")
    quantized = {name.removesuffix(".weight_scale") for name in read_tensors(Path("out")) if name.endswith("_scale")}
    assert "bert.encoder.layer.0.output.dense" in quantized and "cls.predictions.decoder" not in quantized


def test_heads_and_routers_are_not_quantized(call: Call, byte_tokenizer_dir: Path, tmp_path: Path) -> None:
    sizes = {**NARROW, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8}
    sizes |= {"shared_expert_intermediate_size": 32}
    folder = model_in(tmp_path / "moe", byte_tokenizer_dir, "Qwen2MoeForCausalLM", "Qwen2MoeConfig", sizes)
    code, printed, complaint = call("quantize", folder, "-s", "FP8_DYNAMIC", "--no-evaluate", "-o", "out")
    assert (code, complaint) == (0, "")
    assert "ignore entries that match no module" not in printed
    quantized = {name for name in read_tensors(Path("out")) if name.endswith(".weight_scale")}
    assert any(".experts.3.down_proj" in name for name in quantized)
    assert not any("gate." in name or "lm_head" in name for name in quantized)


def test_a_model_with_images_is_quantized_for_text(call: Call, byte_tokenizer_dir: Path, tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {
        "text_config": {**NARROW, "model_type": "llama"},
        "vision_config": {**vision, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_token_index": 5,
    }
    config = "LlavaConfig", sizes
    folder = model_in(tmp_path / "llava", byte_tokenizer_dir, "LlavaForConditionalGeneration", *config)
    code, printed, complaint = call("quantize", folder, "-s", "FP8_DYNAMIC", "--seq-len", "32", "-o", "out")
    assert (code, complaint) == (0, "")
    assert "perplexity   not measured" not in printed
    quantized = {name for name in read_tensors(Path("out")) if name.endswith(".weight_scale")}
    assert quantized and not any("vision" in name for name in quantized)


class TestServing:
    def lines(self, model_type: str, *remarks: str, out: str = "out") -> tuple[str, ...]:
        model = SimpleNamespace(model_type=model_type, class_name="SomeForCausalLM", code=())
        return serving_lines(SimpleNamespace(model=model), Path(out), remarks)  # type: ignore[arg-type]

    def test_only_tested_architectures_are_served_with_vllm(self) -> None:
        assert self.lines("llama") == ("vllm serve out",)
        assert self.lines("llama", out="-out") == ("vllm serve ./-out",)
        assert self.lines("unheard_of") == (
            "from transformers import SomeForCausalLM; "
            "model = SomeForCausalLM.from_pretrained('out', device_map='auto')",
        )

    def test_warnings_about_readers_count(self) -> None:
        no_vllm = "warning: vLLM 0.32 does not load this scheme: a"
        assert "transformers import SomeForCausalLM" in self.lines("llama", no_vllm)[0]
        zero_points = "warning: transformers 5.24 loads packed zero points only with quantization_config="
        zero_points += "CompressedTensorsConfig(dequantize=True): a"
        assert "quantization_config=CompressedTensorsConfig(dequantize=True))" in self.lines("x", zero_points)[0]
        neither = self.lines("llama", no_vllm, "warning: transformers 5.17 does not load experts: b")
        assert neither[0].startswith("none of the tested programs")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["quantise"], "Did you mean 'quantize', 'dequantize'?"),
        (["evalute"], "Did you mean 'evaluate'?"),
        (["oneshot", "x"], "use seqbuild quantize MODEL --scheme W4A16 -o OUT"),
        (["--model", "X", "--scheme", "W4A16"], "options come after a command, as in seqbuild quantize MODEL"),
    ],
)
def test_a_wrong_command_suggests_the_right_one(call: Call, arguments: list[str], part: str) -> None:
    assert_refused(call(*arguments), part, program="seqbuild")


def test_the_host_names_the_compilers_commands(call: Call) -> None:
    result = call("quantize", "x", main=runtime.cli.app.main)
    assert_refused(result, "it is a command of the compiler: seqbuild quantize")


def test_the_help_lists_every_command_once(call: Call) -> None:
    for app, main in ((seqbuild.cli.app, seqbuild.cli.app.main), (runtime.cli.app, runtime.cli.app.main)):
        code, printed, _ = call("--help", main=main)
        listed = [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and line[2:3].islower()]
        sections = app.app.info.cls.sections.values()
        names = [name for section in sections for name in section]
        assert code == 0 and [name for name in listed if name in names] == names
    first = ["calibrate", "sweep", "join", "report", "evaluate", "dequantize", "plan", "search"]
    assert names == [*first, "recipes", "check", "doctor"]


def test_compile_prints_a_command_that_runs(call: Call, llama_dir: Path) -> None:
    code, printed, _ = call("compile", llama_dir)
    (line,) = (line for line in printed.splitlines() if line.startswith("next: "))
    program, *command = shlex.split(line.removeprefix("next: "))
    assert (code, program) == (0, "seqbuild")
    assert call(*command, *FEW)[0] == 0
    assert Path("tiny llama-W4A16/config.json").is_file()
    code, printed, _ = call("compile", llama_dir / "config.json")
    assert code == 0


def test_plan_doctor_and_pack_accept_presets(call: Call, llama_dir: Path) -> None:
    artifact = Path(json.loads(call("compile", llama_dir, "--json")[1])["path"])
    assert call("plan", artifact, "--recipe", "nvfp4", *FEW)[0] == 0
    assert_refused(call("plan", artifact, "--recipe", "nvfp"), "did you mean NVFP4?", program="seqbuild")
    code, printed, _ = call("doctor", artifact, "--weights", llama_dir, "--recipe", "FP8_DYNAMIC", "-o", "out")
    assert code == 0 and "21 modules will be quantized" in printed
    assert call("pack", artifact, "--recipe", "FP8_DYNAMIC", "--weights", llama_dir, "-o", "bundle")[0] == 0
    assert "scheme: FP8_DYNAMIC" in Path("bundle/recipe.yaml").read_text()
    assert call("calibrate", "bundle", main=runtime.cli.app.main)[0] == 0
    _, printed, _ = call("recipes", "fp8_dynamic")
    Path("W4A16").write_text(printed)
    call_with_file = call("calibrate", artifact, "--weights", llama_dir, "--recipe", "W4A16", "-o", "from-file")
    assert call_with_file[0] == 0, "a file takes precedence, and this one needs no data"


def test_the_cache_can_be_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SEQBUILD_CACHE", "~/cache")
    assert user_artifacts() == tmp_path / "cache" / "artifacts"
