"""The experts of a mixture that are computed at once: each gets all tokens, with zeros for those of other experts.

Llama 4 multiplies a token by its expert's score before the expert, and by zero for all others. Its code multiplies
stacks by stacks, and so does the program of this module. Split experts are joined for that product, so the result is
the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from runtime.language.program import Run
from runtime.model.expert_hooks import after_hooks, show_product, storage
from runtime.model.experts import Mixture

if TYPE_CHECKING:
    from torch import nn

    from runtime.language.program import Program

# Products of stacks: the states of all experts [E, T, I], and their matrices [E, I, O].
STACKED_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.matmul.default)


class DenseExperts(Mixture):
    """Experts that all get all tokens, expert by expert: [E * T, H].

    While `sees_all`, hooks of an expert's modules see for each token the sum of what all experts get: with one expert
    for each token, what that expert gets.
    """

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Compute all experts for all tokens.

        Args:
            args: hidden states [E * T, H].
            kwargs: the same by their name in the model's code.

        Returns:
            The result of each expert for each token, [E * T, H].
        """
        (hidden,) = (*args, *kwargs.values())
        modules = {expert: self.watched(expert) for expert in range(self.num_experts)} if self.stacks else {}
        if not any(modules.values()):
            return self._compute(hidden)
        hidden_ETH = hidden.view(self.num_experts, -1, hidden.shape[-1])
        if self.sees_all and any(self.watched(expert, of_model=False) for expert in modules):
            sum_TH = hidden_ETH.sum(0)
            with _HookedDense(self, modules, [None] * self.num_experts, sum_TH):
                self._compute(sum_TH.repeat(self.num_experts, 1))
        of_model = True if self.sees_all else None
        with _HookedDense(self, modules, [_routed(own_TH) for own_TH in hidden_ETH], None, of_model=of_model):
            return self._compute(hidden)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter; one that was split is joined."""
        if target not in self.stacks:
            return super().get_parameter(target)
        joined: Any = torch.stack([self.own(target, expert) for expert in range(self.num_experts)])
        self.__dict__.setdefault("joined", {})[storage(joined)] = target
        return joined  # type: ignore[no-any-return]

    def _compute(self, hidden: torch.Tensor) -> torch.Tensor:
        program: Program | Any = self.program
        run = Run(device=hidden.device, dtype=hidden.dtype)
        try:
            output: torch.Tensor = program(self, hidden, run=run)["output"]
        finally:
            self.__dict__.pop("joined", None)
        return output


def _routed(hidden_TH: torch.Tensor) -> torch.Tensor | None:
    """Return the indices of the tokens that are routed to an expert; None for all if the tensor has no values."""
    return None if hidden_TH.is_meta else hidden_TH.any(dim=-1).nonzero().flatten()


def _rows(expert: int, tokens: torch.Tensor | None) -> tuple[int | torch.Tensor, ...]:
    """Return the index of an expert's tokens in the states of all experts [E, T, ...]."""
    return (expert,) if tokens is None else (expert, tokens)


class _HookedDense(TorchFunctionMode):
    """Run forward pre-hooks of experts' modules for products with their stacks.

    Args:
        experts: the module whose program runs.
        modules: the modules whose hooks run, by expert and stack.
        tokens: for each expert the indices of its tokens; None for all.
        shared: the tensor that the first matrices of all experts multiply, if it is the same.
        of_model: whether only hooks that are a part of the model run.
    """

    def __init__(
        self,
        experts: DenseExperts,
        modules: dict[int, dict[str, list[nn.Module]]],
        tokens: Sequence[torch.Tensor | None],
        shared: torch.Tensor | None,
        *,
        of_model: bool | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.modules = modules
        self.tokens = tokens
        self.shared = shared
        self.of_model = of_model

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = None
        if func in STACKED_PRODUCTS:
            name = self.experts.__dict__.get("joined", {}).get(storage(args[1]))
        if name is None:
            return func(*args, **(kwargs or {}))
        product = func(self._after_hooks(name, args[0]), *args[1:], **(kwargs or {}))
        for expert, stacks in self.modules.items():
            show_product(stacks.get(name, ()), product, _rows(expert, self.tokens[expert]))
        return product

    def _after_hooks(self, name: str, states_ETI: torch.Tensor) -> torch.Tensor:
        changed_ETI = states_ETI
        is_first = name == self.experts.stacked[0]
        for expert, stacks in self.modules.items():
            tokens = self.tokens[expert]
            states = states_ETI[_rows(expert, tokens)]
            if is_first and self.shared is not None:
                states = self.shared
            changed = after_hooks(stacks.get(name, ()), states, tokens, of_model=self.of_model)
            if changed is not states:
                changed_ETI = changed_ETI.clone() if changed_ETI is states_ETI else changed_ETI
                changed_ETI[expert, slice(None) if tokens is None else tokens] = changed
        return changed_ETI
