"""The base class of modes that see every operator that torch executes."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class LeanDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that does not import torch's compiler, which takes a hundred megabytes and two seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default implementation imports the compiler
