"""Quality, time and memory of all methods beside llm-compressor's and AutoRound's, on the same tokens, in one table.

    python tests/bench/bench_quality.py MODEL CALIB.jsonl EVAL.jsonl --out RESULTS.json [--docs docs/algorithms.md]
        [--llm-compressor PYTHON] [--auto-round PYTHON] [--judge PYTHON] [--only "W3A16"] [--title "demo model"]

All tools get the same windows of the calibration text as token ids. Each method (`quality_recipes`) runs in a process
of its own; seconds and peak memory are of the whole process, imports included. Every checkpoint is then judged by
the same code (`quality_judge`) in one environment, that of `--judge`. Results are kept in --out after each method, so
that an interrupted bench goes on; a method that failed is tried again. `--docs` replaces the table between the
comments `<!-- quality TITLE -->` and `<!-- end of quality -->`.

Columns: perplexity; its difference from GPTQ in the same section, with an interval of 95 % from 10,000 resamples of
windows; mean KL divergence from the original model in nats by token; seconds of clock and processor; peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

from bootstrap import paired_interval  # noqa: E402
from processes import measure  # noqa: E402
from quality_recipes import AUTO_ROUND, LLM_COMPRESSOR, OURS, REFERENCE, Method, methods  # noqa: E402
from quality_tools import AUTO_ROUND as AUTO_ROUND_PROGRAM  # noqa: E402
from quality_tools import LLM_COMPRESSOR as LLM_COMPRESSOR_PROGRAM  # noqa: E402
from quality_tools import OURS as OWN_PROGRAM  # noqa: E402
from quality_tools import staged  # noqa: E402

SEQ_LEN = 256
ORIGINAL = "original"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results; those in it are not made again")
    parser.add_argument("--docs", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--title", help="of the table; by default the model's directory")
    parser.add_argument("--llm-compressor", type=Path, help="a Python with llm-compressor")
    parser.add_argument("--auto-round", type=Path, help="a Python with AutoRound")
    parser.add_argument("--judge", type=Path, default=Path(sys.executable), help="a Python with transformers")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="methods whose section, name and tool contain one of these"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of the results so far")
    chosen = parser.parse_args()
    known: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    if not chosen.table:
        with tempfile.TemporaryDirectory() as folder:
            Bench(chosen, Path(folder), known).run()
    text = "\n".join(table(known))
    print(text)
    if chosen.docs:
        chosen.docs.write_text(replaced(chosen.docs.read_text(), chosen.title or chosen.model.name, text))


class Bench:
    """Runs methods and judges their checkpoints.

    Args:
        chosen: the command line.
        folder: for artifacts and checkpoints.
        known: results of an earlier bench, to which new ones are added.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path, known: dict[str, Any]) -> None:
        self.chosen, self.folder, self.known = chosen, folder, known
        self.pythons = {
            OURS: Path(sys.executable),
            LLM_COMPRESSOR: chosen.llm_compressor,
            AUTO_ROUND: chosen.auto_round,
        }

    def run(self) -> None:
        """Run the methods that have no result yet."""
        from seqbuild.build import build

        wanted = [
            (method, tool)
            for method in methods()
            for tool in method.tools
            if any(part in method.key(tool) for part in self.chosen.only) and self.pythons[tool] is not None
        ]
        missing = [(method, tool) for method, tool in wanted if "nll" not in self.known.get(method.key(tool), {})]
        if not missing and ORIGINAL in self.known:
            return
        self.calib = self._windows("calib", self.chosen.calib, self.chosen.samples)
        self.eval = self._windows("eval", self.chosen.eval, self.chosen.eval_samples)
        self._keep_comparable()
        if ORIGINAL not in self.known:
            self._keep(ORIGINAL, self._judged(self.chosen.model))
        artifact = build(self.chosen.model, out=self.folder / "artifacts").path
        for method, tool in missing:
            self._keep(method.key(tool), self._one(method, tool, artifact))

    def _one(self, method: Method, tool: str, artifact: Path) -> dict[str, Any]:
        """Quantize by one method with one tool, and judge the checkpoint."""
        recipe, out = self.folder / "recipe.yaml", self.folder / "checkpoint"
        recipe.write_text(method.recipe if tool == AUTO_ROUND else staged(method.recipe))
        program = {OURS: OWN_PROGRAM, LLM_COMPRESSOR: LLM_COMPRESSOR_PROGRAM, AUTO_ROUND: AUTO_ROUND_PROGRAM}[tool]
        given = [self.chosen.model, self.calib, recipe, out]
        command = [self.pythons[tool], "-c", program, *([artifact] if tool == OURS else []), *given]
        try:
            cost = measure([str(part) for part in command], threads=self.chosen.threads, cwd=ROOT)
            usage = {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "peak_bytes": cost.peak_bytes}
            return {**usage, **self._judged(out)}
        except SystemExit as error:
            return {"error": last_line(str(error))}
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _judged(self, checkpoint: Path) -> dict[str, Any]:
        judge = Path(__file__).with_name("quality_judge.py")
        command = [self.chosen.judge, judge, self.chosen.model, checkpoint, self.eval]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the checkpoint cannot be judged: {last_line(done.stderr)}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _keep(self, key: str, found: dict[str, Any]) -> None:
        self.known[key] = found
        scratch = self.chosen.out.with_suffix(".new")
        scratch.write_text(json.dumps(self.known))
        scratch.replace(self.chosen.out)
        told = f"perplexity {perplexity(found):.4f}" if "nll" in found else f"error: {found['error']}"
        print(f"{key:60} {told}", file=sys.stderr, flush=True)

    def _keep_comparable(self) -> None:
        """Require that earlier results come from the same windows."""
        same = {"calib": json.loads(self.calib.read_text()), "eval": json.loads(self.eval.read_text())}
        digests = {name: [len(rows), sum(map(sum, rows))] for name, rows in same.items()}
        if self.known.setdefault("windows", digests) != digests:
            raise SystemExit(f"{self.chosen.out} has results of other windows; choose another --out")

    def _windows(self, name: str, path: Path, samples: int) -> Path:
        import runtime

        data = runtime.load_tokens(path, tokenizer_dir=self.chosen.model, num_samples=samples, seq_len=SEQ_LEN)
        target = self.folder / f"{name}.json"
        target.write_text(json.dumps([sample.tolist() for sample in data.samples]))
        return target


def perplexity(found: Mapping[str, Any]) -> float:
    """The perplexity of a result."""
    return math.exp(sum(found["nll"]) / (len(found["nll"]) * found["count"]))


def table(known: Mapping[str, Any]) -> Iterator[str]:
    """Lay out all results as lines of Markdown."""
    if ORIGINAL not in known:
        return
    yield f"Unquantized: {perplexity(known[ORIGINAL]):.3f}, {len(known[ORIGINAL]['nll'])} windows.\n"
    yield "| method | tool | perplexity | against GPTQ, % | KL divergence | wall, s | processor, s | peak, MB |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    section = ""
    for method in methods():
        for tool in method.tools:
            found = known.get(method.key(tool))
            if found is None:
                continue
            if method.section != section:
                section = method.section
                yield f"| **{section}** | | | | | | | |"
            reference = known.get(Method(section=section, name=REFERENCE, recipe="").key(OURS), {})
            yield f"| {method.name} | {tool} | {' | '.join(_cells(found, reference, known[ORIGINAL]))} |"


def _cells(found: Mapping[str, Any], reference: Mapping[str, Any], original: Mapping[str, Any]) -> list[str]:
    if "nll" not in found:
        return [f"error: {found['error'].replace('|', '/')}", *[""] * 5]
    base = reference if "nll" in reference else original
    own, other = ([value / each["count"] for value in each["nll"]] for each in (found, base))
    interval = paired_interval(own, other)
    percent = [100 * math.expm1(value) for value in (interval.mean, interval.low, interval.high)]
    against = "" if base is found else f"{percent[0]:+.2f} ({percent[1]:+.2f} to {percent[2]:+.2f})"
    if base is original:
        against = f"{against} of the original"
    return [
        f"{perplexity(found):.3f}",
        against,
        f"{sum(found['kl']) / (len(found['kl']) * found['count']):.5f}",
        f"{found['wall_s']:.1f}",
        f"{found['cpu_s']:.1f}",
        f"{found['peak_bytes'] / 2**20:.0f}",
    ]


def last_line(text: str) -> str:
    """The last line that is not empty, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it failed without a message"


def replaced(text: str, title: str, lines: str) -> str:
    """Replace the table of a title in a text.

    Raises:
        SystemExit: if the text has no such table.
    """
    start, end = f"<!-- quality {title} -->\n", "<!-- end of quality -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"the file has no lines {start.strip()!r} and {end!r}; add them where the table belongs")
    return f"{before}{start}\n{lines}\n\n{end}{after}"


if __name__ == "__main__":
    main()
