"""A line for each finished subgraph of a run, and each warning, for logs and pipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.streaming.events import step_facts
from runtime.streaming.time_left import TimeLeft


class Lines:
    """A watcher that prints lines.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._begin: dict[str, Any] = {}
        self._hosts: list[str] = []
        self._left = TimeLeft()

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        self._left.tell(event, **facts)
        if event == "begin":
            self._begin = facts
            if facts["resumed_at"]:
                self.say(f"resuming after {facts['resumed_at']} of {facts['subgraphs']} subgraphs")
        elif event == "warning":
            self.say(facts["text"])
        elif event == "workers":
            self._hosts = facts["hosts"]
        elif event == "subgraph" and facts["rank"] == 0:
            parts = step_facts(facts, self._hosts)
            left = self._left.seconds
            if facts.get("all_tokens", facts["tokens"]):
                at = 1 + ("num_modules" in facts)  # after the time
                parts[at:at] = [f"{self._begin['batches']} batches"]
                parts[at + 2 : at + 2] = [] if left is None else [f"{left:.0f} s left"]
            self.say(f"[{facts['index'] + 1}/{self._begin['subgraphs']}] {facts['label']}: {', '.join(parts)}")
