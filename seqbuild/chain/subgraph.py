"""A subgraph: one part of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from runtime.language.program import Program, Run, compile_program, run_device, run_dtype
from seqbuild.chain.emit import EmittedCode, emit
from seqbuild.chain.uncompiled import original

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Subgraph:
    """A part of a model's graph that can be executed separately.

    Attributes:
        graph: the operations; its placeholders are the inputs, its output a dict from names to values.
        input_names: names of the inputs, in the order of the generated signature.
        consumed_names: the inputs that no later subgraph needs, so that they can be freed afterwards.
        constants: tensors that the operations need besides weights, by name.
    """

    graph: fx.Graph
    input_names: list[str]
    consumed_names: list[str] = field(default_factory=list)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _emitted: EmittedCode | None = field(default=None, repr=False, compare=False)
    _program: Program | None = field(default=None, repr=False, compare=False)

    @property
    def code(self) -> EmittedCode:
        """Return the generated code, with the dtypes of the traced model."""
        if self._emitted is None:
            self._emitted = emit(self.graph)
        return self._emitted

    def emit(self, traced_dtype: torch.dtype | None, *, scope: str | None = None, is_last: bool = True) -> EmittedCode:
        """Generate the code for an artifact, with `traced_dtype` as the run's dtype; see `seqbuild.chain.emit`."""
        return emit(self.graph, traced_dtype=traced_dtype, scope=scope, is_last=is_last)

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Execute the subgraph with the weights of `model`.

        Args:
            model: the traced model, or one with the same module tree.
            inputs: a value for each of `input_names`, on the device of the run.

        Returns:
            Values by output name; for the last subgraph, the fields of the model's output.

        Raises:
            DataError: if an input is missing, unknown, or not a tensor of the traced rank.
        """
        from seqbuild.sample.given import require_module, require_subgraph_inputs

        require_module(model)
        require_subgraph_inputs(self.graph, self.input_names, inputs)
        model = original(model)
        if self._program is None:
            self._program = compile_program(self.code.source, f"<subgraph of {type(model).__name__}>")
        run = Run(
            device=run_device(inputs, model),
            dtype=run_dtype(model),
            constants=self.constants,
            opaque={node.meta["opaque"]: node.target for node in self.graph.nodes if "opaque" in node.meta},
        )
        return self._program(model, **inputs, run=run)

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        """Return the modules that the subgraph calls, once each in call order; `recurse` adds their submodules."""
        names = [str(node.target) for node in self.graph.find_nodes(op="call_module")]
        called = [original(original(model).get_submodule(name)) for name in names]
        modules = [inner for module in called for inner in module.modules()] if recurse else called
        return list(dict.fromkeys(modules))
