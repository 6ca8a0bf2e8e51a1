"""Directories and files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import OutputError
from runtime.host.publish import disk_errors, publish_directory, require_free, write_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def everything(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def fill(partial: Path, text: str = "new") -> None:
    (partial / "a.txt").write_text(text)
    (partial / "deep").mkdir()
    (partial / "deep" / "b.txt").write_text(text)


class TestDirectory:
    def test_it_appears_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "not" / "there" / "result"
        with publish_directory(path) as partial:
            assert partial.parent == path.parent  # on the same disk
            assert partial.name.startswith(".result.")
            assert partial.name.endswith(".partial")
            fill(partial)
            assert not path.exists()
        assert everything(tmp_path / "not" / "there") == ["result", "result/a.txt", "result/deep", "result/deep/b.txt"]

    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt("z"), SystemExit(1), OutputError("y")])
    def test_a_failure_leaves_nothing(self, error: BaseException, tmp_path: Path) -> None:
        with pytest.raises(type(error), match=str(error)), publish_directory(tmp_path / "result") as partial:
            fill(partial)
            raise error
        assert everything(tmp_path) == []

    def test_an_empty_directory_is_taken_over(self, tmp_path: Path) -> None:
        (tmp_path / "result").mkdir()
        with publish_directory(tmp_path / "result") as partial:
            fill(partial)
        assert everything(tmp_path) == ["result", "result/a.txt", "result/deep", "result/deep/b.txt"]

    @pytest.mark.parametrize("name", ["full", "file", "link", "dangling"])
    def test_what_is_there_is_not_lost(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "precious").write_text("x")
        (tmp_path / "file").write_text("x")
        (tmp_path / "link").symlink_to(tmp_path / "full")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        before = everything(tmp_path)
        with pytest.raises(OutputError, match=f"{name} (is not empty|exists and is not a directory)"):
            require_free(tmp_path / name)
        with (
            pytest.raises(OutputError, match=f"{name} (is not empty|exists and is not a directory)"),
            publish_directory(tmp_path / name),
        ):
            pytest.fail("nothing may be written")
        assert everything(tmp_path) == before

    def test_the_old_one_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "result"
        with publish_directory(path) as partial:
            fill(partial, "old")
        with pytest.raises(RuntimeError), publish_directory(path, replace=True) as partial:
            fill(partial)
            raise RuntimeError
        assert (path / "a.txt").read_text() == "old"
        with publish_directory(path, replace=True) as partial:
            (partial / "c.txt").write_text("new")
            assert (path / "a.txt").read_text() == "old"
        assert everything(tmp_path) == ["result", "result/c.txt"]

    def test_a_failed_exchange_puts_the_old_one_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "result"
        with publish_directory(path) as partial:
            fill(partial, "old")
        real, calls = os.replace, []

        def replace(source: Any, target: Any) -> None:
            calls.append((source, target))
            if len(calls) == 2:  # old one set aside, new one not yet in its place
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(OutputError, match="the disk is full"), publish_directory(path, replace=True) as partial:
            (partial / "c.txt").write_text("new")
        assert len(calls) == 3
        assert everything(path) == ["a.txt", "deep", "deep/b.txt"]
        assert everything(tmp_path)[0] == "result"

    def test_somebody_else_was_faster(self, tmp_path: Path) -> None:
        path = tmp_path / "result"
        with (
            pytest.raises(OutputError, match="another process has written to output directory"),
            publish_directory(path) as partial,
        ):
            fill(partial)
            path.mkdir()
            (path / "theirs").write_text("x")
        assert everything(tmp_path) == ["result", "result/theirs"]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError) as caught, publish_directory(tmp_path / "result") as partial:
            fill(partial)
            raise OSError(errno.ENOSPC, "No space left on device", str(partial / "big"))
        assert caught.value.message == f"cannot write {tmp_path / 'result'}: the disk is full"
        assert everything(tmp_path) == []

    def test_a_file_that_is_too_large(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="a file is larger than"), publish_directory(tmp_path / "result"):
            raise OSError(errno.EFBIG, "File too large")

    def test_a_disk_that_is_full_when_it_is_flushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="the disk is full"), publish_directory(tmp_path / "result") as partial:
            fill(partial)
        assert everything(tmp_path) == []

    def test_everything_is_flushed_before_it_appears(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        fsync, replace = os.fsync, os.replace

        def watched_fsync(descriptor: int) -> None:
            events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        def watched_replace(source: Any, target: Any) -> None:
            events.append("rename")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)
        with publish_directory(tmp_path / "result") as partial:
            fill(partial)
        assert events == ["b.txt", "deep", "a.txt", partial.name, "rename", tmp_path.name]

    @pytest.mark.usefixtures("umask")
    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path) -> None:
        with publish_directory(tmp_path / "result") as partial:
            fill(partial)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
        assert modes == {"result": 0o750, "deep": 0o750, "a.txt": 0o640, "b.txt": 0o640}

    def test_an_exception_that_is_no_disks_passes_as_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), publish_directory(tmp_path / "result"):
            (tmp_path / "missing").read_text()
        assert everything(tmp_path) == []

    def test_a_place_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        reason = "part of the path is not a directory"
        with pytest.raises(OutputError, match=reason), publish_directory(tmp_path / "file" / "result"):
            pytest.fail("nothing may be written")

    def test_a_killed_process_leaves_only_a_partial(self, tmp_path: Path) -> None:
        program = (
            "import os, sys\nfrom pathlib import Path\nfrom runtime.host.publish import publish_directory\n"
            "with publish_directory(Path(sys.argv[1]) / 'result') as partial:\n"
            "    (partial / 'a').write_text('x')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
        assert run.returncode == -9
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".result.")
        assert left.name.endswith(".partial")
        with publish_directory(tmp_path / "result") as partial:  # and is in nobody's way
            fill(partial)


class TestFile:
    def test_written_and_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "file.bin"
        write_file(path, b"one")
        write_file(path, b"two")
        assert path.read_bytes() == b"two"
        assert everything(tmp_path) == ["deep", "deep/file.bin"]

    @pytest.mark.usefixtures("umask")
    def test_permissions(self, tmp_path: Path) -> None:
        write_file(tmp_path / "file", b"x")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_one(self, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_file(tmp_path / "file", b"old")
        monkeypatch.setattr(os, step, full)
        with pytest.raises(OutputError, match=r"cannot write .*file: the disk is full"):
            write_file(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert everything(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.ENOTDIR, "part of the path is not a directory"),
        (errno.ENAMETOOLONG, "the name is too long"),
    ],
)
def test_disk_errors(number: int, reason: str) -> None:
    with pytest.raises(OutputError) as caught, disk_errors(Path("/there")):
        raise OSError(number, os.strerror(number))
    assert caught.value.message == f"cannot write /there: {reason}"
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_of_ours_pass_through_disk_errors() -> None:
    error = OutputError("mine")
    with pytest.raises(OutputError) as caught, disk_errors(Path("/there")):
        raise error
    assert caught.value is error
