"""Open the images, sounds and videos that calibration data names.

A medium is stated as a file name relative to the directory of the data file, as a base64 data URI, as the struct of a
parquet file that `datasets` wrote (`{"bytes": ..., "path": ...}`), or, for rows in memory, as the decoded object.
Nothing is requested from a network: an address is an error. Images and videos are opened in formats that start no other
programs and open no other files.

Shapes: F frames, H, W height and width in pixels, T samples of a sound, C channels.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from runtime.arguments import shown
from runtime.errors import DataError
from runtime.host.hub import is_inside
from runtime.host.regular_files import read_regular, reason_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGE, AUDIO, VIDEO = KINDS = ("image", "audio", "video")
MEDIA_FIELDS = {kind + plural: kind for kind in KINDS for plural in ("", "s")}  # of a record
MEDIA_EXTRA = "pip install 'seqbuild-llm[media]'"
# Without EPS, for which Pillow starts Ghostscript, and without formats that are not used for photos.
_IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_PACKAGES = {"PIL": "pillow", "soundfile": "soundfile", "soxr": "soxr", "av": "av"}
# FFmpeg would otherwise recognize lists of other files and addresses, and open them.
_VIDEO_FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "ogg", "flv", "asf", "gif", "ivf")
_CONTAINER_OPTIONS = {"format_whitelist": ",".join(_VIDEO_FORMATS), "protocol_whitelist": "none"}
# Of a decoded sound or the chosen frames of a video, of which a few bytes can state any size.
_MOST_BYTES = 2**33
_MOST_FRAMES = 10**7
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 1_000_000
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)


# From the number of frames, their rate (None if unknown), height and width to the indices to use, in increasing order.
Choose: TypeAlias = "Callable[[int, float | None, int, int], Sequence[int]]"


class Frames(NamedTuple):
    """Chosen frames of a video.

    Attributes:
        pixels_FHWC: uint8 array.
        indices: of the frames in the video.
        num_total: frames of the video.
        rate: frames per second; None if unknown.
    """

    pixels_FHWC: np.ndarray[Any, Any]
    indices: list[int]
    num_total: int
    rate: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """An image, a sound or a video of a record.

    Attributes:
        kind: `image`, `audio` or `video`.
        value: the file name, data URI, struct or object.
        where: the record, for messages.
        base: the directory that file names are relative to.
        home: the data set's directory: files outside of it are rejected; None without a data set.
    """

    kind: str
    value: Any
    where: str
    base: Path = Path()
    home: Path | None = None

    def image(self) -> Image.Image:
        """Return the image in RGB, upright."""
        package = self._package("PIL.Image")
        with self._opening():
            if isinstance(self.value, package.Image):
                opened = self.value
            elif hasattr(self.value, "__array__"):
                opened = package.fromarray(self.value)
            else:
                content = self._content()
                package.init()
                formats = [name for name in _IMAGE_FORMATS if name in package.OPEN]
                with warnings.catch_warnings():
                    warnings.simplefilter("error", package.DecompressionBombWarning)
                    opened = package.open(io.BytesIO(content), formats=formats)
                    opened.load()
            upright: Image.Image = importlib.import_module("PIL.ImageOps").exif_transpose(opened)
            return upright.convert("RGB")

    def sound(self, rate: int) -> np.ndarray[Any, Any]:
        """Return the mean of the channels at this rate, float32 [T]."""
        import numpy as np

        with self._opening():
            if isinstance(self.value, Mapping) and self.value.get("array") is not None:
                found, own_rate = np.asarray(self.value["array"], dtype=np.float32), self.value.get("sampling_rate")
                sound_T = found.mean(axis=0) if found.ndim > 1 else found
            elif hasattr(self.value, "__array__"):
                sound_T, own_rate = np.asarray(self.value, dtype=np.float32), rate
            else:
                content = self._content()
                with self._package("soundfile").SoundFile(io.BytesIO(content)) as opened:
                    own_rate = opened.samplerate
                    self._require_length(opened.frames * opened.channels, own_rate, rate)
                    sound_T = opened.read(dtype="float32", always_2d=True).mean(axis=1)
            if not isinstance(own_rate, (int, float)) or sound_T.ndim != 1 or not len(sound_T):
                raise DataError(f"{self._name} has no samples or no sampling rate")
            self._require_length(len(sound_T), own_rate, rate)
            if own_rate != rate:
                sound_T = self._package("soxr").resample(sound_T, own_rate, rate, quality="HQ")
        return np.ascontiguousarray(sound_T, dtype=np.float32)

    def frames(self, choose: Choose) -> Frames:
        """Return frames of the video.

        Args:
            choose: decides which; frames given as images are all used.
        """
        import numpy as np

        if isinstance(self.value, Sequence) and not isinstance(self.value, (str, bytes)):
            stills = [replace(self, kind=IMAGE, value=part).image() for part in self.value]
            if not stills or any(still.size != stills[0].size for still in stills):
                raise DataError(f"{self._name} must be a list of images of one size")
            every_FHWC = np.stack([np.asarray(still) for still in stills])
            return Frames(every_FHWC, list(range(len(stills))), len(stills), None)
        if hasattr(self.value, "__array__"):
            every_FHWC = np.asarray(self.value)
            return Frames(every_FHWC, list(range(len(every_FHWC))), len(every_FHWC), None)
        content = self._content()
        package = self._package("av")
        with self._opening(), package.open(io.BytesIO(content), options=_CONTAINER_OPTIONS) as container:
            stream = container.streams.video[0]
            num_total = stream.frames or sum(1 for _ in container.decode(video=0))
            if num_total > _MOST_FRAMES:
                raise DataError(f"{self._name} has {num_total:,} frames, more than {_MOST_FRAMES:,}")
            rate = float(stream.average_rate) if stream.average_rate else None
            indices = [int(index) for index in choose(num_total, rate, stream.height, stream.width)]
            container.seek(0)
            wanted, found, num_bytes = frozenset(indices), [], 0
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    num_bytes += 3 * frame.height * frame.width
                    if num_bytes > _MOST_BYTES:
                        hint = "cut it, or make it smaller"
                        raise DataError(f"{self._name} has more than {_MOST_BYTES:,} bytes of frames", hint=hint)
                    found.append((index, frame.to_ndarray(format="rgb24")))
                if index >= indices[-1]:
                    break
        pixels = dict(found)
        known = [index for index in indices if index in pixels]
        if not known:
            raise DataError(f"{self._name} has no frames")
        return Frames(np.stack([pixels[index] for index in known]), known, num_total, rate)

    def _require_length(self, count: int, own_rate: float, rate: int) -> None:
        """Reject a sound of an impossible rate, or with too many float32 samples at its own or the other rate."""
        if not _LOWEST_RATE <= own_rate <= _HIGHEST_RATE:
            raise DataError(f"{self._name} has {own_rate} samples per second", hint="convert it to 16000")
        if 4 * count * max(rate / own_rate, 1) > _MOST_BYTES:
            raise DataError(f"{self._name} has {count:,} samples", hint="cut it")

    @property
    def _name(self) -> str:
        value = self.value
        if isinstance(value, Mapping):
            value = value.get("path")
        is_file = isinstance(value, str) and not value.startswith("data:") and len(value) < 300
        return f"the {self.kind} {value} of {self.where}" if is_file else f"the {self.kind} of {self.where}"

    def _content(self) -> bytes:
        """Return the bytes of the file, URI or struct."""
        value: Any = self.value
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        if isinstance(value, Path):
            value = str(value)
        if not isinstance(value, str) or not value:
            raise DataError(
                f"the {self.kind} of {self.where} is {shown(self.value)}",
                hint="give the name of a file relative to the data, a base64 data URI, or {bytes, path}",
            )
        if _ADDRESS.match(value):
            what = f"the {self.kind} {value[:200]} of {self.where} is an address, and nothing is downloaded"
            raise DataError(what, hint="download it, and give the name of the file")
        if value.startswith("data:"):
            return self._decoded(value.partition(",")[2])
        path = self.base / Path(value.removeprefix("file://"))
        try:
            if self.home is not None and path.exists() and not is_inside(path, self.home.resolve()):
                raise DataError(f"{self._name} is not a file of its data set {self.home}", hint="remove it")
            return read_regular(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._name} cannot be read: {reason_of(error)}", hint=f"names are relative to {self.base}"
            ) from error

    def _decoded(self, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"the {self.kind} of {self.where} is not valid base64: {error}") from error

    def _package(self, module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            package = _PACKAGES[module.partition(".")[0]]
            raise DataError(f"{self._name} requires the package {package}", hint=MEDIA_EXTRA) from error

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Turn any exception of a decoder into a `DataError`."""
        try:
            yield
        except (DataError, MemoryError):
            raise
        except Exception as error:
            why = (str(error) or type(error).__name__).partition("\n")[0]
            raise DataError(f"{self._name} cannot be decoded: {why}") from error
