"""Hub ids: snapshots in the local cache, and what is said about those that are missing, partial or misspelled."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

import runtime
import runtime.cli.app
import seqbuild.cli.app
from runtime.errors import DataError, ModelError, SeqbuildError, UsageError, WeightsError
from runtime.host.hub import cached_snapshot, resolve_directory
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import directory_bytes, nameless_bytes

REPO = "some-org/Tiny-1.5B"
OLD, NEW = "0" * 40, "1" * 40
INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX, *SHARDS)


class Cache:
    """A hub cache with the layout that huggingface_hub writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repo: str = REPO) -> Path:
        return self.root / ("models--" + repo.replace("/", "--"))

    def blob(self, content: bytes, repo: str = REPO, *, ending: str = "") -> Path:
        blobs = self.folder(repo) / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{len(list(blobs.iterdir())):064x}{ending}"
        blob.write_bytes(content)
        return blob

    def add(
        self,
        *names: str,
        files: Mapping[str, bytes] = {},
        repo: str = REPO,
        commit: str = NEW,
        ref: str | None = "main",
    ) -> Path:
        """Add files to a snapshot, as links to blobs."""
        snapshot = self.folder(repo) / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        if ref is not None:
            path = self.folder(repo) / "refs" / ref
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)
        index = json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}).encode()
        for name in (*names, *files):
            content = files.get(name, index if name == INDEX else b"{}")
            (snapshot / name).symlink_to(f"../../blobs/{self.blob(content, repo).name}")
        return snapshot

    def list(self, *names: str, commit: str = NEW) -> None:
        """Write the list of all files of a commit."""
        path = self.folder() / "trees" / f"{commit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format_version": 1, "files": {name: {"size": 2} for name in names}}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
        "TRANSFORMERS_CACHE",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Cache(tmp_path / "hub")


def refusal(given: str, *, what: str = "weights", revision: str | None = None) -> str:
    error = {"model": ModelError, "tokenizer": DataError, "weights": WeightsError}[what]
    with pytest.raises(error) as caught:
        resolve_directory(given, revision=revision, what=what)
    said = str(caught.value)
    assert "\n" not in said
    return said


class TestFound:
    @pytest.mark.parametrize("what", ["model", "tokenizer", "weights"])
    def test_a_directory_is_returned_as_it_is(self, tmp_path: Path, cache: Cache, what: str) -> None:
        (tmp_path / "some-org" / "Tiny-1.5B").mkdir(parents=True)
        cache.add(*WHOLE)
        for given in (tmp_path, str(tmp_path), "some-org/Tiny-1.5B", Path("some-org/Tiny-1.5B")):
            assert resolve_directory(given, what=what) == Path(given)
        with pytest.raises(UsageError, match=r"a revision \(v1\) requires a hub id, but some-org/Tiny-1.5B is a dir"):
            resolve_directory("some-org/Tiny-1.5B", revision="v1", what=what)

    def test_a_snapshot_by_branch_tag_commit_and_reference(self, cache: Cache) -> None:
        old, new = cache.add(*WHOLE, commit=OLD, ref="v1"), cache.add(*WHOLE)
        cache.add(commit=OLD, ref="refs/pr/1")
        for given, revision, expected in [
            (REPO, None, new),
            (Path(REPO), "main", new),
            (REPO, "v1", old),
            (REPO, OLD, old),
            (f"{REPO}@v1", None, old),
            (f"{REPO}@refs/pr/1", None, old),
            (f"{REPO}@{NEW}", NEW, new),
        ]:
            assert resolve_directory(given, revision=revision, what="weights") == expected
        with pytest.raises(UsageError, match="state different revisions"):
            resolve_directory(f"{REPO}@v1", revision="main", what="weights")

    def test_an_id_without_an_owner(self, cache: Cache) -> None:
        snapshot = cache.add("config.json", "model.safetensors", repo="gpt2")
        assert resolve_directory("gpt2", what="weights") == snapshot

    def test_each_purpose_needs_its_own_files(self, cache: Cache) -> None:
        snapshot = cache.add("config.json")
        assert resolve_directory(REPO, what="model") == snapshot
        assert "does not contain tokenizer_config.json or tokenizer.json (continue with: hf download" in refusal(
            REPO, what="tokenizer"
        )
        cache.add("tokenizer.json")
        assert resolve_directory(REPO, what="tokenizer") == snapshot
        assert "does not contain model.safetensors" in refusal(REPO)
        cache.add("model.safetensors")
        assert resolve_directory(REPO, what="weights") == snapshot

    def test_unfinished_downloads_of_other_files_do_not_matter(self, cache: Cache) -> None:
        snapshot = cache.add(*WHOLE)
        cache.blob(b"", ending=".incomplete")
        (snapshot / "consolidated.safetensors").symlink_to("../../blobs/gone")
        assert resolve_directory(REPO, what="weights") == snapshot


class TestNotCached:
    def test_the_command_and_the_cache(self, cache: Cache) -> None:
        said = refusal(REPO)
        assert said.startswith(f"the weights of {REPO!r} are not in the local cache {cache.root}, and no directory has")
        assert f"this name (download it: hf download {REPO}; if it is gated or private, first accept its terms" in said
        assert f"https://huggingface.co/{REPO} and log in with hf auth login, as no token is stored here)" in said
        said = refusal(REPO, revision="v2", what="model")
        assert f"the model {REPO!r} at revision v2 is not in the local cache " in said
        assert f"hf download {REPO} --revision v2;" in said
        assert f'hf download {REPO} --include "*.json" --include' in refusal(REPO, what="tokenizer")

    @pytest.mark.parametrize("place", ["file", "variable"])
    def test_a_token(self, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        (tmp_path / "token").write_text("x") if place == "file" else monkeypatch.setenv("HF_TOKEN", "x")
        assert "and use a token that may read it)" in refusal(REPO)

    @pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE"])
    def test_a_cache_that_a_variable_moved(
        self, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, str(tmp_path))
        assert (
            f"not in the local cache {cache.root} (from {name}), and no directory has this name (download"
            in refusal(REPO)
        )
        usual = Cache(tmp_path / "home" / ".cache" / "huggingface" / "hub")
        usual.add(*WHOLE)
        said = refusal(REPO)
        assert f"are not in the local cache {cache.root} (from {name}), but in {usual.root}" in said
        assert f"(set HF_HUB_CACHE={usual.root})" in said

    def test_a_misspelled_id(self, cache: Cache) -> None:
        cache.add(*WHOLE)
        for given in ("some-org/tiny-1.5b", "some-org/Tiny-1.5", "someorg/Tiny-1.5B"):
            assert f"did you mean {REPO}, which is cached? Otherwise download it: hf download {given};" in refusal(
                given
            )
        assert "did you mean" not in refusal("other/model")

    @pytest.mark.parametrize(
        ("given", "part"),
        [
            ("./models/lama", "there are no weights at ./models/lama (did you mean ./models/llama?)"),
            ("models/sub/x", "there are no weights at models/sub/x (pass a directory or a hub id)"),
            ("~/models", "at ~/models (the shell did not replace ~; write "),
            ("a.json", "there are no weights at a.json (pass a directory or a hub id)"),
            ("notes", "notes is a file, but the weights must be a directory or a hub id"),
            (f"https://huggingface.co/{REPO}/tree/main", f"(pass its id {REPO})"),
            (Path(f"https://huggingface.co/{REPO}"), f"(pass its id {REPO})"),
            ("", "no weights given"),
        ],
    )
    def test_a_path(self, cache: Cache, tmp_path: Path, given: str, part: str) -> None:
        (tmp_path / "models" / "llama").mkdir(parents=True)
        (tmp_path / "home" / "models").mkdir(parents=True)
        (tmp_path / "notes").write_text("")
        assert "did you mean the directory models/llama? Otherwise download it: hf download" in refusal("models/lama")
        assert part in refusal(given)

    @pytest.mark.parametrize(
        "given",
        [
            *("../x", "a/..", "..", ".", "/etc", "a/../b", "a/b/c", "a--b/c", "models--a--b", "a\\b", "a b/c", "a/b\n"),
            *("a\0b", "-a/b", "a/-b", "x" * 200, "a/b.git", "{a}/b", "a:b", "@main", "a/b@@c", "\udcff/x", "$(id)/x"),
            "é/x",
        ],
    )
    def test_no_id_leads_out_of_the_cache(self, cache: Cache, given: str) -> None:
        cache.add(*WHOLE, repo="a/b")
        assert cached_snapshot(given) is None
        with pytest.raises(SeqbuildError):
            resolve_directory(f"{given}/nowhere" if os.path.isdir(given.replace("\0", "")) else given, what="weights")


@pytest.mark.parametrize(
    "revision", ["../../x", "..", "/etc", "a//b", "a/", "a b", "", "a\0", "a\n", "refs/../..", "x" * 300]
)
def test_no_revision_leads_out_of_the_repository(cache: Cache, revision: str) -> None:
    cache.add(*WHOLE)
    with pytest.raises(UsageError, match=r"the revision .* is invalid \(it must be a branch, a tag or a commit\)"):
        resolve_directory(REPO, revision=revision, what="weights")


@pytest.mark.parametrize("commit", ["../../..", "..", ".", "", "/etc", "a/b", "x" * 300, "\0"])
def test_no_reference_leads_out_of_the_repository(cache: Cache, commit: str) -> None:
    cache.add(*WHOLE)
    (cache.folder() / "refs" / "main").write_text(commit)
    assert cached_snapshot(REPO) is None
    refusal(REPO)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "trees", "refs"])
def test_pipes_are_not_waited_for(cache: Cache, name: str) -> None:
    left_out = "config.json" if name == "trees" else name  # the list of files is read for missing ones
    snapshot = cache.add(*(other for other in WHOLE if other != left_out))
    folders = {"trees": cache.folder() / "trees" / f"{NEW}.json", "refs": cache.folder() / "refs" / "v1"}
    path = folders.get(name, snapshot / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    for what in ("model", "tokenizer", "weights"):
        with contextlib.suppress(SeqbuildError):
            resolve_directory(REPO, what=what)


class TestNoRevision:
    def test_the_cached_ones_are_listed(self, cache: Cache) -> None:
        cache.add(*WHOLE)
        cache.add(*WHOLE, commit=OLD, ref=None)
        said = refusal(REPO, revision="v2")
        assert f"the weights of {REPO!r} at revision v2 are not in the local cache {cache.root}; its cached rev" in said
        assert f"its cached revisions are main, {OLD} (pass --revision main, or download it: hf download {REPO}" in said
        assert said.endswith("hf download some-org/Tiny-1.5B --revision v2)")

    def test_main_was_not_downloaded(self, cache: Cache) -> None:
        cache.add(*WHOLE, ref="v1")
        said = refusal(REPO)
        assert "at revision main; its cached revisions are v1 (pass --revision v1, or download it: hf d" in said

    def test_many(self, cache: Cache) -> None:
        for number in range(9):
            cache.add(*WHOLE, commit=f"{number:040d}", ref=f"v{number}")
        assert "its cached revisions are v0, v1, v2, v3 and others (" in refusal(REPO)


class TestPartial:
    def test_nothing_is_complete(self, cache: Cache) -> None:
        cache.blob(b"", ending=".8f3a.incomplete")
        said = refusal(REPO, what="model")
        assert "is not downloaded completely: no file is complete; unfinished downloads: 1 (" in said
        assert f"(continue with: hf download {REPO}; if it is gated" in said
        (cache.folder() / "refs").mkdir()
        (cache.folder() / "refs" / "main").write_text(NEW)
        cache.add(*WHOLE, commit=OLD, ref="v1")
        assert "is not downloaded completely" in refusal(REPO, what="model")

    def test_shards(self, cache: Cache) -> None:
        snapshot = cache.add("config.json", INDEX, SHARDS[0], files={"x": b""})
        cache.blob(b"", ending=".incomplete")
        said = refusal(REPO, revision="main")
        assert (
            f"are only partly downloaded: {snapshot} does not contain {SHARDS[1]}, {SHARDS[2]}; unfinished downl"
            in said
        )
        assert f"(continue with: hf download {REPO} --revision main)" in said

    def test_many_shards(self, cache: Cache) -> None:
        names = [f"model-{number:05d}-of-00090.safetensors" for number in range(1, 91)]
        index = json.dumps({"weight_map": {name: name for name in names}}).encode()
        cache.add("config.json", files={INDEX: index})
        assert f"does not contain {', '.join(names[:4])} and 86 more" in refusal(REPO)

    def test_shards_without_their_index(self, cache: Cache) -> None:
        cache.add("config.json", SHARDS[1])
        assert f"does not contain {INDEX}" in refusal(REPO)

    @pytest.mark.parametrize("name", ["config.json", SHARDS[2], INDEX, "tokenizer.json"])
    def test_links_to_nothing(self, cache: Cache, name: str) -> None:
        """A copy of the cache without its blobs, or without links."""
        snapshot = cache.add(*WHOLE)
        (snapshot / name).resolve().unlink()
        assert f"does not contain {name}" in refusal(REPO)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"weight_map": 1}', b'{"weight_map": {"a": "../x"}}'])
    def test_a_damaged_index_is_left_to_the_reader(self, cache: Cache, content: bytes) -> None:
        snapshot = cache.add("config.json", files={INDEX: content})
        assert resolve_directory(REPO, what="weights") == snapshot

    def test_the_config_is_missing(self, cache: Cache) -> None:
        cache.add("model.safetensors")
        assert "does not contain config.json" in refusal(REPO, what="model")
        assert "does not contain config.json" in refusal(REPO)


class TestOtherFormats:
    def test_pickles(self, cache: Cache) -> None:
        cache.add("config.json", "pytorch_model.bin")
        said = refusal(REPO)
        assert (
            "the cache contains no safetensors, only pytorch_model.bin (if its repository also has safetensors: hf d"
            in said
        )
        assert f"convert it with transformers: AutoModelForCausalLM.from_pretrained('{REPO}').save_pretrained(" in said
        cache.list("config.json", "pytorch_model.bin")
        assert (
            "its repository contains no safetensors, only pytorch_model.bin (if you trust it, as a pickle may"
            in refusal(REPO)
        )
        cache.list("config.json", "pytorch_model.bin", "model.safetensors")
        assert "only partly downloaded" in refusal(REPO)

    def test_gguf(self, cache: Cache) -> None:
        cache.add("config.json", "m.Q4_K_M.gguf")
        assert "no safetensors, only m.Q4_K_M.gguf (" in refusal(REPO)

    def test_a_repository_without_a_tokenizer(self, cache: Cache) -> None:
        cache.add(*WHOLE[:1], *WHOLE[3:])
        cache.list(*WHOLE[:1], *WHOLE[3:])
        said = refusal(REPO, what="tokenizer")
        assert "its repository does not contain tokenizer_config.json or tokenizer.json (pass the tokenizer of" in said

    def test_an_adapter_is_left_to_the_reader(self, cache: Cache) -> None:
        snapshot = cache.add("adapter_config.json", "adapter_model.safetensors")
        assert resolve_directory(REPO, what="weights") == snapshot


@pytest.fixture
def cached(cache: Cache, place: Place) -> Cache:
    """The model of the place in the cache."""
    files = {path.name: path.read_bytes() for path in place.weights.iterdir()}
    cache.add(files=files)
    return cache


class TestCommands:
    """Every command that takes a model, weights or a tokenizer takes an id, and gives the same as for a directory."""

    def test_calibrate_evaluate_and_doctor(self, cached: Cache, place: Place, run: Run) -> None:
        assert run(place.calibrate())[0] == 0
        usual, place.out = nameless_bytes(place.out), place.folder / "again"
        snapshot, place.weights = place.weights, Path(REPO)
        code, _, complaint = run(place.calibrate("--revision", "main", "--tokenizer", f"{REPO}@{NEW}"))
        assert (code, complaint) == (0, "")
        assert nameless_bytes(place.out) == usual
        card = (place.out / "README.md").read_text()
        assert f"base_model: {REPO}\n" in card and f"--weights {REPO}" in card
        tokens = place.folder / "tokens.safetensors"
        shown = {}
        for weights in (str(snapshot), REPO):
            evaluate = ["evaluate", str(place.artifact), "--weights", weights, "--data", str(tokens), "--json"]
            code, told, _ = run(evaluate)
            shown[weights] = json.loads(told)["perplexity"]
            assert code == 0
        assert len(set(shown.values())) == 1
        place.out = place.folder / "third"
        doctor = ["doctor", *place.calibrate()[1:]]
        code, told, complaint = run(doctor)
        assert code == 0, told + complaint
        code, told, _ = run([*doctor, "--revision", "v9"])
        assert code == 1
        assert "problem  the weights of" in told and "its cached revisions are main" in told

    def test_the_python_api(self, cached: Cache, place: Place) -> None:
        artifact = runtime.load(place.artifact)
        batches = runtime.batches(runtime.load_tokens(place.folder / "tokens.safetensors").samples, 8)
        recipe = runtime.Recipe.from_file(place.recipe)
        runtime.calibrate(artifact, weights=f"{REPO}@main", recipe=recipe, batches=batches, out=place.out)
        found = [runtime.evaluate(artifact, weights=weights, batches=batches) for weights in (REPO, place.weights)]
        assert found[0].perplexity == found[1].perplexity
        with pytest.raises(WeightsError, match="at revision v2"):
            runtime.evaluate(artifact, weights=f"{REPO}@v2", batches=batches)

    def test_the_compiler(self, cached: Cache, place: Place, run: Run, tmp_path: Path) -> None:
        def call(*arguments: str | Path) -> tuple[int, str, str]:
            return run([str(argument) for argument in arguments], seqbuild.cli.app.main)

        code, told, complaint = call("compile", REPO, "--revision", "main", "-o", tmp_path / "artifacts")
        assert code == 0, complaint
        assert f" --weights {REPO} --revision main --recipe " in told
        code, told, _ = call("compile", f"{REPO}@main", "-o", tmp_path / "artifacts", "--json")
        artifact = Path(json.loads(told)["path"])
        assert artifact.name.startswith("Tiny-1.5B-")
        assert call("verify", artifact, "--weights", REPO, "--revision", NEW)[0] == 0
        assert call("verify", artifact, "--rebuild", "--source", REPO)[0] == 0
        text = tmp_path / "text.txt"
        text.write_text("one two three " * 50)
        tokens = tmp_path / "made.safetensors"
        data = ["data", REPO, text, "-o", tokens, "--seq-len", "8", "--revision"]
        assert call(*data, "main")[0] == 0
        pack = ["pack", artifact, "--recipe", place.recipe, "--data", tokens, "--weights", REPO]
        assert call(*pack, "-o", tmp_path / "bundle")[0] == 0
        packed = directory_bytes(tmp_path / "bundle" / "weights")
        assert packed["model.safetensors"] == (place.weights / "model.safetensors").read_bytes()
        quantize = ["quantize", REPO, "--scheme", "W4A16", "-o", tmp_path / "other", "--artifacts", artifact.parent]
        quantize += ["--tokenizer", f"{REPO}@main", "--dry-run", "--data", text, "--no-evaluate"]
        assert call(*quantize)[0] == 0
        for command in (
            ("compile", REPO, "-o", tmp_path / "artifacts", "--revision", "v2"),
            ("cache", "explain", REPO, "-o", tmp_path / "artifacts", "--revision", "v2"),
            ("verify", artifact, "--weights", REPO, "--revision", "v2"),
            ("verify", artifact, "--rebuild", "--source", f"{REPO}@v2"),
            (*data, "v2", "--force"),
            (*quantize, "--revision", "v2"),
            (*pack, "-o", tmp_path / "other", "--revision", "v2"),
        ):
            assert_refused(call(*command), "at revision v2", "its cached revisions are main", program="seqbuild")
        assert not (tmp_path / "other").exists()

    def test_a_partial_checkpoint_is_not_compiled(self, cache: Cache, place: Place, run: Run, tmp_path: Path) -> None:
        config = (place.weights / "config.json").read_bytes()
        snapshot = cache.add(INDEX, SHARDS[0], files={"config.json": config})
        result = run(["compile", REPO, "-o", str(tmp_path / "artifacts")], seqbuild.cli.app.main)
        command = f"(complete it with hf download {REPO} --revision {NEW}, or compile from the config.json alone)"
        assert_refused(result, f"missing {SHARDS[1]} in {snapshot}", command, program="seqbuild")


# A hub on this machine, and huggingface_hub as its client; in another process, as tests must not open connections.
HUB = """
import http.server, json, os, sys, threading

FILES = json.loads(sys.argv[1])
COMMITS = {"main": "1" * 40, "v1": "2" * 40}

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, _, rest = self.path.partition("?")[0].lstrip("/").partition("/models/some-org/")
        if "gated" in self.path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
        elif rest:
            _, what, revision, *_ = rest.split("/")
            commit = COMMITS.get(revision, revision)
            files = [{"type": "file", "path": name, "size": len(text), "oid": f"{index:040x}"}
                for index, (name, text) in enumerate(FILES.items())]
            named = {"id": "some-org/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(json.dumps(named if what == "revision" else files).encode(), "application/json", {})
        else:
            _, _, _, revision, name = self.path.lstrip("/").split("/", 4)
            headers = {"X-Repo-Commit": COMMITS.get(revision, revision), "ETag": f'"{list(FILES).index(name):040x}"'}
            self.answer(FILES[name].encode(), "text/plain", headers)

    def answer(self, body, kind, headers):
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")

from huggingface_hub import snapshot_download

for arguments in json.loads(sys.argv[2]):
    try:
        print(snapshot_download(**arguments))
    except Exception as error:
        print(type(error).__name__)
"""


def test_caches_that_the_library_made(cache: Cache) -> None:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
    files = dict.fromkeys((*WHOLE[:3], "README.md", *SHARDS[:2]), "{}") | {INDEX: index}
    downloads = [
        {"repo_id": "some-org/tiny", "revision": "v1"},
        {"repo_id": "some-org/tiny", "allow_patterns": ["*.json", SHARDS[0]]},
        {"repo_id": "some-org/gated"},
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_proxy", "_PROXY"))}
    done = subprocess.run(
        [sys.executable, "-c", HUB, json.dumps(files), json.dumps(downloads)],
        env=environment | {"HF_HOME": str(cache.root.parent), "HF_HUB_CACHE": str(cache.root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, part, gated = done.stdout.splitlines()
    assert gated == "GatedRepoError", done
    for what in ("model", "tokenizer", "weights"):
        assert resolve_directory("some-org/tiny", revision="v1", what=what) == Path(whole)
    assert resolve_directory(f"some-org/tiny@{'2' * 40}", what="weights") == Path(whole)
    assert resolve_directory("some-org/tiny", what="tokenizer") == Path(part)
    assert f"only partly downloaded: {part} does not contain {SHARDS[1]} (contin" in refusal("some-org/tiny")
    assert "if it is gated or private, first accept its terms" in refusal("some-org/gated")
    assert "its cached revisions are main, v1 (" in refusal("some-org/tiny", revision="v2")


def test_nothing_is_imported_that_has_a_client_for_the_network(cache: Cache) -> None:
    program = "import sys; from runtime.host.hub import cached_snapshot; cached_snapshot('a/b'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert not {"httpx", "httpx2", "requests", "torch", "huggingface_hub.file_download"} & set(done.stdout.split())
