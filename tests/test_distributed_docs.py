"""Commands of docs/distributed.md, of the files of examples/ that it names, and of torchrun in docs/migrate.md."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from torch.distributed.run import get_args_parser

import runtime.cli.app
import seqbuild.cli.app

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "distributed.md"
SLURM, KUBERNETES, SKYPILOT = (
    ROOT / "examples" / name for name in ("slurm.sbatch", "kubernetes.yaml", "skypilot.yaml")
)
PROGRAMS = {"seqbuild": seqbuild.cli.app.app, "seqbuild-runtime": runtime.cli.app.app}
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
# Directives of sbatch in the example, from its manual.
_SBATCH = (
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "requeue"),
    *("open-mode", "output"),
)


def lines_of(text: str) -> list[str]:
    """Commands of a shell text: continued lines joined, comments and empty lines left out."""
    whole = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in whole if line.strip() and not line.strip().startswith("#")]


def documented() -> Iterator[str]:
    """Commands in the indented blocks of the documents."""
    for path in (DOCUMENT, DOCUMENT.with_name("migrate.md")):
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
            yield from (line for line in lines_of(block) if not line.startswith("runtime: error:"))


def skypilot() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    return found


def pod() -> dict[str, Any]:
    """The only container of the Kubernetes example."""
    _, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    [container] = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def with_programs() -> list[str]:
    """Every command of the document and of the examples that starts one of our programs."""
    texts = [*documented(), shlex.join(pod()["command"])]
    texts += [*lines_of(SLURM.read_text(encoding="utf-8"))]
    texts += [line for part in ("setup", "run") for line in lines_of(skypilot()[part])]
    texts += re.findall(r"^#   (seqbuild.*)$", SKYPILOT.read_text(encoding="utf-8"), re.MULTILINE)
    return [text for text in texts if re.search(r"\b(runtime|seqbuild)\b", text) and not text.startswith("cd ")]


def program_of(words: list[str]) -> tuple[str, list[str], Any]:
    """The program that a command starts, its arguments, and the options of torchrun if it is started by it."""
    words = [_VARIABLE.sub("2", word) for word in words]
    while _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if words[0] == "srun":
        words = words[words.index("torchrun") :]
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        assert options.module != options.no_python
        name = {"runtime": "seqbuild-runtime"}.get(options.training_script, options.training_script)
        return name, options.training_script_args, options
    if words[:3] == ["python", "-m", "runtime"]:
        return "seqbuild-runtime", words[3:], None
    return words[0], words[1:], None


def parse(program: str, arguments: list[str]) -> dict[str, Any]:
    """Parse a command line as the program does, and return its options."""
    group: Any = typer.main.get_command(PROGRAMS[program])
    context = group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    options: dict[str, Any] = context.params
    return options


@pytest.mark.parametrize("text", with_programs())
def test_every_command_parses(text: str) -> None:
    program, arguments, options = program_of(shlex.split(text))
    assert program in PROGRAMS, text
    parsed = parse(program, arguments)
    if options is not None:
        assert arguments[0] in ("calibrate", "evaluate")
        assert options.standalone == (options.nnodes == "1:1")
        assert options.standalone or options.rdzv_endpoint or options.master_port, "how do the nodes find each other?"
        assert not (parsed.get("parts") and options.rdzv_endpoint), "a node would change its rank when it restarts"


def test_the_commands_are_found() -> None:
    commands = with_programs()
    assert len(commands) == len(set(commands))
    started = [program_of(shlex.split(text)) for text in commands]
    assert {arguments[0] for _, arguments, _ in started} >= {"calibrate", "evaluate", "plan", "join", "pack", "doctor"}
    assert len([options for _, _, options in started if options is not None]) >= 10


@pytest.mark.parametrize(
    "text",
    [
        "torchrun --nproc-per-node 2 -m runtime calibrate ARTIFACT --no-such-option",
        "torchrun --no-such-option -m runtime calibrate ARTIFACT",
        "seqbuild-runtime join --no-such-option",
        "seqbuild plan ARTIFACT --workers many",
    ],
)
def test_a_wrong_command_does_not_parse(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt() -> None:
        program, arguments, _ = program_of(shlex.split(text))
        parse(program, arguments)

    assert_refused(attempt)


def assert_refused(attempt: Callable[[], None]) -> None:
    try:
        attempt()
    except (Exception, SystemExit) as error:
        assert hasattr(error, "format_message") or error.args == (2,), repr(error)  # typer's, or torchrun's
    else:
        pytest.fail("it parses")


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_torchrun_passes_every_option_on(command: str) -> None:
    """It takes an abbreviation of its own options for an error, also behind the name of the program."""
    group: Any = typer.main.get_command(PROGRAMS["seqbuild-runtime"])
    for parameter in group.commands[command].params:
        assert any(map(is_passed_on, parameter.opts)), parameter.opts


def is_passed_on(option: str) -> bool:
    arguments = ["calibrate", "ARTIFACT", option, "VALUE"]
    try:
        options = get_args_parser().parse_args(["--standalone", "-m", "runtime", *arguments])
    except SystemExit:
        return False
    return bool(options.training_script_args == arguments)


@pytest.mark.parametrize("text", [SLURM.read_text(), skypilot()["setup"], skypilot()["run"]], ids=("slurm", "s", "r"))
def test_scripts_are_valid_shell(text: str) -> None:
    found = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_directives_of_slurm_are_known() -> None:
    text = SLURM.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    directives = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert directives == list(_SBATCH)
    assert text.index("#SBATCH") < text.index("set -e")  # later ones are ignored


def test_the_job_of_kubernetes_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    name, spec = job["metadata"]["name"], job["spec"]
    _, _, options = program_of(pod()["command"])
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(options.nproc_per_node) == pod()["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"  # a service without an address: the pods have names
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    template = spec["template"]["spec"]
    assert options.rdzv_endpoint == f"{name}-0.{template['subdomain']}:29500"
    assert template["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in pod()["volumeMounts"]} == {volume["name"] for volume in template["volumes"]}


def test_the_task_of_skypilot_uses_variables_that_exist() -> None:
    """Names from SkyPilot's documentation of distributed jobs."""
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK"}
    task = skypilot()
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) <= known
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}


def test_the_examples_are_linked() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for path in (SLURM, KUBERNETES, SKYPILOT):
        assert f"](../examples/{path.name})" in text
    for page in ("docs/usage.md", "docs/README.md"):
        assert "](distributed.md)" in (ROOT / page).read_text(encoding="utf-8"), page
    assert "docs/distributed.md" in (ROOT / "README.md").read_text(encoding="utf-8")
