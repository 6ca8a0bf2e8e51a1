"""Open the pages that seqbuild writes in a headless Chromium: charts, themes, a phone, print, and hostile names.

    python tests/clients/browser.py [FOLDER]

Makes real runs of the demo's model and of a small mixture, and saves screenshots in `.clients/browser/` or FOLDER. A
page may log no error, ask for no address, and must draw every chart.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from clients.devtools import Tab, browser, find_browser  # noqa: E402
from clients.models import DEMO, make_model  # noqa: E402

from runtime.data.token_file import DataOrigin, save_tokens  # noqa: E402
from runtime.report.compare_page import comparison_page  # noqa: E402
from runtime.report.page import report_page  # noqa: E402
from tests.runtime.report.hostile import HOSTILE_NAMES, hostile_facts, large_facts  # noqa: E402

MOST_BYTES = 12 * 10**6
PHONE, DESKTOP = 360, 1200
_MOE_RECIPE = """GPTQModifier:
  targets: Linear
  scheme: W4A16
  ignore: [lm_head, "re:.*mlp.gate$"]
  fallback: rtn
"""
_MARKS = ".heatmaplayer image, .barlayer path"
_DRAWN = f"[...document.querySelectorAll('div.plot')].every((plot) => plot.querySelector('{_MARKS}'))"
_HEAT_MAPS = "document.querySelectorAll('.heatmaplayer image').length"
_WIDTH = "document.documentElement.scrollWidth - innerWidth"
_BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A page, and what it must show."""

    name: str
    path: Path
    has_charts: bool = True
    has_table: bool = False


def main() -> int:
    find_browser()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".clients" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    pages = list(make_pages(folder))
    problems = []
    with browser() as tab:
        for page in pages:
            start = time.monotonic()
            found = list(problems_of(page, tab, folder))
            problems += [f"{page.name}: {problem}" for problem in found]
            size = page.path.stat().st_size / 1e6
            print(f"{page.name:12} {size:5.1f} MB {time.monotonic() - start:5.1f} s  {'; '.join(found) or 'good'}")
    print(f"screenshots: {folder}")
    return 1 if problems else 0


def make_pages(folder: Path) -> Iterator[Opened]:
    """Run the command line, and write the pages."""
    demo, eight, moe = folder / "demo", folder / "demo-w8a8", folder / "moe"
    if not eight.with_name("demo-w8a8.report.html").exists():
        quantize(DEMO, demo, "--scheme", "W4A16", "--samples", "16")
        quantize(DEMO, eight, "--scheme", "W8A8", "--samples", "16", "--no-evaluate")
    if not moe.with_name("moe.report.html").exists():
        model = make_model("qwen3_moe", folder / "model-moe")
        tokens, recipe = folder / "tokens.safetensors", folder / "moe.yaml"
        generator = torch.Generator().manual_seed(0)
        samples = [torch.randint(3, 512, (64,), generator=generator) for _ in range(2)]
        save_tokens(
            tokens,
            samples,
            seq_len=64,
            origin=DataOrigin(tokenizer="random", tokenizer_digest="", vocab_size=512, sources=()),
        )
        recipe.write_text(_MOE_RECIPE)
        own = ("--no-moe-calibrate-all-experts", "--no-evaluate", "--data", str(tokens))
        quantize(model, moe, "--recipe", str(recipe), *own)
    yield Opened(name="demo", path=folder / "demo.report.html", has_table=True)
    yield Opened(name="moe", path=folder / "moe.report.html", has_table=True)
    seqbuild("report", demo, "--compare", eight, "-o", folder / "compare.html")
    yield Opened(name="compare", path=folder / "compare.html")
    artifact = next((folder / "artifacts").glob("model-moe-*"))
    seqbuild("inspect", artifact, "--html", folder / "chain.html")
    yield Opened(name="chain", path=folder / "chain.html", has_charts=False)
    hostile, large = hostile_facts(), large_facts(20_000)
    written = {"hostile": report_page(hostile), "large": report_page(large)}
    written["odd-pair"] = comparison_page(hostile, large, (HOSTILE_NAMES[0], HOSTILE_NAMES[1]))
    for name, data in written.items():
        path = folder / f"{name}.html"
        path.write_bytes(data)
        yield Opened(name=name, path=path, has_table=name != "odd-pair")


def quantize(model: Path, out: Path, *options: str) -> None:
    subprocess.run(["rm", "-rf", str(out)], check=True)
    seqbuild("quantize", model, "-o", out, "--artifacts", out.parent / "artifacts", *options)


def seqbuild(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "seqbuild", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def problems_of(page: Opened, tab: Tab, folder: Path) -> Iterator[str]:
    """Open a page in each way, save a screenshot of each, and yield what is wrong."""
    if page.path.stat().st_size > MOST_BYTES:
        yield f"it has {page.path.stat().st_size:,} bytes"
    views = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False)}
    for view, (width, is_dark) in views.items():
        tab.complaints.clear()
        tab.requests.clear()
        tab.open(page.path, width=width, dark=is_dark)
        tab.screenshot(folder / f"{page.name}-{view}.png")
        yield from (f"{view}: {complaint[:300]}" for complaint in tab.complaints)
        yield from (f"{view}: it asked for {url[:200]}" for url in tab.requests)
        yield from (f"{view}: {problem}" for problem in shown_problems(page, tab, is_dark))
    tab.open(page.path)
    tab.print(folder / f"{page.name}.pdf")
    if not (folder / f"{page.name}.pdf").read_bytes().startswith(b"%PDF"):
        yield "it cannot be printed"
    yield from used_problems(page, tab)


def shown_problems(page: Opened, tab: Tab, is_dark: bool) -> Iterator[str]:
    """What is wrong with a page as it is shown."""
    if tab.run(_WIDTH) > 0:
        yield f"it is {tab.run(_WIDTH)} pixels wider than the window"
    if tab.run("window.hacked !== undefined"):
        yield "a name ran as a script"
    if page.has_charts and not (tab.run(_DRAWN) and tab.run(_HEAT_MAPS)):
        yield "a chart is missing"
    channels = [int(part) for part in str(tab.run(_BACKGROUND)).strip("rgb()").split(",")[:3]]
    if (sum(channels) < 3 * 128) != is_dark:
        yield f"its background is {channels}"


def used_problems(page: Opened, tab: Tab) -> Iterator[str]:
    """What is wrong when the page is used."""
    before = tab.run("document.documentElement.dataset.theme")
    tab.run("document.getElementById('theme').click()")
    if tab.run("document.documentElement.dataset.theme") == before:
        yield "its theme does not change"
    tab.run("localStorage.clear()")  # all files share it
    if page.has_table:
        filtered = "document.getElementById('filter')"
        tab.run(f"{filtered}.value = 'q_proj'; {filtered}.dispatchEvent(new Event('input'))")
        names = tab.run("[...document.querySelectorAll('#table tbody th')].map((cell) => cell.textContent)")
        if not names or not all("q_proj" in name for name in names):
            yield "its table is not filtered"


if __name__ == "__main__":
    sys.exit(main())
