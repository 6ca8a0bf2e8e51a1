"""Find the sequential targets of a model, and the modules that contain one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import TargetError
from runtime.patterns import fault, starts_with

if TYPE_CHECKING:
    from torch import nn


def match_modules(model: nn.Module, target_names: Sequence[str]) -> KeysView[nn.Module]:
    """Return the modules that match any of the patterns, once each, in the order of the module tree.

    Args:
        model: the module tree.
        target_names: class names (of the module or a base class), dotted module names, or `re:` followed by a regular
            expression that must match the dotted name from its start.

    Returns:
        An ordered set.
    """
    patterns = as_names(target_names)
    for pattern in patterns:
        wrong = fault(pattern[3:]) if pattern.startswith("re:") else ""
        if wrong:
            raise TargetError(f"target {pattern!r} is not a valid regular expression: {wrong}")
    return dict.fromkeys(
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if any(_fits(pattern, name, module) for pattern in patterns)
    ).keys()


def _fits(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("re:"):
        return starts_with(pattern[3:], name)
    return pattern == name or any(pattern == cls.__name__ for cls in type(module).__mro__)


def get_sequential_ancestors(model: nn.Module, targets: Collection[nn.Module]) -> KeysView[nn.Module]:
    """Return the modules that contain a target and are no targets themselves, in the order of the module tree.

    Returns:
        An ordered set.
    """
    contains: dict[nn.Module, bool] = {}

    def is_or_contains(module: nn.Module) -> bool:
        if module not in contains:
            inside = [is_or_contains(child) for child in module.children()]  # a list, so that every child is visited
            contains[module] = any(inside)
        return contains[module] or module in targets

    is_or_contains(model)
    return dict.fromkeys(module for module in model.modules() if contains[module] and module not in targets).keys()


def outermost(model: nn.Module, targets: Collection[nn.Module]) -> KeysView[nn.Module]:
    """Return the targets that are not inside another target."""
    inner: dict[nn.Module, None] = {}
    for target in targets:
        inner.update(dict.fromkeys(module for module in target.modules() if module is not target))
    return dict.fromkeys(target for target in targets if target not in inner).keys()


def require_targets(model: nn.Module, names: Sequence[str]) -> KeysView[nn.Module]:
    """Return the outermost modules that match `names`. Names without a match are reported by `unmatched_targets`.

    Raises:
        TargetError: if no name matches; the message lists the existing classes.
    """
    if not names:
        raise TargetError("the list of sequential targets is empty", hint="give the classes of the model's layers")
    for name in names:
        if not isinstance(name, str) or not name.removeprefix("re:"):
            what = "is empty" if isinstance(name, str) else f"is {name!r}"
            raise TargetError(f"a target {what}", hint="it must be a class name, a module name or re:pattern")
    found = match_modules(model, names)
    if not found:
        message, hint = _unmatched(model, names[0])
        raise TargetError(message, hint=hint)
    return outermost(model, found)


def unmatched_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return a sentence for each name that matches no module."""
    return [_unmatched(model, name)[0] for name in names if not match_modules(model, [name])]


def _unmatched(model: nn.Module, name: str) -> tuple[str, str]:
    classes = list(dict.fromkeys(type(module).__name__ for module in model.modules()))
    close = difflib.get_close_matches(name, classes, n=1)
    return (
        f"target {name!r} matches no module of {type(model).__name__}",
        f"{f'did you mean {close[0]}? ' if close else ''}its classes are {', '.join(classes)}",
    )


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the default patterns to cut at: the first of `candidate_targets`.

    Raises:
        TargetError: if there is none.
    """
    return next(candidate_targets(model))


def candidate_targets(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield default patterns to cut at, best first.

    For the part that handles text (the whole model unless it is multimodal): the existing no-split classes, outermost
    only; then the class of the longest ModuleList. Then the same for the whole model. Last, the classes of the model's
    other outermost ModuleLists, longest first, because a model may declare only its vision layers and be given text.

    Raises:
        TargetError: after the last pattern, if there was none.
    """
    from torch import nn

    no_split = getattr(model, "_no_split_modules", None) or ()
    is_found = False
    for part in dict.fromkeys((text_model(model), model)):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
        for names in (no_split, {type(module).__name__ for module in max(lists, key=len, default=())}):
            found = outermost(model, [module for module in part.modules() if type(module).__name__ in names])
            if found:
                is_found = True
                yield _patterns(model, found)
    yield from _other_lists(model)
    if not is_found:
        raise TargetError(
            f"{type(model).__name__} names no layer classes and has no list of layers",
            hint="name the modules to cut at with --targets",
        )


def _other_lists(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Return the classes of all outermost ModuleLists except the longest, longer ones first."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    outer = outermost(model, lists)
    longest = max(lists, key=len, default=None)
    for found in sorted((each for each in lists if each in outer), key=len, reverse=True):  # of equal ones the first
        if found is not longest:
            names = {type(module).__name__ for module in found}
            yield _patterns(model, outermost(model, [m for m in model.modules() if type(m).__name__ in names]))


def text_model(model: nn.Module) -> nn.Module:
    """Return the part of a multimodal model that uses its text config, or the model itself if there is no such part."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config:
        return model
    parts = (module for module in model.modules() if getattr(module, "config", None) is text and any(module.children()))
    return next(parts, model)


def _patterns(model: nn.Module, targets: Collection[nn.Module]) -> tuple[str, ...]:
    """Return class names that match exactly the targets, or regular expressions on their names."""
    classes = tuple(dict.fromkeys(type(target).__name__ for target in targets))
    if list(outermost(model, match_modules(model, classes))) == list(targets):
        return classes
    names = [name for name, module in model.named_modules() if module in targets]
    shapes = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name) for name in names)
    return tuple(f"re:{re.escape(shape).replace(re.escape('#'), r'[0-9]+')}$" for shape in shapes)


def get_sequential_targets(
    modifiers: Iterable[Any], model: nn.Module, args: Mapping[str, Any] | Any | None = None
) -> list[str]:
    """Return the sequential targets: from the modifiers, else from the arguments, else from the model.

    Args:
        modifiers: objects whose `sequential_targets` may be None, one pattern or several.
        model: provides its no-split classes if neither the modifiers nor the arguments name targets.
        args: a mapping or object whose `sequential_targets` may be None, one pattern or several.

    Raises:
        TargetError: if two modifiers, or a modifier and the arguments, name different targets.
    """
    requests: dict[tuple[str, ...], str] = {}
    for modifier in modifiers:
        wish = as_names(getattr(modifier, "sequential_targets", None))
        if wish:
            requests.setdefault(wish, type(modifier).__name__)
    from_args = (
        args.get("sequential_targets") if isinstance(args, Mapping) else getattr(args, "sequential_targets", None)
    )
    wish = as_names(from_args)
    if wish:
        requests.setdefault(wish, "the arguments")
    if len(requests) > 1:
        wishes = "; ".join(f"{who} for {', '.join(names)}" for names, who in requests.items())
        raise TargetError(f"conflicting sequential targets: {wishes}", hint="give the same targets everywhere")
    return list(next(iter(requests)) if requests else default_targets(model))


def as_names(value: Any) -> tuple[str, ...]:
    """Normalize None, one name or several names to a sequence of names.

    Raises:
        TargetError: for any other value.
    """
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise TargetError(f"{value!r} is not a name"[:100], hint="give a str or a list of them")
    return (value,) if isinstance(value, str) else tuple(value)
