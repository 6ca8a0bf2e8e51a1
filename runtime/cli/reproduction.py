"""Write the command that repeats a run, for its model card: options that decide the result, and names instead of paths.

Options of the host (memory, workers, logs) and the output are left out, so that equal runs have equal commands.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

_DECIDING = (
    *("weights", "model", "artifact", "revision", "recipe", "tokenizer", "dtype", "device", "leaves", "text_only"),
    *("data", "batch_size", "samples", "seq_len", "pack", "loss_mask", "column", "split", "config", "data_revision"),
    *("data_format", "shuffle", "seed", "max_shard_size", "propagate_error", "moe_calibrate_all_experts"),
    *("solve_products", "allow_version_skew", "trust_remote_code", "statistics"),
)
_PLACES = ("data", "tokenizer", "artifact", "model", "weights", "statistics")  # may be paths
_SETTINGS = "::"  # follow the place of a source


def repeating_command(context: typer.Context, weights: Path) -> str:
    """Return the command line of a run with the recipe that it writes.

    Args:
        context: of the command.
        weights: the directory of the source weights.
    """
    from runtime.provenance.record import RECIPE_NAME
    from runtime.provenance.source_model import hub_origin

    repo, commit = hub_origin(weights)
    values = {name: value for name, value in context.params.items() if name in _DECIDING and _is_given(context, name)}
    values["recipe"] = RECIPE_NAME
    if repo:
        values |= {"revision": commit, "weights" if "weights" in context.params else "model": repo}
    words = ["seqbuild", str(context.info_name)]
    for parameter in sorted(context.command.params, key=lambda one: one.param_type_name != "argument"):
        if parameter.name in values:
            words += _words(parameter, values[parameter.name])
    return shlex.join([*words, "-o", "OUT"])


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _words(parameter: Any, value: Any) -> Iterator[str]:
    """Yield an argument, or an option for each of its values."""
    is_argument = parameter.param_type_name == "argument"
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, bool):
            names: Sequence[str] = parameter.opts if one else parameter.secondary_opts
            yield names[0]
            continue
        text = _named(str(one)) if parameter.name in _PLACES else str(one)
        text = text.partition(":")[0] if parameter.name == "device" else text
        yield from [text] if is_argument else [parameter.opts[0], text]


def _named(place: str) -> str:
    """Return the name of a file or directory without the directories that contain it."""
    path, settings, rest = place.partition(_SETTINGS)
    is_path = os.path.isabs(path) or os.path.lexists(path)
    return (Path(os.path.abspath(path)).name or path) + settings + rest if is_path else place


def settings_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text, those that have no value left out."""
    return {name: _text(value) for name, value in values.items() if value is not None and value != ()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
