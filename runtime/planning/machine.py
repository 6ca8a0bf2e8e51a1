"""The measured rates of a machine, and the file that holds them: measured once, they plan runs anywhere.

    {"seqbuild_machine": 1, "device": "cpu", "name": "AMD EPYC", "threads": 1, "torch": "2.13.0",
     "passes": {"bfloat16": {"products": 4.1e11, ...}, ...}, "rates": {"call_s": 8e-06, ...}}

The file is untrusted: it is typed and of limited size, and nothing in it is executed. All rates are positive numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.errors import DataError
from runtime.host.publish import write_file
from runtime.host.regular_files import open_regular, reason_of
from runtime.planning.rates import PassRates, Rates
from runtime.terminal import printable

if TYPE_CHECKING:
    import torch

VERSION = 1
_MOST_BYTES = 2**20
_LEAST, _MOST = 1e-12, 1e21  # of rates, and of seconds
_MOST_NAME = 200


class _FormatOfMachine(msgspec.Struct):
    seqbuild_machine: int


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rates of a machine with one worker.

    Attributes:
        device: its type, such as `cpu` or `cuda`.
        name: of the processor or the GPU.
        threads: of torch.
        torch_version: the version of torch.
        passes: of the model's own operators, by dtype.
        base: all other rates.
        seqbuild_machine: the version of the format.
    """

    device: str
    name: str
    threads: int
    torch_version: str = msgspec.field(name="torch")
    passes: dict[str, PassRates]
    base: Rates = msgspec.field(name="rates")
    seqbuild_machine: int = VERSION

    @property
    def label(self) -> str:
        """The machine in words."""
        threads = f", {self.threads} thread{'' if self.threads == 1 else 's'}" if self.device == "cpu" else ""
        return f"{printable(self.name)}{threads}"

    def rates(self, dtype: torch.dtype, link: float | None = None) -> Rates:
        """The rates of a run in `dtype`; those of float32 for a dtype that was not measured."""
        own = self.passes.get(str(dtype).removeprefix("torch."), self.base.passes)
        found = replace(self.base, passes=own, origin=f"measured on {self.label}")
        return found if link is None else replace(found, link=link)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OutputError: if it cannot be written.
        """
        text = msgspec.json.format(msgspec.json.encode(self), indent=2)
        write_file(path, text + b"\n")


def read_machine(path: Path, device_type: str) -> Machine:
    """Read a machine file for a plan of this type of device.

    Raises:
        DataError: if it cannot be read, is no machine file, or is of another type of device.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the machine file {path}: {reason_of(error)}") from error
    hint = "write one with seqbuild plan --measure --save-machine FILE"
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path} is no machine file: it has more than {_MOST_BYTES:,} bytes", hint=hint)
    try:
        version = msgspec.json.decode(data, type=_FormatOfMachine).seqbuild_machine
        if version != VERSION:
            raise DataError(
                f"{path} is a machine file of version {version}, and this program reads {VERSION}", hint=hint
            )
        machine = msgspec.json.decode(data, type=Machine)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise DataError(f"{path} is no machine file: {printable(str(error))}", hint=hint) from error
    wrong = next(_wrong_values(machine), "")
    if wrong:
        raise DataError(f"{path} is no machine file: {wrong}", hint=hint)
    if machine.device != device_type:
        raise DataError(
            f"{path} has the rates of a {machine.device} device, and the plan is for {device_type}",
            hint=f"pass --device {machine.device}, or measure on a machine with {device_type}",
        )
    return machine


def _wrong_values(machine: Machine) -> Iterator[str]:
    """Yield a sentence for each value that no machine has."""
    if machine.device not in ("cpu", "cuda", "xpu"):
        yield f"device is {printable(machine.device[:_MOST_NAME])!r}"
    if len(machine.name) > _MOST_NAME or len(machine.torch_version) > _MOST_NAME:
        yield f"a name has more than {_MOST_NAME} characters"
    if not machine.name.isprintable():
        yield f"name is {machine.name!r}"
    if not 1 <= machine.threads <= 2**16:
        yield f"threads is {machine.threads}"
    if not (machine.base.nearest and machine.base.unpacking and machine.base.rounding_inputs):
        yield "nearest, unpacking or rounding_inputs is empty"
    for rates in (machine.base, machine.base.passes, *machine.passes.values()):
        for name, value in _numbers(rates):
            if not _LEAST <= value <= _MOST:
                yield f"{name} is {value:g}"


def _numbers(rates: Any) -> Iterator[tuple[str, float]]:
    for entry in fields(rates):
        value = getattr(rates, entry.name)
        if isinstance(value, tuple):
            yield from ((f"{entry.name} of a kind of grid", rate) for _, rate in value)
        elif isinstance(value, float):
            yield entry.name, value
