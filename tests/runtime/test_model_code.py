"""Which files a model's own code takes, and what an artifact may say about them: all of it without executing any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.artifact.encoding import sha256
from runtime.artifact.own_code import FILE_LIMIT_BYTES, ModelCode, needed_files, package_name, parse_imports
from runtime.chain import check, load
from runtime.errors import ArtifactError, ModelError
from tests.runtime.artifacts import files, manifest, write


def closure(texts: dict[str, str], *entries: str) -> list[str]:
    contents = {path: text.encode() for path, text in texts.items()}
    found = needed_files(entries or ("a",), contents.get, "toy")
    assert found == {path: contents[path] for path in sorted(found)}
    assert list(found) == sorted(found)
    return list(found)


class TestClosure:
    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ({"a.py": "import torch\nfrom transformers import X", "b.py": ""}, ["a.py"]),
            ({"a.py": "from .b import x", "b.py": "from .c import y", "c.py": ""}, ["a.py", "b.py", "c.py"]),
            ({"a.py": "from . import b, c", "b.py": "", "c.py": "from .a import z"}, ["a.py", "b.py", "c.py"]),
            ({"a.py": "def f():\n    if x:\n        from .b import y", "b.py": ""}, ["a.py", "b.py"]),
            ({"a.py": "from .p.q import y", "p/q.py": ""}, ["a.py", "p/q.py"]),
            (
                {"a.py": "from .p.q import y", "p/__init__.py": "from .r import z", "p/q.py": "", "p/r.py": ""},
                ["a.py", "p/__init__.py", "p/q.py", "p/r.py"],
            ),
            ({"a.py": "from .p import q", "p/q.py": "from ..b import y", "b.py": ""}, ["a.py", "b.py", "p/q.py"]),
            (
                {"a.py": "from .p import q, N", "p/__init__.py": "N = 1", "p/q.py": ""},
                ["a.py", "p/__init__.py", "p/q.py"],
            ),
            ({"a.py": "from .p import *", "p/__init__.py": ""}, ["a.py", "p/__init__.py"]),
            ({"a.py": "try:\n    from .b import x\nexcept ImportError:\n    x = 1"}, ["a.py"]),
            ({"a.py": "try:\n    from .b import x\nexcept (KeyError, Exception):\n    x = 1"}, ["a.py"]),
            ({"a.py": "try:\n    from .b import x\nexcept:\n    x = 1", "b.py": ""}, ["a.py", "b.py"]),
            ({"a.py": "if TYPE_CHECKING:\n    from .b import x"}, ["a.py"]),
            ({"a.py": "if typing.TYPE_CHECKING:\n    from . import b"}, ["a.py"]),
        ],
    )
    def test_what_is_taken(self, texts: dict[str, str], expected: list[str]) -> None:
        assert closure(texts) == expected

    def test_a_chain_longer_than_the_stack(self) -> None:
        texts = {f"m{index}.py": f"from .m{index + 1} import x" for index in range(3000)} | {"m3000.py": ""}
        assert len(closure(texts, "m0")) == 3001

    @pytest.mark.parametrize(
        ("texts", "why"),
        [
            ({}, "a.py is missing"),
            ({"a.py": "from .b import x"}, "a.py, line 1 imports b.py, which is missing"),
            ({"a.py": "\nfrom . import b"}, "a.py, line 2 imports b.py, which is missing"),
            ({"a.py": "from .p import q", "p/r.py": ""}, "imports p.py, which is missing"),
            ({"a.py": "try:\n    from .b import x\nexcept KeyError:\n    pass"}, "imports b.py, which is missing"),
            ({"a.py": "try:\n    pass\nexcept ImportError:\n    from .b import x"}, "imports b.py, which is missing"),
            ({"a.py": "from .. import b", "b.py": ""}, "a.py, line 1 imports from outside of the model's directory"),
            ({"a.py": "from ...os import path"}, "imports from outside of the model's directory"),
            ({"a.py": "from .p.q import x", "p/q.py": "from ...x import y"}, "p/q.py, line 1 imports from outside"),
            ({"a.py": "def f(:"}, "a.py is not valid Python"),
            ({"a.py": "from .b import x", "b.py": "\0"}, "b.py is not valid Python"),
            ({"a.py": "(" * 5000}, "a.py is not valid Python"),
            ({"a.py": "-" * 200000 + "1"}, "a.py is not valid Python"),
            ({"a.py": " " * (FILE_LIMIT_BYTES + 1)}, f"a.py has {FILE_LIMIT_BYTES + 1} bytes"),
            ({"a.py": "from .ä import x", "ä.py": ""}, "'ä' is not a valid module name"),
        ],
    )
    def test_what_is_refused(self, texts: dict[str, str], why: str) -> None:
        with pytest.raises(ModelError) as caught:
            closure(texts)
        assert str(caught.value).startswith("toy brings its own code, and ")
        assert why in str(caught.value)

    def test_imports_are_found_in_statements_of_all_kinds(self) -> None:
        text = """
import m1
def f():
    async def g():
        async with x:
            import m2
        async for x in y:
            import m3
        else:
            import m4
    for x in y:
        import m5
    while x:
        import m6
    else:
        import m7
class C:
    import m8
    with x:
        import m9
if x: import m10
elif y: import m11
else: import m12
try:
    import m13
except (OSError, ImportError):
    import m14
else:
    import m15
finally:
    import m16
match x:
    case 1:
        import m17
    case _:
        if TYPE_CHECKING:
            import m18
"""
        found = parse_imports(text.encode())
        assert [statement.module for statement in found] == [f"m{index}" for index in range(1, 19)]
        assert [statement.module for statement in found if statement.is_guarded] == ["m13", "m18"]

    def test_strange_strings_in_somebody_elses_code_are_no_complaint(self) -> None:
        assert parse_imports(b'"\\d"\nimport a.b') == parse_imports(b"0\nimport a.b")


class TestPackage:
    def test_the_name_follows_from_the_content_alone(self) -> None:
        digests = {"a.py": sha256(b"1"), "p/b.py": sha256(b"2")}
        code = ModelCode(files={"a.py": b"1", "p/b.py": b"2"})
        assert code.package == package_name(digests) == package_name(dict(reversed(digests.items())))
        assert code.modules == (f"{code.package}.a", f"{code.package}.p.b")
        for other in ({"a.py": b"2", "p/b.py": b"2"}, {"b.py": b"1", "p/b.py": b"2"}, {"a.py": b"1"}):
            assert ModelCode(files=other).package != code.package

    def test_a_package_is_called_after_its_folder(self) -> None:
        code = ModelCode(files={"p/__init__.py": b"", "p/q.py": b""})
        assert code.modules == (f"{code.package}.p", f"{code.package}.p.q")


CODE = {"modeling/configuration_toy.py": b"", "modeling/modeling_toy.py": b"from .configuration_toy import ToyConfig"}


def own(path: Path, contents: dict[str, bytes] = CODE, **changes: Any) -> Path:
    """An artifact of a model with its own code."""
    package = ModelCode(files={name.removeprefix("modeling/"): data for name, data in sorted(contents.items())}).package
    model = replace(
        manifest().model,
        **{
            "class_name": "Toy",
            "module": f"{package}.modeling_toy",
            "config_class_name": "ToyConfig",
            "config_module": f"{package}.configuration_toy",
            "code": tuple(sorted(contents)),
            **changes,
        },
    )
    return write(path, files() | contents, model=model)


class TestArtifact:
    def test_complete_code_passes(self, tmp_path: Path) -> None:
        path = own(tmp_path / "artifact")
        check(path)
        with pytest.raises(ModelError) as caught:
            load(path, allow_version_skew=True)
        said = str(caught.value)
        assert "for ToyConfig, Toy: this would execute configuration_toy.py, modeling_toy.py" in said
        assert "--trust-remote-code" in said
        assert load(path, allow_version_skew=True, trust_remote_code=True).code is not None

    @pytest.mark.parametrize(
        ("code", "changes", "why"),
        [
            (
                CODE,
                {"code": ()},
                "configuration_toy.py must be in modeling/ and be listed as the model's own code",
            ),
            (CODE, {"code": (*CODE, "modeling/other.py")}, "modeling/other.py must be in modeling/ and be listed"),
            (CODE, {"code": (*CODE, "subgraphs/000.py")}, "subgraphs/000.py must be in modeling/ and be listed"),
            (CODE, {"code": ("modeling/modeling_toy.py", "modeling/configuration_toy.py")}, "not in ascending order"),
            (CODE, {"code": (*CODE, "modeling/modeling_toy.py")}, "not in ascending order"),
            (CODE, {"module": "seqbuild_modeling_0123456789abcdef.modeling_toy"}, "not among the files of modeling/"),
            (CODE, {"config_module": "seqbuild_modeling_0123456789abcdef"}, "not among the files of modeling/"),
            (CODE, {"module": "os", "config_module": "os"}, "neither its model nor its config comes from there"),
            ({**CODE, "modeling/data.txt": b""}, {}, "modeling/data.txt is not a Python module"),
            ({**CODE, "modeling/a-b.py": b""}, {}, "modeling/a-b.py is not a Python module"),
            ({**CODE, "modeling/a.b/c.py": b""}, {}, "modeling/a.b/c.py is not a Python module"),
            ({**CODE, "modeling/modeling_toy.py": b"from .gone import x"}, {}, "imports gone.py, which is missing"),
            ({**CODE, "modeling/modeling_toy.py": b"from .. import x"}, {}, "imports from outside"),
            ({**CODE, "modeling/modeling_toy.py": b"class"}, {}, "modeling_toy.py is not valid Python"),
        ],
    )
    def test_refused(self, code: dict[str, bytes], changes: dict[str, Any], why: str, tmp_path: Path) -> None:
        path = own(tmp_path / "artifact", code, **changes)
        for read in (check, load):
            with pytest.raises(ArtifactError) as caught:
                read(path)
            assert why in str(caught.value)

    def test_code_outside_of_its_folder_is_no_code(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"evil\.py is Python code that .* does not list as a program"):
            check(write(tmp_path / "artifact", files() | {"evil.py": b""}))

    def test_own_code_is_no_program(self, tmp_path: Path) -> None:
        path = tmp_path / "artifact"
        own(path)
        good = manifest()
        first = replace(good.subgraphs[0], file="modeling/modeling_toy.py")
        model = replace(
            good.model,
            module=ModelCode(files={k.removeprefix("modeling/"): v for k, v in CODE.items()}).modules[1],
            code=tuple(CODE),
        )
        write(path, files() | CODE, model=model, subgraphs=(first, good.subgraphs[1]))
        with pytest.raises(ArtifactError, match="is named as a program and as the model's own code"):
            check(path)

    def test_damage_and_links(self, tmp_path: Path) -> None:
        path = own(tmp_path / "artifact")
        file = path / "modeling" / "modeling_toy.py"
        file.write_bytes(file.read_bytes() + b"\n")
        with pytest.raises(ArtifactError, match=r"modeling_toy\.py is damaged"):
            check(path)
        file.unlink()
        (tmp_path / "elsewhere.py").write_bytes(CODE["modeling/modeling_toy.py"])
        file.symlink_to(tmp_path / "elsewhere.py")
        with pytest.raises(ArtifactError, match="is not a plain file"):
            check(path)
