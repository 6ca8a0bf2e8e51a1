"""Give this project's checkpoints to vLLM and transformers, and compare what they compute with `runtime evaluate`.

    python tests/clients/readers.py [--folder .clients] [--only PATTERN] [--update]

`--update` writes the tables of docs/readers.md. The exit code is 1 if a reader does otherwise than
`runtime/quantize/reader_limits.py` says. What was found for a checkpoint is kept in the folder, and found again for
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import transformers  # noqa: E402
from clients.checkpoints import Made, Workshop  # noqa: E402
from clients.environments import python_of, why_not_vllm  # noqa: E402
from clients.models import MODELS  # noqa: E402
from clients.report import update  # noqa: E402
from clients.schemes import CACHE, MIXED, SCHEMES  # noqa: E402

HERE = Path(__file__).resolve().parent
DENSE = tuple(name for name, model in MODELS.items() if model is None or model.kind == "dense")
OTHERS = tuple(name for name in MODELS if name not in DENSE)
ON_CPU = ("", "W4A16", "W4A16_ASYM", "W8A8", "W4A8", "FP8_DYNAMIC", MIXED, CACHE)
EVERYTHING = ("llama (demo)", "qwen3_moe")  # the others are not given what differs from other schemes by its bits alone
ALIKE = ("W2A16", "W3A16", "MXFP4A16")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a reader may be away: the mean difference of log-probabilities, and the relative one of perplexity.

    bf16 sums in another order move log-probabilities by 0.01 on the average here. Inputs that are rounded to 8 bits
    turn some of these differences into whole steps; a cache that is cut off instead of rounded moves all of them one
    way.
    """

    mean: float
    perplexity: float


def limits_of(scheme: str) -> Limits:
    """The noise that is taken for none."""
    if scheme == CACHE:
        return Limits(mean=0.15, perplexity=0.03)
    if scheme in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8"):
        return Limits(mean=0.09, perplexity=0.01)
    if scheme in ("W8A8", "W4A8", MIXED):
        return Limits(mean=0.07, perplexity=0.005)
    return Limits(mean=0.03, perplexity=0.003)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one reader makes of one checkpoint: `equal`, `differs`, `refused`, `loads` or `incomplete`, and details."""

    reader: str
    made: Made
    verdict: str
    details: str
    perplexity: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.verdict in ("equal", "loads")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".clients", help="environments and checkpoints")
    parser.add_argument("--only", default="", help="a regular expression for `model | scheme`")
    parser.add_argument("--update", action="store_true", help="write the tables of docs/readers.md")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    workshop = Workshop(folder / "work")
    wanted = [
        (model, scheme)
        for model in MODELS
        for scheme in ("", *SCHEMES)
        if is_wanted(model, scheme) and re.search(arguments.only, f"{model} | {scheme}")
    ]
    made = list(made_of(workshop, wanted))
    found = [*of_transformers(folder, workshop, made), *of_vllm(folder, workshop, made)]
    wrong = [text for entry in found for text in contradictions(entry)]
    for entry in found:
        print(f"{entry.made.name:32} {entry.reader:18} {entry.verdict:10} {entry.details}")
    if arguments.update:
        update(ROOT / "docs" / "readers.md", found, why_not_vllm())
    for text in wrong:
        print(f"UNEXPECTED: {text}")
    print(f"{len(found)} checks, {len(wrong)} unexpected" + (f"; no vLLM: {why_not_vllm()}" if why_not_vllm() else ""))
    return 1 if wrong else 0


def is_wanted(model: str, scheme: str) -> bool:
    """What is tried: everything with some models, what vLLM runs with the dense ones."""
    return model in EVERYTHING or scheme in ON_CPU or (model in OTHERS and scheme not in ALIKE)


def made_of(workshop: Workshop, wanted: Sequence[tuple[str, str]]) -> Iterator[Made]:
    for model, scheme in wanted:
        made = workshop.make(model, scheme)
        if made.error:
            print(f"{made.name:32} not made: {made.error}", flush=True)
        else:
            yield made


def of_transformers(folder: Path, workshop: Workshop, made: Sequence[Made]) -> Iterator[Found]:
    """Both versions run everything."""
    cases = [case_of(workshop, entry) for entry in made]
    pythons = [Path(sys.executable), python_of("transformers", folder)]
    for python in pythons:
        results = run(folder, workshop, python, "read_transformers.py", cases)
        for entry in made:
            result = results[digest_of(entry)]
            yield judged(f"transformers {short(result['version'])}", entry, result)


def of_vllm(folder: Path, workshop: Workshop, made: Sequence[Made]) -> Iterator[Found]:
    """It runs what it has kernels for, and loads what it has none for."""
    if why_not_vllm():
        return
    cases = []
    for entry in made:
        is_run = entry.model in DENSE and entry.scheme in ON_CPU
        if is_run or entry.scheme:
            options = {"kv_cache_dtype": "fp8"} if entry.scheme == CACHE else {}
            cases.append({**case_of(workshop, entry), "mode": "compute" if is_run else "load", "options": options})
    results = run(folder, workshop, python_of("vllm", folder), "read_vllm.py", cases)
    for entry in made:
        result = results.get(digest_of(entry))
        if result is None:
            continue
        # vLLM 0.32 on the CPU leaves the inputs of W4A8 as they are: it has to agree with a reader that does, too.
        plain = workshop.without_input_rounding(entry) if entry.scheme == "W4A8" and "logprobs" in result else entry
        yield judged(f"vLLM {short(result['version'])}", plain, result)


def run(
    folder: Path, workshop: Workshop, python: Path, script: str, cases: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Results by the digest of a checkpoint; those that are kept are not made again."""
    known_as = f"{Path(script).stem}-{hashlib.sha256(str(python).encode()).hexdigest()[:8]}.jsonl"
    results = folder / "results" / known_as
    results.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(len(cases) + 1):  # a reader that dies in one case is started again for the others
        kept = read_results(results)
        left = [case for case in cases if case["name"] not in kept]
        if not left:
            break
        job = results.with_suffix(".job.json")
        windows = {name: ids.tolist() for name, ids in workshop.windows.items()}
        job.write_text(json.dumps({"windows": windows, "cases": left}))
        with results.with_suffix(".log").open("w") as log:
            done = subprocess.run([str(python), str(HERE / script), str(job), str(results)], stdout=log, stderr=log)
        after = read_results(results)
        first = next((case for case in left if case["name"] not in after), None)
        if first is not None and done.returncode:
            version = next(iter(after.values()), {"version": "?"})["version"]
            line = {"name": first["name"], "version": version, "error": f"the process died: {done.returncode}"}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    kept = read_results(results)
    return {case["name"]: kept[case["name"]] for case in cases}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {entry["name"]: entry for entry in map(json.loads, lines)}


def case_of(workshop: Workshop, made: Made) -> dict[str, Any]:
    return {
        "name": digest_of(made),
        "directory": str(made.directory),
        "windows": workshop.windows_of(made.model),
    }


def digest_of(made: Made) -> str:
    """Of what a reader is given, and how."""
    digest = hashlib.sha256(f"{made.scheme == CACHE}".encode())
    for name in ("config.json", "model.safetensors"):
        digest.update((made.directory / name).read_bytes())
    return digest.hexdigest()


def judged(reader: str, made: Made, result: dict[str, Any]) -> Found:
    """Compare with what the runtime computes."""
    if "error" in result:
        return Found(reader=reader, made=made, verdict="refused", details=result["error"])
    if "logprobs" not in result:
        missing = [name for name in result["missing"] if not is_allowed(made, name)]
        schemes = ", ".join(f"{count} {name}" for name, count in sorted(result["schemes"].items()))
        verdict = "incomplete" if missing else "loads"
        return Found(reader=reader, made=made, verdict=verdict, details=", ".join(missing[:3]) or schemes)
    pairs = list(zip(flat(result["logprobs"]), flat(made.logprobs or []), strict=True))
    mean = sum(abs(theirs - ours) for theirs, ours in pairs) / len(pairs)
    perplexity = math.exp(-sum(theirs for theirs, _ in pairs) / len(pairs))
    ratio = perplexity / made.perplexity - 1
    limits = limits_of(made.scheme)
    is_equal = mean <= limits.mean and abs(ratio) <= limits.perplexity
    details = f"log-probabilities differ by {mean:.4f}, perplexity {perplexity:.3f} by {100 * ratio:+.2f} %"
    verdict = "equal" if is_equal else "differs"
    return Found(reader=reader, made=made, verdict=verdict, details=details, perplexity=perplexity)


def is_allowed(made: Made, name: str) -> bool:
    """Parameters that vLLM has and that nothing fills: NVFP4A16 rounds no inputs, biases and sinks may be absent."""
    return made.scheme == "NVFP4A16" and name.endswith("input_global_scale")


def contradictions(found: Found) -> Iterator[str]:
    """Where a reader does otherwise than the runtime's table says."""
    name, version = found.reader.split()
    told = [re.match(r"warning: (\w+) ([0-9.]+)(?: and ([0-9.]+))? ", text) for text in found.made.warnings]
    is_warned = any(match is not None and match[1] == name and version in match.groups() for match in told)
    if is_warned == found.is_good and not is_slight(found):
        yield f"{found.reader}: {found.made.name}: {found.verdict} ({found.details}), warned of: {is_warned}"


def is_slight(found: Found) -> bool:
    """Inputs of experts, or a cache, that a reader does not round: the difference may be less than noise."""
    return found.verdict == "equal" and (found.made.scheme == CACHE or found.made.model in OTHERS)


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def short(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
