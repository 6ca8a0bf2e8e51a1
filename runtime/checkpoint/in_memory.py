"""A checkpoint with the tensors of a model that the caller has loaded.

Nothing is copied in advance: a tensor is copied when it is read, one subgraph's at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.stored import Stored
    from runtime.checkpoint.stored_table import StoredTable

_PIECE_NUMBERS = 2**22


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor in memory.

    Attributes:
        stored: its name, dtype and shape.
        get: returns it, on any device and of any layout in memory; the result is not modified.
    """

    stored: Stored
    get: Callable[[], torch.Tensor]


class MemoryCheckpoint(Checkpoint):
    """The tensors of a model in memory, under the names that its checkpoint would have.

    Args:
        directory: contains config.json and the other files of the model, but no weights.
        tensors: by their names in a checkpoint.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, HeldTensor]) -> None:
        self.directory = directory
        self._bytes_read = 0
        self._tensors = {key: tensors[key] for key in sorted(tensors)}
        self.config = self._read_config()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def shards(self) -> list[Path]:
        """Return an empty list: there are no files."""
        return []

    @property
    def total_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(held.stored.num_bytes for held in self._tensors.values())

    def stored(self, key: str) -> Stored:
        """Return name, dtype and shape of a tensor."""
        return self._tensors[key].stored

    def read(self, key: str) -> torch.Tensor:
        """Copy a tensor into new memory on the CPU."""
        return self._copied(self._tensors[key].get())

    def read_rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """Copy only `count` consecutive indices of a tensor's first axis."""
        return self._copied(self._tensors[key].get()[first : first + count])

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._bytes_read += copy.nbytes
        return copy

    def table(self, key: str) -> StoredTable | None:
        """Return a matrix on the CPU whose rows are copied when they are looked up; None for other tensors."""
        from runtime.checkpoint.dtypes import bytes_of
        from runtime.checkpoint.stored_table import StoredTable

        tensor = self._tensors[key].get().detach()
        if tensor.dim() != 2 or not tensor.numel() or tensor.device.type != "cpu":
            return None
        row_bytes = tensor.shape[1] * tensor.itemsize

        def read_rows(first: int, memory: memoryview) -> None:
            memory[:] = bytes_of(tensor[first : first + len(memory) // row_bytes].contiguous())

        return StoredTable(read_rows, tuple(tensor.shape), tensor.dtype)

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the numbers of a tensor in pieces, not counted as read."""
        numbers = self._tensors[key].get().detach().reshape(-1)
        for begin in range(0, len(numbers), _PIECE_NUMBERS):
            yield numbers[begin : begin + _PIECE_NUMBERS].cpu()

    def announce(self, keys: Iterable[str]) -> None:
        """Do nothing: the tensors are in memory."""

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor."""
        from runtime.checkpoint.dtypes import bytes_of

        yield bytes_of(self.read(key))

    def sample(self, key: str, count: int) -> bytes:
        """Return a few bytes from the middle of a tensor; not counted as read."""
        from runtime.checkpoint.dtypes import bytes_of

        numbers = self._tensors[key].get().detach().reshape(-1)
        num_wanted = -(-count // numbers.itemsize)
        begin = max(0, (len(numbers) - num_wanted) // 2)
        return bytes(bytes_of(numbers[begin : begin + num_wanted].cpu().contiguous()))[:count]
