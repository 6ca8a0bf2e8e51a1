"""Leaves: the modules that the code of a portable artifact calls, built by the host itself.

A leaf is a class of torch (or transformers' `Conv1D`) with a few options; shapes follow from its parameters. Subclasses
are not leaves, because they may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import MIXTURES, LeafKind, Shape
from runtime.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.language.program import Program

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_CONVOLUTION_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def leaf_kind(module: nn.Module) -> LeafKind | None:
    """Return the kind of leaf with the computation of this module, or None if there is none."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind = type(module)
    if "forward" in module.__dict__ or any(tensor is None for tensor in (getattr(module, "weight", None),)):
        return None
    if kind is nn.Linear:
        return LeafKind(kind="Linear")
    if kind is Conv1D:
        return LeafKind(kind="Conv1D")
    if kind is nn.Embedding:
        has_norm = module.max_norm is not None  # looking up a row rescales it in place
        return None if has_norm else LeafKind(kind="Embedding")
    if kind.__name__ in _CONVOLUTIONS and kind is getattr(nn, kind.__name__):
        return LeafKind(
            kind=kind.__name__, options={name: _items(getattr(module, name)) for name in _CONVOLUTION_OPTIONS}
        )
    return None


def _items(value: Any) -> Shape:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def build_leaf(leaf: LeafKind, name: str, shapes: Mapping[str, Sequence[int]], program: Program | None) -> nn.Module:
    """Build a module without memory for its weights.

    Args:
        leaf: its kind and options.
        name: its dotted name, for messages.
        shapes: the shapes of its parameters: `weight` [O, I], for instance, and `bias` [O] if it has one.
        program: its computation, if that differs from its kind's.

    Raises:
        ArtifactError: when options and shapes do not fit this kind.
    """
    import torch

    try:
        with torch.device("meta"):
            module = _experts(leaf, shapes) if leaf.kind in MIXTURES else _module(leaf, shapes)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"the artifact describes {name} as a {leaf.kind} that cannot be built: {error}") from error
    found = {own: tuple(parameter.shape) for own, parameter in module.named_parameters()}
    if found != {own: tuple(shape) for own, shape in shapes.items()}:
        raise ArtifactError(f"the parameters of {name} do not fit a {leaf.kind}", hint="compile the model again")
    if leaf.kind in MIXTURES:
        module.__dict__["program"] = program
    elif program is not None:
        module.__class__ = _programmed(type(module))
        module.__dict__["program"] = program
    return module


def _module(leaf: LeafKind, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    return _BUILDERS[leaf.kind](leaf, [int(size) for size in shapes["weight"]], "bias" in shapes)


def _experts(leaf: LeafKind, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    from runtime.model.dense_experts import DenseExperts
    from runtime.model.experts import Experts, Mixture

    module: Mixture
    options: dict[str, Any] = dict(leaf.options)
    if leaf.kind == "DenseExperts":
        (num_experts,), stacked = options["num_experts"], options["stacked"]
        _require_stacks(shapes, stacked, num_experts)
        module = DenseExperts(num_experts=num_experts, stacked=stacked)
        return _with_parameters(module, shapes)
    keys = ("num_experts", "accumulator", "is_column")
    (num_experts,), (accumulator,), (is_column,) = (options[key] for key in keys)
    stacked, inputs = options["stacked"], options["inputs"]
    (num_identity,), (num_dims,) = options.get("num_identity", (0,)), options.get("num_dims", (2,))
    flat = options.get("flat", ())
    is_whole = len(inputs) == 3 and len(leaf.arguments) == 2 + len(stacked) and set(flat) <= set(stacked)
    is_plain = num_identity == 0 or (0 < num_identity < 2**20 and bool(is_column))
    if accumulator not in ("hidden", "weights", "float32") or not is_whole or not is_plain or num_dims not in (2, 3):
        raise ValueError("its options contradict each other")
    _require_stacks(shapes, stacked, num_experts, num_identity, flat)
    module = Experts(
        num_experts=num_experts,
        stacked=stacked,
        inputs=inputs,
        accumulator=accumulator,
        is_column=bool(is_column),
        num_identity=num_identity,
        num_dims=num_dims,
        flat=flat,
    )
    return _with_parameters(module, shapes)


def _require_stacks(
    shapes: Mapping[str, Sequence[int]],
    stacked: Sequence[str],
    num_experts: int,
    num_identity: int = 0,
    flat: Sequence[str] = (),
) -> None:
    """Reject parameters without a slice for each expert; those for experts without weights are not used."""
    counts = (num_experts, num_experts + num_identity)
    are_stacked = (
        shapes[name][0] % num_experts == 0 if name in flat else shapes[name][0] in counts for name in stacked
    )
    if not stacked or num_experts < 1 or not all(are_stacked):
        raise ValueError("its parameters are not stacked by expert")


def _with_parameters(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    import torch
    from torch import nn

    from runtime.model.experts import branch

    for name, shape in shapes.items():
        owner, _, own = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(tuple(shape)), requires_grad=False)
        branch(module, owner).register_parameter(own, parameter)
    return module


def _programmed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `kind` that runs the module's program."""
    from runtime.language.program import Run

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        (value,) = (*args, *kwargs.values())
        run = Run(device=value.device, dtype=self.weight.dtype)
        return self.program(self, value, run=run)["output"]

    return type(f"Programmed{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def _linear(leaf: LeafKind, weight: Sequence[int], has_bias: bool) -> nn.Module:
    from torch import nn

    out_features, in_features = weight
    return _uninitialized(nn.Linear, in_features, out_features, bias=has_bias)


def _conv1d(leaf: LeafKind, weight: Sequence[int], has_bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    in_features, out_features = weight
    module: nn.Module = Conv1D(out_features, in_features)  # type: ignore[no-untyped-call]
    return module


def _embedding(leaf: LeafKind, weight: Sequence[int], has_bias: bool) -> nn.Module:
    from torch import nn

    num_embeddings, width = weight
    return _uninitialized(nn.Embedding, num_embeddings, width)


def _convolution(leaf: LeafKind, weight: Sequence[int], has_bias: bool) -> nn.Module:
    from torch import nn

    options: dict[str, Any] = dict(leaf.options)
    (groups,), (padding_mode,) = options["groups"], options["padding_mode"]
    padding = options["padding"][0] if isinstance(options["padding"][0], str) else options["padding"]
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding mode {padding_mode!r}")
    return _uninitialized(
        getattr(nn, leaf.kind),
        weight[1] * groups,
        weight[0],
        tuple(weight[2:]),
        stride=options["stride"],
        padding=padding,
        dilation=options["dilation"],
        groups=groups,
        padding_mode=padding_mode,
        bias=has_bias,
    )


def _uninitialized(kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """Create a module of torch without initializing its weights.

    On the meta device initialization has no effect, takes most of the time, and imports torch's compiler.
    """
    module: nn.Module = type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})(*args, **options)
    module.__class__ = kind
    return module


_BUILDERS: dict[str, Callable[[LeafKind, Sequence[int], bool], nn.Module]] = {
    "Linear": _linear,
    "Conv1D": _conv1d,
    "Embedding": _embedding,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}
