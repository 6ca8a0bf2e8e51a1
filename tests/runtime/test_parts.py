"""Parts of a checkpoint become one: the same bytes, or one clear error and nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.checkpoint.parts import join_parts
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import OutputError, WeightsError
from tests.runtime.part_files import change_table, tree_bytes, write_parts, write_whole
from tests.runtime.place import ROOT, Place, Run, assert_refused
from tests.runtime.small import directory_bytes


@pytest.mark.parametrize("max_shard_bytes", [1, 400, 10**9])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_joined_parts_have_the_bytes_of_the_whole(tmp_path: Path, size: int, max_shard_bytes: int) -> None:
    expected = tree_bytes(write_whole(tmp_path / "whole", max_shard_bytes))
    parts = write_parts(tmp_path, size, max_shard_bytes)
    (parts[-1] / ".DS_Store").write_text("files that nobody listed are ignored")
    result = join_parts(parts[::-1], tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == expected
    assert (result.num_parts, result.num_tensors) == (size, 24)
    if size == 3:  # readers of checkpoints find nothing in a part
        assert not [path for part in parts for path in part.glob("model*")]
        assert sum(path.stat().st_size for part in parts for path in part.glob("*.safetensors")) < 2**14


def truncated(parts: list[Path]) -> list[Path]:
    os.truncate(sorted(parts[1].glob("*.safetensors"))[-1], 100)
    return parts


def longer(parts: list[Path]) -> list[Path]:
    with sorted(parts[1].glob("*.safetensors"))[-1].open("ab") as file:
        file.write(b"0")
    return parts


def with_other_header(parts: list[Path]) -> list[Path]:
    with sorted(parts[0].glob("*.safetensors"))[0].open("r+b") as file:
        file.seek(20)
        file.write(b"!")
    return parts


def with_a_changed_number(parts: list[Path]) -> list[Path]:
    path = sorted(parts[0].glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return parts


def with_a_changed_companion(parts: list[Path]) -> list[Path]:
    (parts[0] / "a.py").write_bytes(b"x = 2\n")
    return parts


def with_a_short_companion(parts: list[Path]) -> list[Path]:
    (parts[0] / "a.py").write_bytes(b"x")
    return parts


def without_a_companion(parts: list[Path]) -> list[Path]:
    (parts[0] / "1_Pooling" / "config.json").unlink()
    return parts


def without_a_file(parts: list[Path]) -> list[Path]:
    sorted(parts[1].glob("*.safetensors"))[0].unlink()
    return parts


def without_a_table(parts: list[Path]) -> list[Path]:
    (parts[1] / "part.json").unlink()
    return parts


def of_another_run(parts: list[Path]) -> list[Path]:
    change_table(parts[1], run="d" * 64)
    return parts


def of_another_division(parts: list[Path]) -> list[Path]:
    return [parts[0], *write_parts(parts[0].parent / "others", 3)[1:]]


def with_other_tensors(parts: list[Path]) -> list[Path]:
    change_table(parts[1], tensors=[])
    return parts


def copied(parts: list[Path]) -> list[Path]:
    shutil.copytree(parts[1], parts[1].parent / "copy")
    return [*parts, parts[1].parent / "copy"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"part-0.*safetensors is truncated or not the file .*: it has 100 bytes, and \d+ are expected"),
        (longer, "is truncated or not the file that the run has written"),
        (with_other_header, "is truncated or not the file that the run has written"),
        (with_a_changed_number, r"tensor \d\.scale in .*part-0-of-2/part-00001-of-.*safetensors is damaged"),
        (with_a_changed_companion, "part-0-of-2/a.py is damaged"),
        (with_a_short_companion, "part-0-of-2/a.py has 1 bytes, and 6 are expected"),
        (without_a_companion, "1_Pooling/config.json is missing"),
        (without_a_file, "part-1-of-2/part-00001-of-.* is missing"),
        (without_a_table, "part-1-of-2 is not a part of a checkpoint: it has no part.json"),
        (of_another_run, "part-0-of-2 and .*part-1-of-2 are parts of different runs"),
        (of_another_division, "part-0-of-2 and .*part-1-of-3 are parts of different runs"),
        (with_other_tensors, "part-0-of-2 and .*part-1-of-2 list different tensors"),
        (copied, "part-1-of-2 and .*copy are both part 1"),
        (lambda parts: [parts[0], parts[0]], "are both part 0"),
        (lambda parts: parts[:1], "part 1 is missing: .*part-0-of-2 is one of 2 parts"),
        (lambda parts: [*parts, parts[0].parent / "nothing"], "nothing is not a part of a checkpoint: it is not a dir"),
    ],
)
def test_parts_that_are_not_one_checkpoint_are_refused(
    tmp_path: Path, damage: Callable[[list[Path]], list[Path]], message: str
) -> None:
    given = damage(write_parts(tmp_path, 2))
    before = tree_bytes(tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        join_parts(given, tmp_path / "out")
    assert caught.value.hint
    assert tree_bytes(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_output_that_is_not_free_is_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, 2)
    with pytest.raises(OutputError, match="part-1-of-2 is not empty"):
        join_parts(parts, parts[1])
    with pytest.raises(OutputError, match="inside the input directory"):
        join_parts(parts, parts[1] / "out")
    (tmp_path / "out").mkdir()
    join_parts(parts, tmp_path / "out")
    with pytest.raises(OutputError, match="out is not empty"):
        join_parts(parts, tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_join_that_is_stopped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    parts, real, calls = write_parts(tmp_path, 2), os.pwrite, []

    def pwrite(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 20:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", pwrite)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "the disk is full"):
        join_parts(parts, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == parts


def test_space_is_checked_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10_000, 10_000, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"out needs at least 2\.\d kB, but its disk has 100 B left"):
        join_parts(write_parts(tmp_path, 2), tmp_path / "out")


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    parts, out = write_parts(tmp_path, 2), tmp_path / "out"
    script = "import sys; sys.modules['torch'] = None\nfrom runtime.cli.app import main\nsys.exit(main())"

    def join(*given: Path) -> tuple[int, str, str]:
        command = [sys.executable, "-c", script, "join", *map(str, given), "-o", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert_refused(join(parts[0]), "part 1 is missing", "pass the directories of all parts")
    assert join(*parts) == (0, f"{out}: 24 tensors, 1.2 kB, of 2 parts\n", "")


def test_a_calibration_in_parts_joins_to_the_same_bytes(place: Place, run: Run) -> None:
    assert run(place.calibrate())[0] == 0
    expected = directory_bytes(place.out)
    shutil.rmtree(place.out)
    code, printed, _ = run(place.calibrate("--parts"))
    part = place.out.parent / f"{place.out.name}.part-0-of-1"
    assert code == 0 and str(part) in printed and not place.out.exists()
    assert_refused(run(place.calibrate("--parts")), f"{part} is not empty")
    assert_refused(run(place.calibrate("--parts", "--resume")), "is already complete", "join makes the checkpoint")
    assert run(["join", str(part), "-o", str(place.out)])[0] == 0
    assert directory_bytes(place.out) == expected
    with pytest.raises(WeightsError, match="does not contain a safetensors checkpoint"):
        Checkpoint(part)
