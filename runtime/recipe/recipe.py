"""Recipes: which modules are quantized, to which scheme, by which algorithm.

A YAML file in llm-compressor's dialect, so that existing recipes run:

    quant_stage:
      quant_modifiers:
        GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head], dampening_frac: 0.01}

Names of stages (`*_stage`) and of modifier groups (`*_modifiers`) are free; a modifier may also stand at the
top of the file. What the fields may hold is the matter of `recipe_dialect`.

A target is a module's name, `re:` with a regular expression that matches names from their beginning, or a
class. A name or regular expression goes before a class. Two names or regular expressions that give one module
to different groups are an error, because the checkpoint's readers disagree on which of them wins.

Reading a recipe imports torch and compressed-tensors; importing this module does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import shown
from runtime.errors import RecipeError
from runtime.host.regular_files import read_text
from runtime.recipe.dialect import Algorithm, GptqOptions, Group, Modifier, read_modifiers
from runtime.recipe.fields import Pattern
from runtime.recipe.key_value_cache import AttentionGroup
from runtime.recipe.transforms import Transform
from runtime.recipe.yaml import Value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

__all__ = ["Assignment", "GptqOptions", "Group", "Modifier", "Recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What is done to one module. `group` is the index in `Recipe.groups`; `min_tokens` is how many inputs it must have
    seen; `clip` says that AWQ searches the ranges of its groups.
    """

    scheme: QuantizationScheme
    algorithm: Algorithm
    options: GptqOptions | None
    group: int
    min_tokens: int = 0
    clip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The modifiers of a recipe, in the file's order: those that round, and those that rescale before. `source` is the
    file's name, `text` its content.
    """

    modifiers: tuple[Modifier, ...]
    source: str
    text: str
    transforms: tuple[Transform, ...] = ()

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: when the file cannot be read, or for what it says, with the line.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise RecipeError(f"the recipe is {path!r}"[:200], hint="give the path of a file")
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, origin: str) -> Recipe:
        """Read a recipe from a string; `origin` stands in messages where a file's name would.

        Raises:
            RecipeError: for what the recipe says, with the line.
        """
        if not isinstance(text, str):
            raise RecipeError(f"the recipe {origin} is {type(text).__name__}", hint="give YAML as a str")
        modifiers, transforms = read_modifiers(Value.parse(text, origin=origin))
        return cls(modifiers=modifiers, transforms=transforms, source=origin, text=text)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all modifiers; an index in here is a group's number in the checkpoint's config."""
        return tuple(group for modifier in self.modifiers for group in modifier.groups)

    @property
    def cache(self) -> QuantizationArgs | None:
        """The key-value cache's scheme: that of the first modifier that has one."""
        return next((modifier.cache for modifier in self.modifiers if modifier.cache is not None), None)

    @property
    def attention(self) -> tuple[AttentionGroup, ...]:
        """The groups that round attention's queries as well."""
        return tuple(group for modifier in self.modifiers for group in modifier.attention)

    @property
    def sequential_targets(self) -> tuple[str, ...]:
        """The sequential targets that modifiers ask for, each once, in the file's order."""
        return tuple(dict.fromkeys(t for modifier in self.modifiers for t in modifier.sequential_targets))

    def assign(self, linears: Mapping[str, type | str]) -> dict[str, Assignment]:
        """Say what is done to each module; a module that nothing is done to is left out.

        Args:
            linears: the classes, or names of classes, of all modules that can be quantized, by dotted name.

        Returns:
            Assignments in the order of `linears`.

        Raises:
            RecipeError: when a target matches no module, two modifiers or groups claim one, or none is left, unless all
                that the recipe quantizes is the cache.
        """
        owned = [(modifier, group) for modifier in self.modifiers for group in modifier.groups]
        if not owned and self.cache is not None:
            return {}
        unmatched = {pattern: None for _, group in owned for pattern in group.targets}
        assigned: dict[str, Assignment] = {}
        for name, module_class in linears.items():
            match = _match(name, module_class, owned)
            for pattern in match.patterns:
                unmatched.pop(pattern, None)
            if match.claims:
                index = self._only_claim(name, match, owned)
                modifier, group = owned[index]
                assigned[name] = Assignment(
                    scheme=group.scheme,
                    algorithm=modifier.algorithm,
                    options=group.options,
                    group=index,
                    clip=modifier.algorithm == "rtn" and self._clips(group.scheme),
                    min_tokens=max([modifier.min_tokens, *(entry.min_tokens for entry in self.transforms)]),
                )
        for pattern in unmatched:
            raise RecipeError(
                f"{self.source}:{pattern.line}: the target {pattern.text!r} matches no module",
                hint=f"the model has {some(linears)}" if linears else "it has no Linear module",
            )
        if not assigned:
            raise RecipeError(f"{self.source}: the recipe ignores every module that it targets")
        return assigned

    def means(self, name: str, module_class: type | str) -> bool:
        """Whether a target matches a module, whatever can be done to it."""
        return bool(
            _match(name, module_class, [(owner, group) for owner in self.modifiers for group in owner.groups]).seen
        )

    def idle_ignores(self, modules: Mapping[str, type | str]) -> list[str]:
        """Names and regular expressions to ignore that match none of these modules, by name or class."""
        from runtime.formats.targets import class_names, matches_name

        texts = dict.fromkeys(text for modifier in self.modifiers for text in modifier.ignore)
        classes = {known for module_class in dict.fromkeys(modules.values()) for known in class_names(module_class)}
        return [text for text in texts if text not in classes and not any(matches_name(text, name) for name in modules)]

    def _clips(self, scheme: QuantizationScheme) -> bool:
        """Whether an AWQModifier searches ranges, and the scheme does not ask for a search of its own."""
        from runtime.formats.presets import MIN_MAX_OBSERVERS

        args = scheme.weights
        is_plain = args.observer in (None, *MIN_MAX_OBSERVERS) and args.strategy in ("group", "channel", "tensor_group")
        return is_plain and any(entry.algorithm == "awq" and entry.clip for entry in self.transforms)

    def _only_claim(self, name: str, match: _Match, owned: list[tuple[Modifier, Group]]) -> int:
        """The one group that a module falls to.

        Raises:
            RecipeError: when several claim it, or the checkpoint's readers would take it for another one's.
        """
        claimants = list(dict.fromkeys((owned[i][0].line, owned[i][0].name) for i in match.claims))
        if len(claimants) > 1:
            (first_line, first), (line, second) = sorted(claimants)[:2]
            raise RecipeError(
                f"{self.source}:{line}: {second} claims {name}, and so does the {first} on line {first_line}",
                hint="let one of them ignore it",
            )
        lines = [owned[i][1].targets[0].line for i in match.seen]
        if len(match.seen) > 1:
            raise RecipeError(
                f"{self.source}:{lines[1]}: {name} falls to this group and to the one on line {lines[0]}",
                hint="make their targets disjoint; readers of the checkpoint disagree on which one wins",
            )
        if match.seen[0] not in match.claims:
            raise RecipeError(
                f"{self.source}:{owned[match.claims[0]][0].line}: readers of the checkpoint would take {name}"
                f" for the group on line {lines[0]}, whose modifier ignores it",
                hint="name the module in targets here, or narrow the targets there",
            )
        return match.seen[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """Which groups a module falls to.

    Args:
        patterns: the targets that match.
        seen: the groups that a reader of the checkpoint takes it for; the config has one ignore list for all
            groups, so a modifier's own does not count.
        claims: the groups whose modifier does not ignore it.
    """

    patterns: tuple[Pattern, ...]
    seen: tuple[int, ...]
    claims: tuple[int, ...]


def _match(name: str, module_class: type | str, owned: list[tuple[Modifier, Group]]) -> _Match:
    from runtime.formats.targets import class_names, matches_name

    classes = class_names(module_class)
    patterns: list[Pattern] = []
    by_name: list[int] = []
    by_class: list[int] = []
    for index, (_, group) in enumerate(owned):
        named = [pattern for pattern in group.targets if matches_name(pattern.text, name)]
        classed = [pattern for pattern in group.targets if pattern.text in classes]
        patterns += named + classed
        if named or classed:
            (by_name if named else by_class).append(index)
    claims = [
        index
        for index in by_name + by_class
        if not any(matches_name(text, name) or text in classes for text in owned[index][0].ignore)
    ]
    return _Match(patterns=tuple(patterns), seen=tuple(by_name or by_class), claims=tuple(claims))


def some(names: Iterable[str]) -> str:
    """The first names of a list that may be long, for a message."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def require_recipe(value: Any) -> Recipe:
    """A recipe.

    Raises:
        RecipeError: for anything else, such as a path, a text, a dict or another library's modifier.
    """
    if isinstance(value, Recipe):
        return value
    raise RecipeError(
        f"recipe is {shown(value)}", hint="make it with runtime.Recipe.from_file(path) or Recipe.from_text(text, name)"
    )
