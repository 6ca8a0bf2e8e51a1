"""The progress of a run on a terminal: two lines below the lines of the finished subgraphs.

    [3/32] model.layers.2: measure, batch 12 of 16
    ━━━━━━━━━━╸━━━━━━━━━━━━━━━  9% 0:42 elapsed, 6:20 left, 12,345 tokens/s, 4.1 GB

A narrow terminal leaves out memory and speed, and shortens the names of modules in the middle. With several workers,
the numbers of batches and tokens are those of all, and the slowest one is named; memory is that of the first one.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.console import human_bytes
from runtime.host.limits import peak_host_bytes
from runtime.host.memory import peak_device_bytes
from runtime.status import done, make_room
from runtime.streaming.events import MEASURE, PROPAGATE, REPLAY, Speeds, slowest_text, step_facts
from runtime.streaming.time_left import TimeLeft
from runtime.terminal import printable, shortened

_LEAST_BAR, _MOST_BAR = 10, 20


class Display:
    """A watcher that draws the progress from the first subgraph on; an error before it finds nothing drawn.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._facts: dict[str, Any] = {}
        self._device: Any = None
        self._begin = self._phase_begin = 0.0
        self._index = self._phase_tokens = self._batch = 0
        self._left = TimeLeft()
        self._label = self._phase = self._detail = ""
        self._hosts: list[str] = []
        self._speeds = Speeds()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        self._left.tell(event, **facts)
        if event == "begin":
            self._start(facts)
        elif event == "phase":
            self._index, self._label, self._phase = facts["index"], facts["label"], facts["phase"]
            self._phase_begin = time.perf_counter()
            self._phase_tokens = self._batch = 0
            self._detail = ""
            self._speeds = Speeds()
        elif event == "workers":
            self._hosts = facts["hosts"]
        elif event == "batch":
            self._speeds.add(facts)
            self._batch += facts["batches"]
            self._phase_tokens += facts["tokens"]
            self._detail = f", batch {self._batch} of {self._facts['batches']}"
        elif event == "tuned":
            self._detail = f", step {facts['done']} of {facts['count']}"
        elif event == "solved":
            self._detail = f", {facts['done']} of {facts['count']} modules"
        elif event == "subgraph" and facts["rank"] == 0:
            head = f"[{facts['index'] + 1}/{self._facts['subgraphs']}] "
            self._line(head, facts["label"], step_facts(facts, self._hosts))
        elif event == "warning":
            make_room()
            self._console.print(Text(printable(facts["text"])))
        elif event in ("published", "evaluated"):
            self.__exit__()

    def _start(self, facts: dict[str, Any]) -> None:
        import torch

        self._facts = facts
        self._device, self._begin = torch.device(facts["device"]), time.perf_counter()
        done()  # before anything is printed beside the status line
        if facts["resumed_at"]:
            self._console.print(f"resuming after {facts['resumed_at']} of {facts['subgraphs']} subgraphs")
        self._live = Live(console=self._console, get_renderable=self._drawn, refresh_per_second=4, transient=True)
        self._live.start()

    def _line(self, head: str, label: str, parts: list[str]) -> None:
        """Print the line of a finished subgraph; the last facts are left out if the terminal is narrow."""
        while len(parts) > 2 and len(f"{head}{label}: {', '.join(parts)}") > self._console.width:
            parts = parts[:-1]
        rest = f": {', '.join(parts)}"
        name = shortened(printable(label), max(self._console.width - len(head) - len(rest), 1))
        self._console.print(Text(f"{head}{name}{rest}"))

    def _drawn(self) -> Group:
        head, rest = f"[{self._index + 1}/{self._facts['subgraphs']}] ", f": {self._phase}{self._detail}"
        width = self._console.width
        name = shortened(printable(self._label), max(width - len(head) - len(rest), 1))
        part, parts = self._left.part, self._times()
        while len(parts) > 1 and len(", ".join(parts)) + _LEAST_BAR + len(" 100% ") > width:
            parts = parts[:-1]
        text = f"{100 * part:3.0f}% {', '.join(parts)}"
        bar = ProgressBar(total=1.0, completed=part, width=max(min(width - len(text) - 1, _MOST_BAR), 1))
        grid = Table.grid(padding=(0, 1))
        grid.add_row(bar, Text(text, no_wrap=True))
        return Group(Text(f"{head}{name}{rest}", no_wrap=True), grid)

    def _times(self) -> list[str]:
        now = time.perf_counter()
        parts = [f"{_clock(now - self._begin)} elapsed"]
        left = self._left.seconds
        parts += [] if left is None else [f"{_clock(left)} left"]
        if self._phase_tokens and self._phase in (MEASURE, PROPAGATE, REPLAY):
            parts.append(f"{self._phase_tokens / max(now - self._phase_begin, 1e-9):,.0f} tokens/s")
            slowest = self._speeds.slowest()
            parts += [] if slowest is None else [slowest_text(slowest, self._hosts)]
        parts.append(human_bytes(peak_host_bytes()))
        on_device = peak_device_bytes(self._device)
        return [*parts, f"{human_bytes(on_device)} on the device"] if on_device else parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
