"""Compile every architecture of the zoo and write docs/coverage.md: `make coverage`.

Arguments are parts of case names; none takes all, and only then is the file written.
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from tests.zoo import MAPPINGS, Case, cases
from tests.zoo_check import Row, check

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"


def run(case: Case) -> Row:
    """One case, in a process of its own kind: nothing of it may end the whole table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        return check(case)
    except Exception as error:
        return Row(case=case, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def page(rows: list[Row], num_cases: int) -> str:
    """The table and what it comes to; `num_cases` there are in all."""
    usable = [row for row in rows if not row.problem.startswith("unusable")]
    lines = [
        "# Coverage",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}: {len(rows)} of",
        f"{num_cases} cases. Written by `make coverage`; [architectures.md](architectures.md) explains the columns.",
        "",
        "| mapping | usable | bit for bit | portable |",
        "|---|---:|---:|---:|",
    ]
    for mapping in (*MAPPINGS, "all"):
        found = [row for row in usable if mapping in (row.case.mapping, "all")]
        figures = len(found), sum(_is_well(row) for row in found), sum(row.is_portable for row in found)
        lines.append(f"| {mapping} | {' | '.join(map(str, figures))} |")
    lines += [
        "",
        "| case | class | nodes | subgraphs | equal | deep | portable | foreign | sdpa | opaque | seconds | problem |",
        "|---|---|---:|---:|---|---|---|---|---|---|---:|---|",
    ]
    for row in rows:
        portable = "yes" if row.is_portable else "no" if row.deep else ""
        facts = (row.case.name, row.case.class_name, row.nodes, row.subgraphs, row.equal, row.deep, portable)
        more = (row.foreign, row.sdpa, row.opaque, f"{row.seconds:.1f}", row.problem.replace("|", "/"))
        lines.append("| " + " | ".join(map(str, (*facts, *more))) + " |")
    return "\n".join(lines) + "\n"


def _is_well(row: Row) -> bool:
    return not row.problem and row.equal == row.deep == "bit for bit"


def main() -> int:
    """Exit code 1 when a usable case is not equal."""
    wanted = sys.argv[1:]
    chosen = [case for case in cases() if not wanted or any(part in case.name for part in wanted)]
    rows: list[Row] = []
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for row in pool.map(run, chosen):
            rows.append(row)
            print(f"{row.case.name}: {row.problem or row.equal}, sdpa {row.sdpa or '-'}", flush=True)
            if not wanted:
                PAGE.write_text(page(rows, len(chosen)), encoding="utf-8")
    tally = Counter("well" if _is_well(row) else "unusable" if "unusable" in row.problem else "bad" for row in rows)
    print(f"{tally['well']} well, {tally['bad']} not, {tally['unusable']} unusable")
    return int(tally["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
