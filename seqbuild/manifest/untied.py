"""Determine whether a model's head can have a weight of its own where it shares that of the embedding."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_SETTING = "tie_word_embeddings"
# Methods that share parameters, or fill those that are not loaded.
_TYING = ("tie_weights", "_tie_weights", "get_expanded_tied_weights_keys", "_init_weights")


def untied_head(model: nn.Module) -> tuple[str, str] | None:
    """Return the names of the embedding and of the head that readers load separately if the config unties them.

    None for a model without such a pair, and if its code computes something else when they are not tied, as that of T5
    does.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not any(getattr(entry, _SETTING, False) for entry in (config, text)):
        return None
    try:
        modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    if any(id(module) not in names or getattr(module, "weight", None) is None for module in modules):
        return None
    if modules[0].weight is not modules[1].weight or _code_depends_on_it(model):
        return None
    return f"{names[id(modules[0])]}.weight", f"{names[id(modules[1])]}.weight"


def _code_depends_on_it(model: nn.Module) -> bool:
    files = dict.fromkeys(type(part).__module__ for part in (model.config, *model.modules()))
    return any(_reads_setting(name) for name in files if not name.startswith("torch."))


def _is_setting(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == _SETTING


def _reads_setting(module: str) -> bool:
    """Whether a module's code reads the setting, except to share parameters."""
    try:
        tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    except (ImportError, OSError, SyntaxError, TypeError):
        return True
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef) and node.name in _TYING:
            continue
        if isinstance(node, ast.Assign) and all(_is_setting(part) for part in (node.value, *node.targets)):
            continue  # a copy, whose uses count
        if isinstance(node, ast.Attribute) and node.attr == _SETTING and isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.Constant) and node.value == _SETTING:
            return True
        pending += ast.iter_child_nodes(node)
    return False
