"""Sensitivities of outputs, from gradients of drawn tokens."""

from __future__ import annotations

import pytest
import torch

from runtime.algorithms.output_fisher import OutputGradients, drawn_gradient, predicted_divergence


def logits(num_tokens: int = 600, size: int = 7) -> torch.Tensor:
    return torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def test_it_is_the_gradient_of_the_drawn_tokens() -> None:
    values = logits().requires_grad_()
    uniform = torch.rand(600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = drawn_gradient(values, uniform, None)
    tokens = (torch.softmax(values.detach(), -1).cumsum(-1) <= uniform[:, None]).sum(-1)
    log_p = torch.log_softmax(values, -1).gather(1, tokens[:, None])
    (expected,) = torch.autograd.grad(-log_p.sum(), values)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    counts = torch.arange(600) % 3 == 0
    torch.testing.assert_close(drawn_gradient(values, uniform, counts), found * counts[:, None])
    assert torch.equal(drawn_gradient(values, uniform, None), found)


def test_its_mean_square_is_the_fisher_matrix_of_the_predictions() -> None:
    p = torch.softmax(logits(1), -1)
    many = logits(1).expand(20000, -1)
    found = OutputGradients(7, torch.device("cpu"))
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found.add(drawn_gradient(many, uniform, None).view(4, 5000, 7))
    assert found.num_tokens == 20000
    torch.testing.assert_close(found.mean_O(), (p * (1 - p))[0], rtol=0.05, atol=1e-3)


def test_it_predicts_small_divergences() -> None:
    """Independent errors of logits: KL = 1/2 sum of F_vv var_v."""
    base = logits(4000)
    error = 0.02 * torch.randn(base.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p, log_q = torch.softmax(base, -1), torch.log_softmax(base + error, -1)
    actual = float((p * (p.log() - log_q)).sum() / len(base))
    found = OutputGradients(7, torch.device("cpu"))
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found.add(drawn_gradient(base, uniform, None))
    assert predicted_divergence(error.square().sum(0), found.mean_O(), 4000) == pytest.approx(actual, rel=0.1)


def test_scaled_gradients_and_no_tokens() -> None:
    plain, scaled = OutputGradients(3, torch.device("cpu")), OutputGradients(3, torch.device("cpu"))
    assert not plain.mean_O().any()
    gradient = torch.randn(5, 3)
    plain.add(gradient)
    scaled.add((gradient * 256).half(), 256.0)
    torch.testing.assert_close(scaled.mean_O(), plain.mean_O(), rtol=2e-3, atol=0)
    assert predicted_divergence(torch.zeros(3), plain.mean_O(), 0) == 0
