"""An embedding table that stays in its file: a tensor whose rows are read when they are looked up.

The table itself takes no memory, and a lookup only that of its rows. Any other operation reads the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from runtime.checkpoint.dtypes import bytes_of, empty_bytes

ReadRows = Callable[[int, memoryview], None]
_LOOK_UP = torch.ops.aten.embedding.default
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StoredTable(torch.Tensor):
    """A table [R, C] on disk, as a tensor on the CPU.

    Args:
        read_rows: fills memory with consecutive rows from the given one on, as many as fit.
        shape: of the table.
        dtype: of its numbers.
    """

    read_rows: ReadRows

    @staticmethod
    def __new__(cls, read_rows: ReadRows, shape: Sequence[int], dtype: torch.dtype) -> StoredTable:
        """Create a tensor without memory."""
        made: StoredTable = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu")
        )
        made.read_rows = read_rows
        return made

    def whole(self) -> torch.Tensor:
        """Read the whole table into memory."""
        return self._rows(range(self.shape[0]), [self.shape[0]])

    def looked_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Look up rows by index, [shape of the indices, C]; each row is read once, neighbours together."""
        wanted, places = torch.unique(indices, return_inverse=True)  # in ascending order
        if not len(wanted):
            return torch.empty((*indices.shape, self.shape[1]), dtype=self.dtype)
        if int(wanted[0]) < 0 or int(wanted[-1]) >= self.shape[0]:
            raise IndexError("index out of range in self")  # torch's message
        ends = [*(torch.nonzero(wanted.diff() != 1).flatten() + 1).tolist(), len(wanted)]
        return self._rows(wanted.tolist(), ends)[places]

    def _rows(self, wanted: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
        """Read rows by index, in runs of neighbours that end before the positions `ends`. All runs share one buffer: a
        torch call for each run would take longer than reading it.
        """
        row_bytes = self.shape[1] * self.dtype.itemsize
        data = empty_bytes(len(wanted) * row_bytes)
        memory, begin = bytes_of(data), 0
        for end in ends:
            self.read_rows(wanted[begin], memory[begin * row_bytes : end * row_bytes])
            begin = end
        return data.view(self.dtype).reshape(len(wanted), self.shape[1])

    def as_parameter(self) -> StoredTable:
        """Mark the table as a parameter. `nn.Parameter` would detach it, for which torch imports distributed tensors
        and sympy: a second and 60 MB.
        """
        self._is_param = True  # checked by `isinstance(table, nn.Parameter)`
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look rows up before torch dispatches, which would import the same modules."""
        kwargs = kwargs or {}
        max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")  # torch would modify the table in place
        is_plain = func is F.embedding and len(args) > 1 and max_norm is None
        if is_plain and isinstance(args[1], cls) and not isinstance(args[0], cls):
            return args[1].looked_up(args[0])
        if func is _LOOK_UP and len(args) > 1 and isinstance(args[0], cls) and not isinstance(args[1], cls):
            return args[0].looked_up(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look rows up; pass the whole table to any other operation."""
        table = args[0] if args else None
        if func in _SAME and isinstance(table, cls):
            return cls(table.read_rows, table.shape, table.dtype)
        if func is _LOOK_UP and isinstance(table, cls) and not isinstance(args[1], cls):
            return table.looked_up(args[1])
        plain_args, plain_kwargs = pytree.tree_map_only(cls, cls.whole, (tuple(args), dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)
