"""Match module names and classes against the targets of a scheme."""

from __future__ import annotations

from runtime.patterns import starts_with


def class_names(module_class: type | str) -> tuple[str, ...]:
    """The names by which a target can match a class: its own and those of its base classes."""
    return (module_class,) if isinstance(module_class, str) else tuple(c.__name__ for c in module_class.__mro__)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a target or ignore pattern matches a module's name, in full or, with `re:`, from its beginning."""
    if pattern.startswith("re:"):
        return starts_with(pattern.removeprefix("re:"), name)
    return pattern == name
