"""Read the statistics of one step; one Gram matrix after the other, on the worker that owns it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from runtime.algorithms.hessian import HessianAccumulator, hessian_bytes
from runtime.algorithms.output_squares import TokenSample
from runtime.errors import DataError
from runtime.quantize.channel_sums import ChannelSums
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.recipe.recipe import some
from runtime.saved_statistics.records import SavedInput, SavedStep, damaged, matrix_name, step_name, sums_name
from runtime.saved_statistics.tensor_file import TensorFile, half_size
from runtime.workers.agreement import agreed
from runtime.workers.division import Division
from runtime.workers.group import Alone, Workers

Kinds = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of tensors, by name
GRAM, SAMPLE = "gram", "sample"
_ROWS = {"bounds": 2, "averages": 2}


def matrix_kinds(saved: SavedInput) -> Kinds:
    """The tensors of the file with a Gram matrix."""
    found: Kinds = {GRAM: ("F32", (half_size(saved.width),))} if saved.has_gram else {}
    if saved.num_sampled:
        found[SAMPLE] = (saved.sample_dtype, (saved.num_sampled, saved.width))
    return found


def sums_kinds(step: SavedStep) -> Kinds:
    """The tensors of the file with the small sums of a step."""
    found: Kinds = {}
    for number, saved in enumerate(step.inputs):
        if saved.has_gram and saved.num_tokens:
            found[f"{number}.diagonal"] = ("F32", (saved.width,))
        if saved.num_batches:
            found[f"{number}.sum_abs"] = ("F64", (saved.width,))
            found |= {f"{number}.{name}": ("F32", (rows, saved.width)) for name, rows in _ROWS.items()}
            found[f"{number}.spans"] = ("F32", (saved.num_batches, 2))
    for number, cache in enumerate(step.caches):
        found[f"cache.{number}"] = ("F32", (cache.num_calls, 2, cache.num_heads))
    return found


class StepReader:
    """The statistics of one step.

    Args:
        folder: of the files.
        index: of the step.
        saved: its list.
    """

    def __init__(self, folder: Path, index: int, saved: SavedStep) -> None:
        self.folder, self.index, self.saved = folder, index, saved

    def measured(
        self,
        needs: Mapping[str, Needs],
        widths: Mapping[str, int],
        *,
        all_tokens: bool,
        device: torch.device,
        workers: Workers | None = None,
        division: Division | None = None,
    ) -> dict[str, InputStatistics]:
        """Return what `runtime.quantize.measuring.collect_statistics` would measure of these modules.

        Args:
            needs: of each module.
            widths: the input features of each.
            all_tokens: whether experts are measured on all tokens, or on those routed to them.
            device: of the sums.
            workers: that share the run; None for one.
            division: assigns each sum to the worker that will have it.

        Raises:
            DataError: these were not saved, or a file is damaged.
        """
        group = workers or Alone()
        wanted = [name for name, need in needs.items() if need]
        if not wanted:
            return {}
        with agreed(group):
            places = self.places(wanted, all_tokens)
            together = functools.reduce(Needs.__or__, needs.values(), Needs())
            leaders: dict[int, str] = {}
            for name, number in places.items():
                leaders.setdefault(number, name)
                if self.saved.inputs[number].width != widths[name]:
                    what = f"the input of {name} has {self.saved.inputs[number].width} features, not {widths[name]}"
                    raise damaged(self.folder / step_name(self.index), what)
            owners = (division or Division(group.size)).owners(
                (leader, hessian_bytes(self.saved.inputs[number].width)) for number, leader in leaders.items()
            )
            entries = {
                number: self._entry(number, together, leader, device, owners[leader], group.rank)
                for number, leader in leaders.items()
            }
        return {name: entries[number] for name, number in places.items()}

    def input_of(self, name: str, *, all_tokens: bool = True) -> int | None:
        """The number of the input that a module reads; None if no batch has called it.

        Raises:
            DataError: it was not measured.
        """
        return self.places([name], all_tokens).get(name)

    def groups(self, names: Sequence[str], *, all_tokens: bool) -> list[tuple[str, ...]]:
        """Return the modules among these that were called, by the input that they read.

        Raises:
            DataError: one was not measured.
        """
        found: dict[int, list[str]] = {}
        for name, number in self.places(names, all_tokens).items():
            found.setdefault(number, []).append(name)
        return [tuple(group) for group in found.values()]

    def reached(self, names: Sequence[str], *, all_tokens: bool) -> list[str]:
        """Return the modules among these that tokens have reached."""
        return [name for name, number in self.places(names, all_tokens).items() if self.saved.inputs[number].num_tokens]

    def read(self, number: int, needs: Needs, device: torch.device) -> InputStatistics:
        """Read the statistics of one input.

        Raises:
            DataError: these were not saved, or a file is damaged.
        """
        return self._entry(number, needs, f"input {number}", device, 0, 0)

    def cached(self, module: str, part: str) -> torch.Tensor:
        """The minimum and the maximum [calls, 2, H] of the keys, values or queries of a module.

        Raises:
            DataError: they were not saved.
        """
        for number, cache in enumerate(self.saved.caches):
            if (cache.module, cache.part) == (module, part):
                return self._sums[f"cache.{number}"]
        raise DataError(
            f"the statistics in {self.folder} have no keys and values of {module}",
            hint="pass --data instead of --statistics",
        )

    def places(self, names: Sequence[str], all_tokens: bool) -> dict[str, int]:
        """The number of the input of each module that was called, in the order of calls."""
        left = dict.fromkeys(names)
        experts = set(self.saved.experts)
        found: dict[str, int] = {}
        for one in sorted(self.saved.passes, key=lambda one: one.all_tokens != all_tokens):
            is_valid = one.all_tokens == all_tokens
            here = {name for name in one.measured if name in left and (is_valid or name not in experts)}
            found |= {name: number for name, number in one.calls.items() if name in here}
            left = {name: None for name in left if name not in here}
        if left:
            known = {name for one in self.saved.passes for name in one.measured}
            tokens = "all tokens" if all_tokens else "the tokens that are routed to them"
            what = f" on {tokens}" if all(name in known for name in left) else ""
            raise DataError(
                f"the statistics in {self.folder} have not measured the inputs of {some(list(left))}{what}",
                hint="measure them again with this recipe, these options and --keep-statistics, or pass --data",
            )
        return found

    def _entry(
        self, number: int, needs: Needs, name: str, device: torch.device, owner: int, rank: int
    ) -> InputStatistics:
        saved = self.saved.inputs[number]
        has_channels = bool(saved.num_batches) or not saved.num_tokens
        if (needs.hessian and not saved.has_gram) or (needs.channels and not has_channels):
            what = "Gram matrix" if needs.hessian and not saved.has_gram else "ranges"
            raise DataError(
                f"the statistics in {self.folder} have no {what} of the input of {name}",
                hint="measure them again with this recipe and --keep-statistics, or pass --data",
            )
        diagonal_I = torch.zeros(saved.width, device=device)
        if f"{number}.diagonal" in self._sums:
            diagonal_I = self._sums[f"{number}.diagonal"].to(device, copy=True)
        found = InputStatistics.of_sums(
            needs, num_tokens=saved.num_tokens, channels=self._channels(number, device), diagonal_I=diagonal_I
        )
        found.owner, found.is_here = owner, owner == rank
        if found.is_here:
            self._read_matrix(number, found, device)
            found.reserve()
        return found

    def _channels(self, number: int, device: torch.device) -> ChannelSums | None:
        saved = self.saved.inputs[number]
        if not saved.num_batches:
            return None
        sums = {name: self._sums[f"{number}.{name}"].to(device, copy=True) for name in ("sum_abs", "spans", *_ROWS)}
        found = ChannelSums(saved.width, device)
        found.num_batches, found.sum_abs_I, found.bounds_2I = saved.num_batches, sums["sum_abs"], sums["bounds"]
        found.averages_2I, found.spans = sums["averages"], list(sums["spans"])
        return found

    def _read_matrix(self, number: int, found: InputStatistics, device: torch.device) -> None:
        saved = self.saved.inputs[number]
        if not saved.num_tokens or not (found.has_gram or found.has_sample):
            return
        path = self.folder / matrix_name(self.index, number)
        with TensorFile(path, matrix_kinds(saved), saved.matrix) as file:
            for name in file.names:
                if name == GRAM:
                    hessian_II = file.read_symmetric(saved.width, device)
                    if found.has_gram:
                        found.gram = HessianAccumulator.of_sum(hessian_II, saved.num_tokens)
                    del hessian_II
                else:
                    sample_TI = file.read(name)
                    if not bool(torch.isfinite(sample_TI).all()):
                        raise damaged(path, "its tokens are not finite")
                    if found.has_sample:
                        found.sample = TokenSample.of_kept(sample_TI.to(device), saved.num_tokens)
            file.finish()

    @functools.cached_property
    def _sums(self) -> dict[str, torch.Tensor]:
        """The small sums of all inputs, on the CPU."""
        kinds = sums_kinds(self.saved)
        if not kinds:
            return {}
        path = self.folder / sums_name(self.index)
        with TensorFile(path, kinds, self.saved.sums) as file:
            found = {name: file.read(name) for name in file.names}
            file.finish()
        for name, tensor in found.items():
            if name.startswith("cache."):
                continue  # `KeyValues.scale_of` rejects values that are not finite
            is_size = name.endswith((".diagonal", ".sum_abs"))
            if not bool(torch.isfinite(tensor).all()) or (is_size and bool((tensor < 0).any())):
                raise damaged(path, f"{name} is not finite or negative")
        return found
