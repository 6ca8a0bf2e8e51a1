"""What a run tells those who watch: events, each a name and facts.

begin       subgraphs, batches, tokens, modules, resumed_at, device
load        index, label: a subgraph's weights are there
batch       index, tokens: one batch has passed through a subgraph
module      name, index and all of its report: it is quantized and written
subgraph    index, label, num_modules, seconds, tokens, bytes read and written, peak memory; it is safely on disk
warning     text
end         seconds, bytes, path
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Watcher(Protocol):
    """Is told events; must not raise for names that it does not know."""

    def tell(self, event: str, **facts: Any) -> None:
        """Take an event."""


class Watchers:
    """Tells many, and remembers the warnings for the summary.

    Args:
        members: in the order in which they are told.
    """

    def __init__(self, members: Sequence[Watcher]) -> None:
        self.members = members
        self.warnings: list[str] = []

    def tell(self, event: str, **facts: Any) -> None:
        """Pass an event on."""
        if event == "warning":
            self.warnings.append(facts["text"])
        for member in self.members:
            member.tell(event, **facts)


class Lines:
    """One line for each subgraph and each warning.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._count = 0

    def tell(self, event: str, **facts: Any) -> None:
        """Take an event."""
        if event == "begin":
            self._count = facts["subgraphs"]
        elif event == "warning":
            self.say(facts["text"])
        elif event == "subgraph":
            rate = facts["tokens"] / facts["seconds"] if facts["seconds"] else 0.0
            speed = f", {rate:,.0f} tokens/s" if facts["tokens"] else ""
            self.say(
                f"[{facts['index'] + 1}/{self._count}] {facts['label']}: {facts['num_modules']} modules, "
                f"{facts['seconds']:.1f} s{speed}"
            )


class EventLog:
    """Every event but `batch` and `load` as a line of JSON, with the time in seconds since 1970.

    Args:
        path: of the file; a resumed run goes on with it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def tell(self, event: str, **facts: Any) -> None:
        """Take an event."""
        if event not in ("batch", "load"):
            line = json.dumps({"event": event, "time": round(time.time(), 3), **facts})
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
