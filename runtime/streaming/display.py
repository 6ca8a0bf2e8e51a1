"""The progress of a run on a terminal: a bar that moves with every batch, tokens per second, time left and memory."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.console import human_bytes
from runtime.host.memory import peak_device_bytes, peak_host_bytes


class Display:
    """A watcher that draws a progress bar; other lines scroll by above it.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left,"),
            TextColumn("{task.fields[memory]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, speed="", memory="")
        self._by_tokens = False
        self._step = ""
        self._device: Any = None
        self._batch = self._batches = self._count = 0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event == "begin":
            import torch

            self._by_tokens = facts["total_tokens"] > 0
            self._count, self._batches = facts["subgraphs"], facts["batches"]
            self._device = torch.device(facts["device"])
            left = facts["subgraphs"] - facts["resumed_at"]
            self._progress.update(self._task, total=facts["total_tokens"] if self._by_tokens else left)
        elif event == "load":
            self._step, self._batch = f"[{facts['index'] + 1}/{self._count}] {facts['label']}", 0
        elif event == "batch":
            self._batch = self._batch % self._batches + 1 if self._batches else 0
            self._progress.advance(self._task, facts["tokens"] if self._by_tokens else 0)
        elif event == "subgraph":
            self._progress.advance(self._task, 0 if self._by_tokens else 1)
        elif event == "end":
            self._progress.update(self._task, total=1, completed=1)
        self._refresh()

    def _refresh(self) -> None:
        speed = self._progress.tasks[0].speed if self._by_tokens else None
        memory = human_bytes(peak_host_bytes())
        on_device = peak_device_bytes(self._device) if self._device is not None else 0
        self._progress.update(
            self._task,
            description=f"{self._step} batch {self._batch}/{self._batches}" if self._batch else self._step,
            speed=f"{speed:,.0f} tokens/s" if speed else "",
            memory=f"{memory}, {human_bytes(on_device)} on the device" if on_device else memory,
        )
