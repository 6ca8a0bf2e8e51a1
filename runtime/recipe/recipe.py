"""A recipe: which modules are quantized, with which scheme, by which algorithm.

A recipe is a YAML file in llm-compressor's dialect:

    quant_stage:
      quant_modifiers:
        GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head], dampening_frac: 0.01}

Names of stages (`*_stage`) and of groups of modifiers (`*_modifiers`) are free. A modifier may also stand at the top
level of the file. `modifiers` states what its fields may be.

A target is the name of a module, `re:` with a regular expression that matches names from their beginning, or a class.
Names and regular expressions take precedence over classes. Two of them that give one module to different groups are
an error, because readers of the checkpoint disagree on which one wins.

Reading a recipe imports torch and compressed-tensors; importing this module does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import shown
from runtime.errors import RecipeError
from runtime.host.regular_files import read_text, reason_of

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from runtime.recipe.auto_bits_modifier import AutoBitsModifier
    from runtime.recipe.config_groups import ConfigGroup
    from runtime.recipe.modifiers import Algorithm, AutoRoundOptions, GptqOptions, Group, QuantizationModifier
    from runtime.recipe.rescaling_modifiers import Transform
    from runtime.recipe.rotation_modifiers import Rotation
    from runtime.recipe.yaml import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """How one module is quantized.

    Attributes:
        scheme: the format of its weight and inputs.
        algorithm: round-to-nearest, GPTQ or AutoRound.
        options: of GPTQ.
        group: the index in `Recipe.groups`.
        min_tokens: how many tokens must reach it during calibration.
        clip: whether AWQ searches the ranges of its groups.
        tuning: the options of AutoRound.
    """

    scheme: QuantizationScheme
    algorithm: Algorithm
    options: GptqOptions | None
    group: int
    min_tokens: int = 0
    clip: bool = False
    tuning: AutoRoundOptions | None = None

    @property
    def is_error_aware(self) -> bool:
        """Whether GPTQ's target is the output of the original model."""
        return self.algorithm == "gptq" and self.options is not None and self.options.is_error_aware

    @property
    def is_tuned(self) -> bool:
        """Whether AutoRound takes steps, toward the output of the original model's block."""
        return self.tuning is not None and self.tuning.iters > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The modifiers of a recipe, in the order of the file.

    Attributes:
        modifiers: those that quantize.
        source: the name of the file.
        text: its contents.
        transforms: modifiers that rescale before.
        rotations: modifiers that rotate before these.
        search: a modifier that a search replaces before a run; None for a plain recipe. The first of `modifiers` stands
            for its result, in plans and checks: it has the largest candidate.
        choice: what a search has chosen for this recipe, as JSON; empty for a recipe that was written so.
    """

    modifiers: tuple[QuantizationModifier, ...]
    source: str
    text: str
    transforms: tuple[Transform, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    search: AutoBitsModifier | None = None
    choice: str = ""

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: the file cannot be read, or is not a valid recipe; the message has the line.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise RecipeError(f"the recipe must be the path of a file, not {shown(path)}")
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {str(path)!r} cannot be read: {reason_of(error)}") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, origin: str) -> Recipe:
        """Read a recipe from a string; messages name `origin` as its file.

        Raises:
            RecipeError: it is not a valid recipe; the message has the line.
        """
        if not isinstance(text, str):
            raise RecipeError(f"the text of the recipe {origin} must be a str, not {shown(text)}")
        from runtime.recipe.document import read_modifiers

        read = read_modifiers(text, origin)
        return cls(
            modifiers=read.quantizing,
            transforms=read.rescaling,
            rotations=read.rotating,
            search=read.searching,
            source=origin,
            text=text,
        )

    @classmethod
    def from_modifiers(
        cls, modifiers: Iterable[QuantizationModifier | AutoBitsModifier | Transform | Rotation]
    ) -> Recipe:
        """Make a recipe of modifiers that were created in Python. Messages have the number of a modifier as its line.

        Raises:
            RecipeError: the modifiers do not fit together.
        """
        from runtime.recipe.yaml import in_one_line

        lines = []
        for number, modifier in enumerate(modifiers, start=1):
            stage = {f"modifier_{number}_stage": {"all_modifiers": {type(modifier).__name__: modifier.table}}}
            lines.append(in_one_line(stage)[1:-1])
        return cls.from_text("\n".join(lines), "recipe")

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all modifiers, in the order of the checkpoint's config."""
        return tuple(group for modifier in self.modifiers for group in modifier.groups)

    @property
    def cache(self) -> QuantizationArgs | None:
        """The scheme of the key-value cache: that of the first modifier that has one."""
        return next((modifier.cache for modifier in self.modifiers if modifier.cache is not None), None)

    @property
    def attention(self) -> tuple[ConfigGroup, ...]:
        """The groups that round the queries of attention as well."""
        return tuple(group for modifier in self.modifiers for group in modifier.attention)

    @property
    def sequential_targets(self) -> tuple[str, ...]:
        """The sequential targets of all modifiers, each once, in the order of the file."""
        return tuple(dict.fromkeys(t for modifier in self.modifiers for t in modifier.sequential_targets))

    def assign(self, linears: Mapping[str, type | str]) -> dict[str, Assignment]:
        """Assign a scheme and an algorithm to each module that the recipe quantizes.

        Args:
            linears: the classes, or names of classes, of all modules that can be quantized, by dotted name.

        Returns:
            Assignments in the order of `linears`.

        Raises:
            RecipeError: a target matches no module, two modifiers or groups match the same one, or none is left to
                quantize and the recipe does not quantize the cache alone.
        """
        groups = self.groups
        if not groups and self.cache is not None:
            return {}
        unmatched = {pattern: None for group in groups for pattern in group.targets}
        assigned: dict[str, Assignment] = {}
        for name, module_class in linears.items():
            match = _match(name, module_class, groups)
            for pattern in match.patterns:
                unmatched.pop(pattern, None)
            if match.claims:
                index = self._only_claim(name, match)
                group, modifier = groups[index], groups[index].modifier
                assigned[name] = Assignment(
                    scheme=group.scheme,
                    algorithm=modifier.algorithm,
                    options=group.options,
                    group=index,
                    clip=modifier.algorithm == "rtn" and self._clips(group.scheme),
                    min_tokens=max([modifier.min_tokens, *(entry.min_tokens for entry in self.transforms)]),
                    tuning=group.tuning,
                )
        for pattern in unmatched:
            raise RecipeError(
                f"{self.source}:{pattern.line}: the target {str(pattern)!r} matches no module",
                hint=f"the model has {some(linears)}" if linears else "the model has no Linear module",
            )
        if not assigned:
            raise RecipeError(f"{self.source}: the recipe ignores every module that it targets")
        return assigned

    def means(self, name: str, module_class: type | str) -> bool:
        """Whether a target matches a module, even one that cannot be quantized."""
        return bool(_match(name, module_class, self.groups).seen)

    def idle_ignores(self, modules: Mapping[str, type | str]) -> list[str]:
        """List the patterns to ignore that match none of these modules, by name or class."""
        from runtime.formats.targets import class_names, matches_name

        texts = dict.fromkeys(text for modifier in self.modifiers for text in modifier.ignore)
        classes = {known for module_class in dict.fromkeys(modules.values()) for known in class_names(module_class)}
        return [text for text in texts if text not in classes and not any(matches_name(text, name) for name in modules)]

    def _clips(self, scheme: QuantizationScheme) -> bool:
        """Whether an AWQModifier searches ranges, and the observer of the scheme does not."""
        from runtime.formats.presets import MIN_MAX_OBSERVERS

        args = scheme.weights
        is_plain = args.observer in (None, *MIN_MAX_OBSERVERS) and args.strategy in ("group", "channel", "tensor_group")
        return is_plain and any(entry.algorithm == "awq" and entry.clip for entry in self.transforms)

    def _only_claim(self, name: str, match: _Match) -> int:
        """Return the index of the only group of a module.

        Raises:
            RecipeError: it has several, or readers of the checkpoint would assign it to another one.
        """
        groups = self.groups
        claims, seen = [groups[index] for index in match.claims], [groups[index] for index in match.seen]
        claimants = {(group.modifier.line, group.modifier.name) for group in claims}
        if len(claimants) > 1:
            (first_line, first), (line, second) = sorted(claimants)[:2]
            raise RecipeError(
                f"{self.source}:{line}: {second} and the {first} on line {first_line} both match {name}",
                hint="add it to ignore in one of them",
            )
        lines = [group.targets[0].line for group in seen]
        if len(match.seen) > 1:
            raise RecipeError(
                f"{self.source}:{lines[1]}: this group and the one on line {lines[0]} both match {name}",
                hint="make their targets disjoint; readers of the checkpoint disagree on which one wins",
            )
        if match.seen[0] not in match.claims:
            raise RecipeError(
                f"{self.source}:{claims[0].modifier.line}: readers of the checkpoint would assign {name}"
                f" to the group on line {lines[0]}, whose modifier ignores it",
                hint="name the module in targets here, or narrow the targets there",
            )
        return match.seen[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """The groups that match a module.

    Attributes:
        patterns: the targets that match.
        seen: the groups that a reader of the checkpoint finds; the config has one ignore list for all groups, so
            that of a modifier does not count.
        claims: the groups whose modifier does not ignore it.
    """

    patterns: tuple[Text, ...]
    seen: tuple[int, ...]
    claims: tuple[int, ...]


def _match(name: str, module_class: type | str, groups: Sequence[Group]) -> _Match:
    from runtime.formats.targets import class_names, matches_name

    classes = class_names(module_class)
    patterns: list[Text] = []
    by_name: list[int] = []
    by_class: list[int] = []
    for index, group in enumerate(groups):
        named = [pattern for pattern in group.targets if matches_name(pattern, name)]
        classed = [pattern for pattern in group.targets if pattern in classes]
        patterns += named + classed
        if named or classed:
            (by_name if named else by_class).append(index)
    claims = [
        index
        for index in by_name + by_class
        if not any(matches_name(text, name) or text in classes for text in groups[index].modifier.ignore)
    ]
    return _Match(patterns=tuple(patterns), seen=tuple(by_name or by_class), claims=tuple(claims))


def some(names: Iterable[str]) -> str:
    """Join names for a message: the first three, and the number of the others."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def require_recipe(value: Any) -> Recipe:
    """Return an argument that must be a recipe, not a path, a text, a dict or a modifier of another library.

    Raises:
        RecipeError: it is anything else.
    """
    if isinstance(value, Recipe):
        return value
    raise RecipeError(
        f"recipe is {shown(value)}, not a Recipe", hint="use Recipe.from_file(path) or Recipe.from_text(text, name)"
    )
