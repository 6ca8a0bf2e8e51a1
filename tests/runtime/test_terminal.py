"""What both command lines show on a terminal, through a pseudo terminal of a given width."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime.cli.app
import runtime.console
import runtime.status
import seqbuild.cli.app
from runtime.console import say
from runtime.status import doing, status_line
from runtime.streaming.display import Display
from runtime.streaming.run import StreamingRun
from runtime.terminal import Column, Names, flowed, shortened, table_lines
from tests.runtime.place import Place

LONG = "model.language_model.layers.12.self_attn.q_proj"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A pseudo terminal in place of standard output and standard error.

    Attributes:
        shown: everything that was written to it.
    """

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115 - closed below
        self.shown = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):  # the slave is closed
            while chunk := os.read(self._master, 65536):
                data += chunk
        self.shown = data.decode()

    def close(self) -> None:
        self.stream.close()
        self._thread.join()
        os.close(self._master)

    @property
    def rows(self) -> list[str]:
        """The lines that are left when everything that was erased is gone."""
        rows, column, row = [""], 0, 0
        for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", self.shown):
            if part == "\n":
                row += 1
                rows += [""] * (row + 1 - len(rows))
            elif part == "\r":
                column = 0
            elif part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                rows[row] = ""
            elif not part.startswith("\x1b"):
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
        return [text.rstrip() for text in rows if text.strip()]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, Terminal]]]:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def call(main: Callable[..., Any], *arguments: Any, columns: int = 80) -> tuple[int, Terminal]:
        terminal = Terminal(columns)
        try:
            with contextlib.redirect_stdout(terminal.stream), contextlib.redirect_stderr(terminal.stream):
                code = main(*arguments)
        finally:
            terminal.close()
        return code, terminal

    yield call


class TestTables:
    COLUMNS = (
        Column(heading="module", is_flexible=True),
        Column(heading="calls", is_flexible=True, dropped=1),
        Column(heading="size", is_number=True),
    )
    ROWS = ((LONG, Names((LONG, "lm_head"), 3), "1.5 MB"), ("lm_head", Names(("-",)), "12.0 kB"))

    def test_a_file_gets_everything(self) -> None:
        assert list(table_lines(self.COLUMNS, self.ROWS)) == [
            f"module{' ' * 43}calls{' ' * 67}size",
            f"{LONG}  {LONG}, lm_head and 3 more   1.5 MB",
            f"lm_head{' ' * 42}-{' ' * 68}12.0 kB",
        ]

    @pytest.mark.parametrize("width", [21, 24, 40, 60, 80, 100, 200])
    def test_rows_fit_and_say_what_they_leave_out(self, width: int) -> None:
        lines = list(table_lines(self.COLUMNS, self.ROWS, width))
        assert all(len(line) <= width for line in lines[:3]), lines
        assert ("calls" in lines[0]) == (lines[-1] != "(not shown at this width: calls)")
        assert all(size in line for size, line in zip(("1.5 MB", "12.0 kB"), lines[1:], strict=False))

    def test_the_ends_of_a_name_stay(self) -> None:
        assert shortened(LONG, 21) == "model.lang…ttn.q_proj"
        assert shortened(LONG, 80) == LONG
        assert shortened("層層層層", 5) == "層…層"  # each takes two columns

    def test_a_list_gives_its_first_names_and_a_number(self) -> None:
        names = Names(("add [batch]", "view [batch]"), 2, brief=("add", "view"))
        assert [names.within(width) for width in (40, 20, 8)] == [str(names), "add, view +2", "add +3"]


class TestText:
    def test_words_do_not_break_and_the_line_stays_one(self, show: Callable[..., Any]) -> None:
        text = f"warning: {LONG} saw fewer tokens than input features, pass --samples 512 and /a/long/path/to/it"

        def main() -> int:
            say(text)
            say(f"{'ok':8} {text}")
            return 0

        for columns in (60, 80):
            _, terminal = show(main, columns=columns)
            for line in terminal.shown.split("\r\n")[:2]:
                rows = [line[start : start + columns] for start in range(0, len(line), columns)]
                assert " ".join(" ".join(rows).split()) in (text, f"ok {text}"), rows
        assert all(row.startswith(" " * 9) for row in rows[1:])

    def test_a_word_longer_than_a_row_is_left_to_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("runtime.terminal.width_of", lambda stream: 20)
        monkeypatch.setattr("runtime.terminal.is_terminal", lambda stream: True)
        assert flowed(f"see {'x' * 50} there", None) == f"see {'x' * 50} there"

    def test_other_outputs_are_unchanged(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setenv("COLUMNS", "20")
        say(LONG + " " + LONG)
        assert capsys.readouterr().out == f"{LONG} {LONG}\n"


class TestStatus:
    def test_it_appears_and_is_gone_before_other_text(
        self, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("runtime.status._DELAY_S", 0.0)
        drawn = threading.Event()
        rendered = runtime.status._StatusLine._rendered
        monkeypatch.setattr("runtime.status._StatusLine._rendered", lambda line: (drawn.set(), rendered(line))[1])

        def main() -> int:
            with status_line("loading"):
                doing("planning \x1b]0;name\x07")
                assert drawn.wait(10)
                runtime.console.warn("text")
            return 0

        _, terminal = show(main)
        assert r"planning \x1b]0;name\x07" in terminal.shown
        assert terminal.rows == ["warning: text"]
        assert terminal.shown.count(HIDE_CURSOR) == terminal.shown.count(SHOW_CURSOR) > 0

    def test_it_returns_below_what_was_printed(self, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("runtime.status._DELAY_S", 0.0)
        drawn = threading.Semaphore(0)
        rendered, texts = runtime.status._StatusLine._rendered, []

        def noted(line: Any) -> Any:
            found = rendered(line)
            texts.append(found.plain)
            drawn.release()
            return found

        monkeypatch.setattr("runtime.status._StatusLine._rendered", noted)

        def main() -> int:
            with status_line("loading"):
                assert drawn.acquire(timeout=10)
                say("quantizing")
                texts.clear()
                while not texts:
                    assert drawn.acquire(timeout=10)
                return 0

        _, terminal = show(main)
        assert (terminal.rows, texts[0]) == (["quantizing"], "loading")

    def test_a_quick_command_shows_none(self, show: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        code, terminal = show(seqbuild.cli.app.main, ["cache", "ls", "-o", str(tmp_path / "empty")])
        assert (code, "\x1b" in terminal.shown, terminal.rows[-1]) == (0, False, "0 artifacts, 0 B")

    def test_outside_of_a_command_line_nothing_is_shown(self, show: Callable[..., Any]) -> None:
        assert show(lambda: doing("planning") or 0)[1].shown == ""


class TestCommands:
    @pytest.mark.parametrize("columns", [60, 80, 200])
    def test_tables_of_inspect_and_plan(self, place: Place, show: Callable[..., Any], columns: int) -> None:
        for main, command in ((seqbuild.cli.app.main, "inspect"), (runtime.cli.app.main, "plan")):
            code, terminal = show(main, [command, str(place.artifact)], columns=columns)
            assert code == 0
            table = [row for row in terminal.rows if re.match(r"subgraph|\d+  +\S|model\.|lm_head", row)]
            assert len(table) > 3
            assert max(map(len, table)) <= columns

    def test_calibrate_names_its_phases_and_leaves_a_line_for_each_subgraph(
        self, place: Place, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        phases = []
        told = Display.tell

        def tell(display: Display, event: str, **facts: Any) -> None:
            told(display, event, **facts)
            if event == "phase":
                phases.append(facts["phase"])
                assert display._live is not None
                display._live.refresh()

        monkeypatch.setattr(Display, "tell", tell)
        code, terminal = show(runtime.cli.app.main, place.calibrate())
        assert code == 0
        assert phases[:6] == ["read weights", "quantize", "measure", "quantize", "propagate", "write"]
        assert "[1/4] model.layers.0: measure" in terminal.shown
        steps = [row for row in terminal.rows if row.startswith("[")]
        assert [step.partition(":")[0] for step in steps] == [
            *(f"[{number + 1}/4] model.layers.{number}" for number in range(3)),
            "[4/4] lm_head, model.norm",
        ]
        assert max(len(row) for row in terminal.rows if row.startswith(("[", "  "))) <= 80
        assert not any("━" in row for row in terminal.rows)

    def test_an_error_before_the_first_step_finds_no_bar(self, place: Place, show: Callable[..., Any]) -> None:
        (place.weights / "model.safetensors").unlink()
        code, terminal = show(runtime.cli.app.main, place.calibrate())
        assert (code, "━" in terminal.shown) == (2, False)
        assert terminal.rows[0].startswith("runtime: error: ")

    def test_an_interrupted_run_leaves_a_clean_terminal(
        self, place: Place, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attempt = StreamingRun._attempt

        def interrupted(run: StreamingRun, step: Any, **options: Any) -> None:
            if step.index == 1:
                raise KeyboardInterrupt
            attempt(run, step, **options)

        monkeypatch.setattr(StreamingRun, "_attempt", interrupted)
        code, terminal = show(runtime.cli.app.main, place.calibrate())
        assert code == 130
        assert any(row.startswith("[1/4] model.layers.0: 7 modules") for row in terminal.rows)
        assert terminal.rows[-1].startswith("runtime: interrupted;")
        assert not any("━" in row for row in terminal.rows)
        assert terminal.shown.rindex(SHOW_CURSOR) > terminal.shown.rindex(HIDE_CURSOR)
        assert terminal.shown.endswith("\r\n")

    @pytest.mark.parametrize("term", ["dumb", ""])
    def test_a_terminal_without_a_cursor_gets_lines(
        self, place: Place, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, term: str
    ) -> None:
        monkeypatch.setenv("TERM", term)
        code, terminal = show(runtime.cli.app.main, place.calibrate())
        assert (code, "\x1b" in terminal.shown) == (0, False)
        assert sum(row.startswith("[") for row in terminal.rows) == 4


def test_without_the_signs_of_unicode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "ascii").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say("‖WX−QX‖ of model…q_proj, é")
    assert (tmp_path / "ascii").read_text() == "|WX-QX| of model~q_proj, \\xe9\n"
