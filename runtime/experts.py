"""A mixture's experts, as a leaf of the host's own: which token goes where is the same for all; what one expert does is
a program of the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from runtime.program import Run

if TYPE_CHECKING:
    from runtime.program import Program


class Experts(nn.Module):
    """Experts whose weights are stacked: the first axis of each is the expert.

    Args:
        num_experts: how many there are, E.
        stacked: names of the parameters of which each expert gets its own part.
        inputs: what the model's code calls the three inputs.
        accumulator: the dtype in which results of several experts are summed: `hidden`, `weights` or `float32`.
        is_column: whether an expert gets its routing weights as a column [N, 1] or as a vector [N].
    """

    def __init__(
        self, *, num_experts: int, stacked: Sequence[str], inputs: Sequence[str], accumulator: str, is_column: bool
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.stacked = tuple(stacked)
        self.inputs = tuple(inputs)
        self.accumulator = accumulator
        self.is_column = is_column
        self.__dict__["program"] = None

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Send tokens through their experts.

        Args:
            args: hidden states [T, H], indices of each token's experts [T, K] (E itself means none), and their weights
                [T, K].
            kwargs: the same by the names that the model's code has for them.

        Returns:
            Sums over each token's experts, [T, H], in the dtype of the hidden states.
        """
        values = [*args, *(kwargs[name] for name in self.inputs[len(args) :])]
        hidden_TH, index_TK, weight_TK = values
        run = Run(device=hidden_TH.device, dtype=self.get_parameter(self.stacked[0]).dtype)
        sum_TH = torch.zeros_like(hidden_TH, dtype=self._sum_dtype(hidden_TH, weight_TK))
        mask_EKT = F.one_hot(index_TK, num_classes=self.num_experts + 1).permute(2, 1, 0)
        used = torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist()
        for expert in used:
            if expert == self.num_experts:
                continue
            places, tokens = torch.where(mask_EKT[expert])
            own = [self.get_parameter(name)[expert] for name in self.stacked]
            weights = weight_TK[tokens, places, None] if self.is_column else weight_TK[tokens, places]
            program: Program | Any = self.program
            output_NH = program(self, hidden_TH[tokens], weights, *own, run=run)["output"]
            sum_TH.index_add_(0, tokens, output_NH.to(sum_TH.dtype))
        return sum_TH.to(hidden_TH.dtype)

    def _sum_dtype(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
        return {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[self.accumulator]
