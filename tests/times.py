"""Measure the processor time of the tests of each package and write it to docs/architecture.md: `make test-times`.

A pytest plugin counts what each test takes, with its fixtures and the processes that it starts. A file of tests counts
for the package of its folder that it imports most names from.
"""

from __future__ import annotations

import ast
import datetime
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
TITLE = "## Test time per package"
_KEY = "processor_s"


class Times:
    """Measures in each process of pytest; the one that prints the summary adds up.

    Attributes:
        seconds: processor time by file of tests.
        tests: number of tests by file.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()
        self._last = 0.0

    def pytest_collection_finish(self) -> None:
        self._last = _processor_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Add what was used since the last report, of setup, call or teardown, to this one."""
        report = yield
        now = _processor_s()
        report.user_properties.append((_KEY, now - self._last))
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += sum(value for key, value in report.user_properties if key == _KEY)
        self.tests[file] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line("\n".join(self.table()))

    def table(self) -> Iterator[str]:
        """The rows of the table, packages in order of their time."""
        seconds, tests = Counter[str](), Counter[str]()
        for file, value in self.seconds.items():
            package = tested_package(ROOT / file)
            seconds[package] += value
            tests[package] += self.tests[file]
        yield "| package | tests | processor seconds |"
        yield "|---|---:|---:|"
        for package, value in seconds.most_common():
            if tests[package]:
                yield f"| {package} | {tests[package]:,} | {value:.1f} |"
        yield f"| all | {sum(tests.values()):,} | {sum(seconds.values()):.1f} |"


def tested_package(file: Path) -> str:
    """The package that a file of tests is about, with a slash where it is a folder."""
    folder = file.relative_to(ROOT).parts[1]
    if folder not in ("runtime", "seqbuild"):
        return "all (tests/)" if folder.endswith(".py") else f"all (tests/{folder}/)"
    names: Counter[str] = Counter()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{folder}."):
            if node.module == "runtime.errors":  # every test of an error imports it
                continue
            names[".".join(node.module.split(".")[:2])] += len(node.names)
    if not names:
        return folder
    package = names.most_common(1)[0][0].replace(".", "/")
    return f"{package}/" if (ROOT / package).is_dir() else package


def _processor_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Times(), "seqbuild-times")


def main() -> int:
    """Run pytest with this plugin and the arguments of the command line; write the table when all tests pass."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.times", *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines += [line] if line.startswith("|") else []
    if process.returncode == 0:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{TITLE}\n")
        after = rest[rest.find("\n## ") :] if "\n## " in rest else ""
        text = f"Processor time of `make test` on {datetime.date.today()}, written by `make test-times`.\n\n"
        PAGE.write_text(f"{before.rstrip()}\n\n{TITLE}\n\n{text}{''.join(lines)}{after}", encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
