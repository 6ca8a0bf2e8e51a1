"""Describe the source of a quantized model: its id on the hub, and what its own model card states for the hub.

The card of the source is untrusted text. Only single words are taken over, never its prose, so that it cannot pose as
the card of the result.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from runtime.errors import RecipeError
from runtime.host.hub import is_id
from runtime.host.regular_files import open_regular
from runtime.provenance.record import CARD_NAME, CardFacts
from runtime.recipe.yaml import parse

_LARGEST_HEADER = 2**16
_HEADER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LINK = re.compile(r"https?://[\w./~%+-]{1,400}|[\w.-]{1,100}")
_TITLE = re.compile(r"[\w .,()+-]{1,100}")
_MOST_LANGUAGES = 200
_YAML_WORDS = {False: "no", True: "yes"}  # YAML 1.1 reads the code of Norwegian as false


def hub_origin(directory: Path) -> tuple[str, str]:
    """Return the id and the commit of a snapshot in the hub's cache; two empty strings for any other directory."""
    place = Path(os.path.realpath(directory))
    folder = place.parent.parent.name
    if place.parent.name != "snapshots" or not folder.startswith("models--"):
        return "", ""
    repo = folder.removeprefix("models--").replace("--", "/")
    return (repo, place.name) if is_id(repo) and _WORD.fullmatch(place.name) else ("", "")


def card_facts(directory: Path) -> CardFacts:
    """Read the header of a model card; what is missing, damaged or too long is left out."""
    fields = _header(directory / CARD_NAME)
    license_id = _matching(fields.get("license"), _WORD).lower()
    languages = fields.get("language")
    listed = languages[:_MOST_LANGUAGES] if isinstance(languages, list) else [languages]
    return CardFacts(
        license=license_id,
        license_name=_matching(fields.get("license_name"), _TITLE) if license_id == "other" else "",
        license_link=_matching(fields.get("license_link"), _LINK) if license_id else "",
        language=tuple(dict.fromkeys(word for entry in listed if (word := _matching(entry, _WORD)))),
        pipeline_tag=_matching(fields.get("pipeline_tag"), _WORD),
    )


def _matching(value: Any, pattern: re.Pattern[str]) -> str:
    text = _YAML_WORDS[value] if isinstance(value, bool) else value
    return str(text) if isinstance(text, str) and pattern.fullmatch(text) else ""


def _header(path: Path) -> dict[str, Any]:
    """Return the YAML at the beginning of a card; empty if there is none."""
    try:
        with open_regular(path) as file:
            text = file.read(_LARGEST_HEADER).decode("utf-8", "ignore")
    except OSError:
        return {}
    header = _HEADER.match(text)
    try:
        found = parse(header[1], origin=CARD_NAME) if header else {}
    except (RecipeError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
