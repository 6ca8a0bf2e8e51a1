"""How much the output of a model changes with errors in the output of one of its layers.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671. For a
small change of the model's parameters, the mean divergence of its predictions p from the original ones is

    KL(p || p') = 1/2 dθᵀ F dθ,        F = E[∇ log p(t) ∇ log p(t)ᵀ]

where the expectation is over tokens t that the model itself predicts (the true Fisher matrix, not that of the data's
next tokens). For the weight of a layer with inputs x and outputs y = W x, ∇_W log p = g xᵀ with g = ∂ log p / ∂y. If g
and x are independent (section 3.1), an error E of the weight costs

    KL = 1/2 tr(G E H Eᵀ),             G = E[g gᵀ],   H = sum of x xᵀ

Here G is taken to be diagonal, one number for each output channel: the loss of each row of E, weighted by how much the
model's prediction depends on that channel. A full G would take as much memory as H, and a product of it with E.

g comes from a backward pass with one token drawn from each prediction: the gradient of -log p(t) for the logits z is
softmax(z) - onehot(t). The gradients of different positions add up in y, and with drawn tokens their products cancel in
expectation.

Shapes: T tokens, V entries of the vocabulary, O out features.
"""

from __future__ import annotations

import torch

_ROWS = 256  # positions whose predictions are computed at a time


def drawn_gradient(logits_TV: torch.Tensor, uniform_T: torch.Tensor, counts_T: torch.Tensor | None) -> torch.Tensor:
    """Draw a token from each prediction, and return the gradient of the sum of -log p(token) for the logits.

    Args:
        logits_TV: any float dtype.
        uniform_T: for each position a number from 0 to below 1, which selects the token.
        counts_T: whether each position counts; None for all.

    Returns:
        [T, V], in float32.
    """
    gradient_TV = torch.empty(logits_TV.shape, dtype=torch.float32, device=logits_TV.device)
    for top in range(0, len(logits_TV), _ROWS):
        rows = slice(top, top + _ROWS)
        part_TV = torch.softmax(logits_TV[rows].detach().to(torch.float32), dim=-1)
        sums_TV = part_TV.cumsum(dim=-1)
        # Of the sum, which rounding leaves a little beside 1.
        places_T1 = torch.searchsorted(sums_TV, uniform_T[rows, None].to(sums_TV) * sums_TV[:, -1:], right=True)
        places_T1 = places_T1.clamp_(max=logits_TV.shape[1] - 1)
        gradient_TV[rows] = part_TV.scatter_add_(1, places_T1, torch.full_like(sums_TV[:, :1], -1.0))
    return gradient_TV if counts_T is None else gradient_TV * counts_T.to(gradient_TV)[:, None]


class OutputGradients:
    """The mean square of the gradient for each output channel of a layer.

    Args:
        num_out_features: O.
        device: of the sum.
    """

    def __init__(self, num_out_features: int, device: torch.device) -> None:
        self.sum_O = torch.zeros(num_out_features, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, gradient_TO: torch.Tensor, scale: float = 1.0) -> None:
        """Add the gradients of a batch [..., O], which were multiplied by `scale`."""
        flat_TO = gradient_TO.detach().reshape(-1, gradient_TO.shape[-1])
        for part_TO in torch.split(flat_TO, _ROWS):
            self.sum_O += (part_TO.to(torch.float32) / scale).square_().sum(dim=0, dtype=torch.float64)
        self.num_tokens += len(flat_TO)

    def mean_O(self) -> torch.Tensor:
        """Return the diagonal of G, float64."""
        return self.sum_O / max(self.num_tokens, 1)


def predicted_divergence(row_losses_O: torch.Tensor, sensitivity_O: torch.Tensor, num_tokens: int) -> float:
    """Compute the KL divergence that a layer's error causes, in nats for each token of the model's output.

    Args:
        row_losses_O: e H eᵀ for each row e of the weight's error.
        sensitivity_O: the diagonal of G.
        num_tokens: of the model's output over which H was summed up.
    """
    return 0.5 * float((row_losses_O.double() * sensitivity_O.double()).sum()) / max(num_tokens, 1)
