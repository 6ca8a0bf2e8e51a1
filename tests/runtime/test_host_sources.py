"""Source files on the host: found without importing, compared by digest; what the version check makes of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from runtime.chain import check, check_versions
from runtime.errors import ArtifactError, VersionError
from runtime.language.library_sources import changed_sources, is_module_name, source_digest, source_file
from tests.runtime.artifacts import manifest, write

ROOT = Path(__file__).parents[2]
LLAMA = "transformers.models.llama.modeling_llama"
FOLDER = Path(transformers.__file__).parent


@pytest.mark.parametrize(
    ("module", "file"),
    [
        (LLAMA, FOLDER / "models" / "llama" / "modeling_llama.py"),
        ("transformers.integrations", FOLDER / "integrations" / "__init__.py"),
        ("transformers", FOLDER / "__init__.py"),
        ("transformers.no_such_module", None),
        ("no_such_package", None),
        ("no_such_package.module", None),
        ("sys", None),
        ("__main__.x", None),
    ],
)
def test_where_a_module_lies(module: str, file: Path | None) -> None:
    assert source_file(module) == file


def test_digests() -> None:
    expected = hashlib.sha256((FOLDER / "activations.py").read_bytes()).hexdigest()
    assert source_digest("transformers.activations") == expected
    assert source_digest("transformers.no_such_module") == ""
    sources = {"transformers.activations": expected, LLAMA: "0" * 64, "transformers.gone": "1" * 64}
    assert changed_sources(sources) == [LLAMA, "transformers.gone"]


def test_nothing_is_imported() -> None:
    program = (
        "import sys\n"
        "from runtime.language.library_sources import source_digest\n"
        f"assert len(source_digest({LLAMA!r})) == 64\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("name", ["", ".", "a.", "../x", "a/b", "a..b", "a b", "a.b-c", "a\n", "1a", "\u00e4"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    assert not is_module_name(name)
    with pytest.raises(ArtifactError, match="which is not a module name"):
        check(write(tmp_path / "artifact", sources={name: "0" * 64}))


class TestVersions:
    def test_another_version_with_the_same_sources(self) -> None:
        same = {LLAMA: source_digest(LLAMA)}
        check_versions(manifest(versions={"transformers": "4.0.0"}, sources=same), allow_version_skew=False)

    def test_the_same_version_with_other_sources(self) -> None:
        changed = manifest(versions={"transformers": transformers.__version__}, sources={LLAMA: "0" * 64})
        with pytest.raises(VersionError, match=f"1 of the 1 source files it relies on differ: {LLAMA}") as caught:
            check_versions(changed, allow_version_skew=False)
        assert "restore the released files" in caught.value.hint
        check_versions(changed, allow_version_skew=True)

    def test_both_versions_and_the_modules_are_named(self) -> None:
        sources = {f"transformers.part_{index}": "0" * 64 for index in range(7)}
        with pytest.raises(VersionError) as caught:
            check_versions(manifest(versions={"transformers": "4.0.0"}, sources=sources), allow_version_skew=False)
        said = str(caught.value)
        assert f"compiled with transformers 4.0.0, this host has {transformers.__version__}" in said
        assert "transformers.part_4 and others" in said
        assert "transformers.part_5" not in said
        assert "install transformers==4.0.0" in said
        assert "--allow-version-skew" in said

    def test_another_torch_is_recorded_and_no_reason_to_refuse(self) -> None:
        versions = {"torch": "2.0.0", "transformers": transformers.__version__}
        check_versions(manifest(versions=versions, sources={LLAMA: source_digest(LLAMA)}), allow_version_skew=False)
