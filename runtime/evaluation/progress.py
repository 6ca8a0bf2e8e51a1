"""Save how far an evaluation has come, so that a killed one can be resumed; the results of a resumed one are the same.

The values between two subgraphs are written to the run's directory, then a line for each finished subgraph to its
journal. Earlier values are deleted afterwards. So whenever a process is killed, one complete set of values is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from runtime.streaming import journal
from runtime.streaming.activations import Activations
from runtime.streaming.events import Watchers
from runtime.streaming.saved_values import CannotSaveError, load_boundary, remove_boundary, save_boundary
from runtime.streaming.workplace import Workplace
from runtime.workers.agreement import agreed

Places = list[tuple[int, int]]


class SavedProgress:
    """The saved values of a run, of all workers.

    Args:
        place: the run's directory.
        every_s: the least time between two savings, in seconds; the first worker's clock decides.
        watch: receives a warning if values cannot be saved.
    """

    def __init__(self, place: Workplace, every_s: float, watch: Watchers) -> None:
        self.place = place
        self.every_s = every_s
        self.watch = watch
        self._since = time.monotonic()
        self._is_possible = True

    def folder(self, side: int) -> Path:
        """The directory for values of a side that exceed the memory of this worker."""
        folder = self.place.values / f"side-{side}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def last(self) -> int | None:
        """The last subgraph after which values were saved; None for a new run."""
        saved = [entry["index"] for entry in self.place.journal.of_kind(journal.STEP) if entry.get("saved")]
        return max(saved, default=None)

    def load(self, index: int, own: Sequence[int], sides: Sequence[Activations]) -> None:
        """Replace the values of this worker's batches by saved ones.

        Args:
            index: of the subgraph after which they were saved.
            own: the numbers of this worker's batches.
            sides: the values of each side.
        """
        for side, activations in enumerate(sides):
            load_boundary(activations, self.place.saved, index, _places(own, side, len(sides)))

    def save(self, index: int, own: Sequence[int], sides: Sequence[Activations]) -> None:
        """Save the values after a subgraph, if it is time to."""
        workers, log = self.place.workers, self.place.journal
        is_time = workers.exchange(time.monotonic() - self._since >= self.every_s)[0]
        if not is_time or not self._is_possible:
            return
        reason = ""
        with agreed(workers):
            try:
                for side, activations in enumerate(sides):
                    save_boundary(activations, self.place.saved, index, _places(own, side, len(sides)))
            except CannotSaveError as error:
                reason = str(error)
        reason = next(filter(None, workers.exchange(reason)), "")
        if reason:
            self._is_possible = False
            self.watch.tell("warning", text=f"warning: there is {reason} between subgraphs, so nothing can be resumed")
            return
        with agreed(workers):
            for finished in range(len(log.of_kind(journal.STEP)), index + 1):
                log.append(journal.STEP, index=finished, saved=finished == index)
            if self.place.leads:
                for earlier in range(index):
                    remove_boundary(self.place.saved, earlier)
        self._since = time.monotonic()


def _places(own: Sequence[int], side: int, count: int) -> Places:
    """The lane of each batch, one for each side of it: another number of workers can load it."""
    return [(number * count + side, 0) for number in own]
