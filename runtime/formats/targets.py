"""Match module names and classes against the targets of a scheme."""

from __future__ import annotations

from runtime.patterns import starts_with


def class_names(module_class: type | str) -> tuple[str, ...]:
    """The names by which a target can mean a class: its own and those of the classes it derives from."""
    return (module_class,) if isinstance(module_class, str) else tuple(c.__name__ for c in module_class.__mro__)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a target or ignore pattern means a module by its name, in full or by `re:`.

    A regular expression must match from the name's beginning, not to its end.
    """
    if pattern.startswith("re:"):
        return starts_with(pattern.removeprefix("re:"), name)
    return pattern == name
