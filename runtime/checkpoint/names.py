"""The names of a checkpoint's tensors."""

from __future__ import annotations


def spellings(key: str, prefix: str) -> tuple[str, ...]:
    """Return a key, and the same key with the base model's prefix added or removed, as transformers tolerates."""
    if not prefix:
        return (key,)
    return (key, key.removeprefix(f"{prefix}.") if key.startswith(f"{prefix}.") else f"{prefix}.{key}")


def checkpoint_name(key: str, name: str) -> str:
    """Return the checkpoint's name for the module of a stacked parameter.

    Names differ above the layers (`model.language_model` and `language_model.model`) and within them. Up to the layer's
    number the name is that of the tensor `key`, and from there on that of the parameter `name`.
    """
    parts, own = key.split("."), name.split(".")[:-1]
    numbers = [[place for place, part in enumerate(names) if part.isdigit()] for names in (parts, own)]
    if not all(numbers):
        return ".".join(own)
    return ".".join([*parts[: numbers[0][-1] + 1], *own[numbers[1][-1] + 1 :]])
