"""Where values between subgraphs are kept, and that they come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import runtime
from runtime.artifact.manifest import DTYPES
from runtime.streaming.activations import DEVICE, DISK, HOST, Activations, Budget
from runtime.streaming.disk_tensor import write_tensors
from runtime.streaming.saved_values import CannotSaveError, load_boundary, remove_boundary, save_boundary
from tests.runtime.small import NARROW_W4, Small, calibrate, directory_bytes, recipe

CPU = torch.device("cpu")


def nest(seed: int) -> dict[str, Any]:
    """Values of all kinds: contiguous, transposed, expanded, part of something larger, in containers, no tensor."""
    torch.manual_seed(seed)
    return {
        "plain": torch.randn(3, 4),
        "transposed": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(2, 1, 5).expand(2, 3, 5),
        "part": torch.randn(100, 7)[:2],
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "mask": torch.rand(3, 3) > 0.5,
        "scalar": torch.tensor(7),
        "none": torch.empty(0, 4),
        "deep": {"a": [torch.randn(2), "text", (torch.randn(3), None)], "b": 1.5},
        "size": 12,
    }


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(got) is type(expected) and len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            assert_same(left, right)
    else:
        assert got == expected


@pytest.mark.parametrize("host_bytes", [None, 0, 100, 300])
def test_values_come_back_as_they_were_wherever_they_are(tmp_path: Path, host_bytes: int | None) -> None:
    activations = Activations([{}, {}], CPU, Budget(host_bytes=host_bytes), tmp_path)
    for batch in range(2):
        activations.store(batch, nest(batch))
    assert bool(activations.used_bytes[DISK]) == (host_bytes is not None)
    assert activations.used_bytes[HOST] <= (10**9 if host_bytes is None else host_bytes)
    for batch, values in activations.stream(list(nest(0))):
        expected = nest(batch)
        assert_same(values, expected)
        for name in ("plain", "transposed", "expanded", "bfloat16"):
            assert values[name].stride() == expected[name].stride(), name
    activations.close()
    assert list(tmp_path.iterdir()) == []
    assert activations.used_bytes == {DEVICE: 0, HOST: 0, DISK: 0}


def test_what_expanding_repeats_takes_no_memory(tmp_path: Path) -> None:
    activations = Activations([{}], CPU, Budget(host_bytes=0), tmp_path)
    activations.store(0, {"mask": torch.ones(1, 1, 4, 4).expand(8, 1, 4, 4)})
    assert activations.used_bytes[DISK] == 64
    activations.store(0, {"part": torch.ones(1000)[:4]})
    assert activations.used_bytes[DISK] == 64 + 16


def test_equal_values_that_last_are_stored_once(tmp_path: Path) -> None:
    activations = Activations([{} for _ in range(3)], CPU, Budget(host_bytes=0), tmp_path, lasting={"mask"})
    for batch, ones in enumerate((4, 4, 3)):
        activations.store(batch, {"mask": torch.arange(5) < ones, "hidden": torch.zeros(2)})
    assert activations.used_bytes[DISK] == 2 * 5 + 3 * 8
    assert [values["mask"].sum().item() for _, values in activations.stream(["mask"])] == [4, 4, 3]
    activations.drop(0, ["mask"])
    assert activations.fetch(1, ["mask"])["mask"].sum() == 4
    activations.drop(1, ["mask"])
    assert activations.used_bytes[DISK] == 5 + 3 * 8


@pytest.mark.parametrize("is_shared", [True, False])
def test_working_in_place_on_one_batch_changes_no_other(is_shared: bool) -> None:
    activations = Activations([{}, {}], CPU, lasting={"mask"} if is_shared else ())
    for batch in range(2):
        activations.store(batch, {"mask": torch.zeros(4)})
    activations.fetch(0, ["mask"])["mask"].add_(1)
    assert activations.fetch(1, ["mask"])["mask"].tolist() == [0, 0, 0, 0]
    activations.fetch(1, ["mask"], private=True)["mask"].add_(1)
    assert activations.fetch(1, ["mask"])["mask"].tolist() == [0, 0, 0, 0]


def places(count: int) -> list[tuple[int, int]]:
    """Those of the batches of one lane."""
    return [(0, position) for position in range(count)]


def test_saved_values_come_back(tmp_path: Path) -> None:
    activations = Activations([{}, {}, {}], CPU, lasting={"plain"})
    for batch, seed in enumerate((1, 2, 2)):
        activations.store(batch, nest(seed))
    num_bytes = save_boundary(activations, tmp_path, 7, places(3))
    files = [tmp_path / f"boundary-7-0-{batch}.safetensors" for batch in range(3)]
    assert num_bytes == sum(file.stat().st_size for file in files)
    held = [activations.values(batch)["plain"] for batch in range(3)]
    assert held[1] is held[2]
    assert [tuple(nest(0)["plain"].shape) in shapes(file) for file in files] == [True, True, False]
    other = Activations([{"x": torch.ones(1)} for _ in range(3)], CPU, Budget(host_bytes=200), tmp_path)
    load_boundary(other, tmp_path, 7, places(3))
    for batch, seed in enumerate((1, 2, 2)):
        values = other.fetch(batch, list(other.values(batch)))
        assert_same(values, nest(seed))
        assert values["transposed"].stride() == nest(seed)["transposed"].stride()


def shapes(file: Path) -> list[tuple[int, ...]]:
    with safe_open(file, framework="pt") as opened:
        return [tuple(opened.get_slice(key).get_shape()) for key in opened.keys()]  # noqa: SIM118


@pytest.mark.parametrize("host_bytes", [None, 0])
def test_values_that_share_memory_are_saved(tmp_path: Path, host_bytes: int | None) -> None:
    activations = Activations([{}], CPU, Budget(host_bytes=host_bytes), tmp_path)
    whole = torch.randn(4, 6)
    values = {"one": whole, "same": whole, "turned": whole.t(), "rows": whole.view(24)}
    activations.store(0, values)
    save_boundary(activations, tmp_path, 3, places(1))
    other = Activations([{}], CPU)
    load_boundary(other, tmp_path, 3, places(1))
    for store in (activations, other):
        assert_same(store.fetch(0, list(values)), values)
    remove_boundary(tmp_path, 3)
    activations.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_manifest_is_saved(tmp_path: Path, dtype: str) -> None:
    value = torch.arange(24, dtype=torch.uint8).view(4, 6).to(getattr(torch, dtype)).t()
    activations = Activations([{}], CPU, Budget(host_bytes=0), tmp_path)
    activations.store(0, {"value": value})
    save_boundary(activations, tmp_path, 0, places(1))
    other = Activations([{}], CPU)
    load_boundary(other, tmp_path, 0, places(1))
    for store in (activations, other):
        found = store.fetch(0, ["value"])["value"]
        assert (found.dtype, found.stride()) == (value.dtype, value.stride())
        assert torch.equal(found.contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_tensors(tmp_path / "nowhere" / "file", {"x": torch.ones(2)})


def test_a_dtype_without_a_name_is_not_saved(tmp_path: Path) -> None:
    activations = Activations([{}], CPU)
    activations.store(0, {"x": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(CannotSaveError, match="complex128"):
        save_boundary(activations, tmp_path, 0, places(1))


def test_what_json_has_no_word_for_is_not_saved(tmp_path: Path) -> None:
    class Cache:
        pass

    activations = Activations([{}], CPU)
    activations.store(0, {"cache": Cache()})
    with pytest.raises(CannotSaveError, match="Cache"):
        save_boundary(activations, tmp_path, 0, places(1))


def test_a_damaged_save_is_an_error(tmp_path: Path) -> None:
    activations = Activations([{}], CPU)
    activations.store(0, {"x": torch.ones(8)})
    save_boundary(activations, tmp_path, 0, places(1))
    file = tmp_path / "boundary-0-0-0.safetensors"
    whole = file.read_bytes()
    foreign = save({"x": torch.ones(2)})
    for damaged in (b"short", whole[:-1], whole.replace(b"values", b"volume"), foreign):
        file.write_bytes(damaged)
        with pytest.raises(runtime.OutputError, match="cannot read the activations saved in"):
            load_boundary(Activations([{}], CPU), tmp_path, 0, places(1))
    file.unlink()
    with pytest.raises(runtime.OutputError, match="cannot read the activations saved in"):
        load_boundary(Activations([{}], CPU), tmp_path, 0, places(1))


@pytest.mark.parametrize("host_bytes", [0, 20_000])
def test_a_run_whose_values_are_on_disk_gives_the_same_bytes(
    narrow_llama: Small, tmp_path: Path, host_bytes: int
) -> None:
    plan = recipe(NARROW_W4, modifier="GPTQModifier")
    calibrate(narrow_llama, plan, tmp_path / "expected")
    calibrate(narrow_llama, plan, tmp_path / "out", activation_memory=Budget(host_bytes=host_bytes))
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


@pytest.mark.parametrize(
    ("text", "device_bytes", "host_bytes"),
    [
        ("16GiB", 0, 16 * 2**30),
        ("1.5 GB", 0, 1_500_000_000),
        ("0", 0, 0),
        ("device=2GiB,host=512MiB", 2**31, 2**29),
        ("host=1e6B", 0, 1_000_000),
    ],
)
def test_budgets_are_read(text: str, device_bytes: int, host_bytes: int) -> None:
    assert Budget.parse(text) == Budget(device_bytes=device_bytes, host_bytes=host_bytes)


@pytest.mark.parametrize(
    "text", ["much", "16 GX", "disk=3GB", "host=1GB,host=2GB", "", "-3GB", "host=", "24", "host=1e6"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(runtime.UsageError, match="--activation-memory"):
        Budget.parse(text)
