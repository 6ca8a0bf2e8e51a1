"""Find a model's directory: a local one, or a snapshot in the Hugging Face hub's local cache. Nothing is downloaded.

    CACHE/models--OWNER--NAME/
        refs/main              the commit that a branch or tag was at when it was downloaded
        snapshots/COMMIT/...   links to blobs; files that were not downloaded are missing
        blobs/...              contents; a name that ends in .incomplete is of an unfinished download
        trees/COMMIT.json      all files of the repository (written by newer versions of huggingface_hub)

The cache is read directly: huggingface_hub's own functions take a snapshot without a README for incomplete, import a
client for the network, and do not tell which of the cases below it is.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.arguments import as_path
from runtime.errors import DataError, ModelError, SeqbuildError, UsageError, WeightsError
from runtime.host.regular_files import read_regular

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_MAIN = "main"
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_FORBIDDEN = re.compile(r"--|\.\.|\.git$")
_URL = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/.*)?")
_REVISION = re.compile(r"[\w.+=-]+(?:/[\w.+=-]+)*")
_COMMIT = re.compile(r"[\w.-]{1,255}", re.ASCII)
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_OTHER_WEIGHTS = re.compile(r"pytorch_model.*\.bin|.*\.(?:gguf|pth|pt|h5|msgpack|npz)|consolidated.*\.safetensors")
_FILE_ENDINGS = (".json", ".safetensors", ".gguf", ".bin", ".yaml", ".txt", ".jsonl", ".py", ".tar")
_ERRORS: Mapping[str, type[SeqbuildError]] = {"model": ModelError, "tokenizer": DataError, "weights": WeightsError}
# What `hf download` has to fetch for each purpose; weights need the whole repository.
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_INCLUDED: Mapping[str, tuple[str, ...]] = {"tokenizer": _SMALL}
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")  # tokenizers of all versions have one of them
_SHOWN = 4
_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class _HubId:
    """A hub id as a user stated it, and its purpose: model, tokenizer or weights."""

    repo: str
    revision: str | None
    what: str

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache; it need not exist."""
        return cache_directory() / "--".join(("models", *self.repo.split("/")))

    def command(self) -> str:
        """Return the command that downloads what is needed."""
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision is not None else ""
        return f"hf download {self.repo}{revision}" + "".join(
            f' --include "{pattern}"' for pattern in _INCLUDED.get(self.what, ())
        )

    def error(self, problem: str, hint: str) -> SeqbuildError:
        """Make the error of this purpose; the problem continues a sentence about the sought item."""
        noun = self.what if self.what == "model" else f"{self.what} of"
        at = f" at revision {self.revision}" if self.revision is not None else ""
        verb = "are" if self.what == "weights" else "is"
        return _ERRORS.get(self.what, ModelError)(f"the {noun} {self.repo!r}{at} {verb} {problem}", hint=hint)


def resolve_directory(given: str | os.PathLike[str], *, revision: str | None = None, what: str = "model") -> Path:
    """Return the directory of a model: a given one unchanged, or the snapshot of a hub id in the local cache.

    Args:
        given: a directory, a hub id (`owner/name`), or `owner/name@revision`.
        revision: branch, tag or commit of a hub id; None for the one in `given`, or `main`.
        what: the purpose: `model` (its config suffices), `tokenizer` or `weights`; used in messages.

    Raises:
        ModelError, DataError, WeightsError: by purpose, if it is not on this machine; with the command to download it.
        UsageError: for a revision that is invalid, or of a directory.
    """
    text = os.fspath(given)
    if "\0" not in text and os.path.isdir(text or "\0"):
        if revision is not None:
            raise UsageError(
                f"a revision ({revision}) requires a hub id, but {text} is a directory", hint="leave out --revision"
            )
        return Path(text)
    sought = _parsed(text, revision, what)
    if sought is None or os.path.exists(text):
        raise _no_directory(text, what)
    snapshot = cached_snapshot(sought.repo, sought.revision)
    if snapshot is None:
        raise _not_cached(sought) if not sought.folder.is_dir() else _no_revision(sought)
    _require_files(sought, snapshot)
    return snapshot


def weights_directory(weights: Any) -> Path:
    """Return the directory of an argument `weights`: a path or a hub id. Raises as `resolve_directory`."""
    as_path("weights", weights)
    return resolve_directory(weights, what="weights")


def cached_snapshot(repo: str, revision: str | None = None, *, kind: str = "models") -> Path | None:
    """Return the directory of a hub id's snapshot in the local cache, or None. The snapshot may be incomplete.

    Args:
        repo: the id.
        revision: branch, tag or commit; None for `main`.
        kind: `models` or `datasets`.
    """
    if not is_id(repo):
        return None
    folder = cache_directory() / "--".join((kind, *repo.split("/")))
    stated = _checked(revision) if revision is not None else _MAIN
    commit = _commits(folder).get(stated, stated)
    if _COMMIT.fullmatch(commit) is None or commit in (".", ".."):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def name_of(source: str) -> str:
    """Return the last part of a hub id, without owner and revision."""
    return source.partition("@")[0].rpartition("/")[2]


def download_command(repo: str, *, revision: str | None = None, what: str = "model") -> str:
    """Return the command that downloads a model's repository, or the part of it that a purpose needs."""
    return _HubId(repo=repo, revision=revision, what=what).command()


def completion_of(directory: Path) -> str | None:
    """Return the command that completes a snapshot in the hub's cache; None for any other directory."""
    folder = directory.parent.parent
    if directory.parent.name != "snapshots" or not folder.name.startswith("models--"):
        return None
    repo = folder.name.removeprefix("models--").replace("--", "/")
    return download_command(repo, revision=directory.name)


def is_inside(path: Path, home: Path) -> bool:
    """Whether this is a regular file inside a resolved directory; links may lead only into the hub's cache."""
    if not path.is_file():
        return False
    target = path.resolve()
    is_of_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith(("models--", "datasets--"))
    return home in target.parents or is_of_hub


def cache_directory() -> Path:
    """Return the directory of the hub's local cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def is_id(text: str) -> bool:
    """Whether a text can be the id of a model or a data set on the hub."""
    return _ID.fullmatch(text) is not None and _FORBIDDEN.search(text) is None


def _parsed(text: str, revision: str | None, what: str) -> _HubId | None:
    """Parse a hub id with an optional revision; return None for other texts."""
    repo, at, stated = text.partition("@")
    if not is_id(repo) or (repo.endswith(_FILE_ENDINGS) and not at):
        return None
    if at and revision is not None and stated != revision:
        raise UsageError(f"{text} and --revision {revision} state different revisions", hint="state one")
    chosen = stated if at else revision
    return _HubId(repo=repo, revision=None if chosen is None else _checked(chosen), what=what)


def _checked(revision: str) -> str:
    """Require a revision that is the name of a branch or tag, or a commit: it becomes part of a path."""
    is_valid = isinstance(revision, str) and _REVISION.fullmatch(revision) and len(revision) <= 255
    if not is_valid or any(part in (".", "..") for part in revision.split("/")):
        raise UsageError(f"the revision {revision!r} is invalid", hint="it must be a branch, a tag or a commit")
    return revision


def _commits(folder: Path) -> dict[str, str]:
    """Return the commit of each branch and tag that was downloaded."""
    found = {}
    for path in sorted((folder / "refs").rglob("*")):
        if path.is_file() and path.stat().st_size <= 255:
            found[path.relative_to(folder / "refs").as_posix()] = path.read_text("utf-8", "replace").strip()
    return found


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def _no_directory(text: str, what: str) -> SeqbuildError:
    """Describe a path that does not exist, or that is not a directory."""
    error = _ERRORS.get(what, ModelError)
    kinds = "a directory, a config.json or a hub id" if what == "model" else "a directory or a hub id"
    if not text:
        return error(f"no {what} given", hint=f"pass {kinds}")
    url = _URL.fullmatch(text.replace(":/", "://").replace(":///", "://"))
    if url is not None and is_id(url[1]):
        return error(f"the {what} is given as the URL {text}", hint=f"pass its id {url[1]}")
    if "\0" not in text and os.path.exists(text):
        return error(f"{text} is a file, but the {what} must be {kinds}", hint="pass the directory that contains it")
    hint = f"pass {kinds}"
    home, near = os.path.expanduser(text), _near_directory(text)
    if text.startswith("~") and "\0" not in text and os.path.exists(home):
        hint = f"the shell did not replace ~; write {home}"
    elif near is not None:
        hint = f"did you mean {near}?"
    return error(f"there {'are' if what == 'weights' else 'is'} no {what} at {text}", hint=hint)


def _not_cached(sought: _HubId) -> SeqbuildError:
    """Describe an id of which nothing is cached: other places and spellings, and how to get it."""
    cache = cache_directory()
    name = sought.folder.name
    elsewhere = [place for place in _other_caches(cache) if (place / name).is_dir()]
    if elsewhere:
        problem = f"not in the local cache {cache}{_set_by()}, but in {elsewhere[0]}"
        return sought.error(problem, f"set HF_HUB_CACHE={shlex.quote(str(elsewhere[0]))}")
    spelled = [entry.removeprefix("models--") for entry in _names(cache) if entry.startswith("models--")]
    known = {entry.replace("--", "/").lower(): entry.replace("--", "/") for entry in spelled}
    near = difflib.get_close_matches(sought.repo.lower(), known, n=1, cutoff=0.85)
    local = _near_directory(sought.repo)
    similar = f"the directory {local}" if local else f"{known[near[0]]}, which is cached" if near else ""
    hint = f"did you mean {similar}? Otherwise d" if similar else "d"
    problem = f"not in the local cache {cache}{_set_by()}, and no directory has this name"
    return sought.error(problem, f"{hint}ownload it: {sought.command()}; {_access(sought.repo)}")


def _near_directory(text: str) -> str | None:
    """Return an existing directory with a similar name next to this path."""
    folder, name = os.path.split(text.rstrip("/"))
    if "\0" in text or not os.path.isdir(folder or "."):
        return None
    try:
        names = [entry.name for entry in os.scandir(folder or ".") if entry.is_dir()]
    except OSError:  # it may not be readable
        return None
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return os.path.join(folder, near[0]) if near else None


def _access(repo: str) -> str:
    """Say what a gated or private repository needs; whether it is one is not known without a network."""
    from huggingface_hub import constants

    has_token = bool(os.environ.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).is_file()
    login = "use a token that may read it" if has_token else "log in with hf auth login, as no token is stored here"
    return f"if it is gated or private, first accept its terms at {constants.ENDPOINT}/{repo} and {login}"


def _set_by() -> str:
    """Name the environment variable that moved the cache."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    used = next((name for name in names if os.environ.get(name)), None)
    return f" (from {used})" if used else ""


def _other_caches(cache: Path) -> list[Path]:
    """List the places where a cache would be under other settings of the environment."""
    homes = [os.environ.get("HF_HOME"), "~/.cache/huggingface", os.environ.get("TRANSFORMERS_CACHE")]
    places = [Path(home).expanduser() for home in homes if home]
    return [place for home in places for place in (home / "hub", home) if place.is_dir() and place != cache]


def _no_revision(sought: _HubId) -> SeqbuildError:
    """Describe an id that is cached, but not at this revision."""
    snapshots, commits = _names(sought.folder / "snapshots"), _commits(sought.folder)
    named = [name for name, commit in commits.items() if commit in snapshots]
    cached = named + [commit for commit in snapshots if commit not in commits.values()]
    if not cached or (sought.revision or _MAIN) in commits:
        problem = f"not downloaded completely: no file is complete{_unfinished(sought)}"
        return sought.error(problem, f"continue with: {sought.command()}; {_access(sought.repo)}")
    others = f"{', '.join(cached[:_SHOWN])}{' and others' if len(cached) > _SHOWN else ''}"
    missing = "" if sought.revision is not None else f" at revision {_MAIN}"
    problem = f"not in the local cache {cache_directory()}{missing}; its cached revisions are {others}"
    return sought.error(problem, f"pass --revision {cached[0]}, or download it: {sought.command()}")


def _unfinished(sought: _HubId) -> str:
    count = sum(name.endswith(".incomplete") for name in _names(sought.folder / "blobs"))
    return f"; unfinished downloads: {count}" if count else ""


def _require_files(sought: _HubId, snapshot: Path) -> None:
    """Require the files of this purpose in a snapshot."""
    names = _names(snapshot)
    broken = [name for name in names if not (snapshot / name).exists()]  # links to blobs that do not exist
    complete = [name for name in names if name not in broken]
    missing = [name for name in broken if not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    if sought.what == "weights":
        missing += _missing_weights(sought, snapshot, complete)
    elif sought.what == "tokenizer" and not set(complete) & set(_TOKENIZER_FILES):
        missing += [name for name in (" or ".join(_TOKENIZER_FILES),) if not set(missing) & set(_TOKENIZER_FILES)]
    if sought.what != "tokenizer" and "config.json" not in (*complete, *missing):
        missing.append("config.json")
    if not missing or (missing == ["config.json"] and "adapter_config.json" in names):
        return
    listed = _listed(sought.folder, snapshot.name)
    absent = [name for name in missing if listed is not None and not set(name.split(" or ")) & listed]
    if absent:
        kinds = "pass the tokenizer of another directory or id" if sought.what == "tokenizer" else "use another one"
        raise sought.error(f"missing: its repository does not contain {absent[0]}", kinds)
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    problem = f"only partly downloaded: {snapshot} does not contain {', '.join(missing[:_SHOWN])}{more}"
    raise sought.error(problem + _unfinished(sought), f"continue with: {sought.command()}")


def _missing_weights(sought: _HubId, snapshot: Path, complete: list[str]) -> list[str]:
    """List the missing weights files of a snapshot; all of them must be safetensors."""
    if INDEX_NAME in complete:
        shards = _shards(snapshot / INDEX_NAME)
        return [name for name in shards if name not in complete]
    if SINGLE_NAME in complete:
        return []
    if any(_SHARD.fullmatch(name) for name in complete):
        return [INDEX_NAME]
    if "adapter_config.json" in complete:
        return []  # the reader rejects an adapter with a better message
    listed = _listed(sought.folder, snapshot.name)
    if listed is not None and listed & {INDEX_NAME, SINGLE_NAME}:
        return [INDEX_NAME if INDEX_NAME in listed else SINGLE_NAME]
    others = sorted(name for name in listed or complete if _OTHER_WEIGHTS.fullmatch(name))
    if not others:
        return [SINGLE_NAME]
    where = "the cache contains" if listed is None else "its repository contains"
    first = f"if its repository also has safetensors: {sought.command()}; otherwise " if listed is None else ""
    if not others[0].endswith(".bin"):
        hint = f"{first}use a repository with safetensors in transformers' format"
    else:
        load = f"AutoModelForCausalLM.from_pretrained('{sought.repo}').save_pretrained('DIRECTORY')"
        hint = f"{first}if you trust it, as a pickle may contain any code, convert it with transformers: {load}"
    raise sought.error(f"unsupported: {where} no safetensors, only {others[0]}", hint)


def _shards(index: Path) -> list[str]:
    """Return the names of the shards in an index; none for a damaged index, which the reader reports."""
    try:
        if index.stat().st_size > _LIMIT_BYTES:
            return []
        names = json.loads(read_regular(index))["weight_map"].values()
        return sorted({name for name in names if isinstance(name, str) and "/" not in name})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _listed(folder: Path, commit: str) -> set[str] | None:
    """Return the names of all files in a commit, if huggingface_hub wrote them down; None if not known."""
    try:
        files = json.loads(read_regular(folder / "trees" / f"{commit}.json"))["files"]
        return set(files) if isinstance(files, dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
