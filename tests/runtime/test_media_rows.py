"""Records with images, sounds and videos are read in every form that transformers and data sets use."""

from __future__ import annotations

import base64
import io
import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.data.documents import Document, as_document
from runtime.data.media import Medium
from runtime.data.processor import load_processor
from runtime.data.reading import parts_of
from runtime.data.sources import DataSource
from runtime.errors import DataError

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

TEXT = {"type": "text", "text": "What?"}


def documents(folder: Path, *rows: dict[str, Any]) -> list[Document]:
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_documents(folder / "x.jsonl")


def read_documents(path: Path) -> list[Document]:
    return [record() for part in parts_of(DataSource(location=str(path))) for record in part.records()]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def picture(folder: Path) -> tuple[Path, bytes]:
    path = folder / "a.png"
    Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)).save(path)
    return path, path.read_bytes()


def sound_bytes(rate: int = 16000) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.array([[0, 16384], [16384, 16384], [-16384, 0]], dtype="<i2").tobytes())
    return stream.getvalue()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": user({"type": "image", "image": "a.png"}, TEXT)},
        {"messages": user({"type": "image", "path": "a.png"}, TEXT)},
        {"messages": user({"type": "image", "url": "file://a.png"}, TEXT)},
        {"messages": user({"type": "image", "url": "a.png", "image": None}, {**TEXT, "image": None})},
        {"messages": user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT)},
        {"messages": user({"type": "image"}, TEXT), "image": "a.png"},
        {"messages": user({"type": "image"}, TEXT), "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}], "image": "a.png"},
        {"messages": [{"role": "user", "content": "What?"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [TEXT]}], "image": "a.png"},
    ],
)
def test_forms_of_a_conversation_are_one(tmp_path: Path, row: dict[str, Any]) -> None:
    path, _ = picture(tmp_path)
    (found,) = documents(tmp_path, row)
    assert found.content == [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    (medium,) = found.media
    assert np.array_equal(np.asarray(medium.image()), np.asarray(Image.open(path)))


def test_media_keep_their_order(tmp_path: Path) -> None:
    content = "First <image> then <audio>and <image>."
    (found,) = documents(
        tmp_path, {"messages": [{"role": "user", "content": content}], "images": ["1", "2"], "audio": "3"}
    )
    assert [medium.value for medium in found.media] == ["1", "3", "2"]
    assert isinstance(found.content, list)
    kinds = [part["type"] for part in found.content[0]["content"]]
    assert kinds == ["text", "image", "text", "audio", "text", "image", "text"]


def test_a_text_with_places_but_without_media_is_text(tmp_path: Path) -> None:
    (found,) = documents(tmp_path, {"messages": [{"role": "user", "content": "<image> is a tag of HTML"}]})
    assert found.media == ()
    assert found.content == [{"role": "user", "content": "<image> is a tag of HTML"}]


@pytest.mark.parametrize("with_text", [True, False])
def test_fields_alone(tmp_path: Path, with_text: bool) -> None:
    (found,) = documents(tmp_path, {"images": ["a.png", "b.png"]} | ({"text": "x"} if with_text else {}))
    assert found.content == ("x" if with_text else "")
    assert [(medium.kind, medium.value) for medium in found.media] == [("image", "a.png"), ("image", "b.png")]
    (film,) = documents(tmp_path, {"video": ["1.png", "2.png"], "text": "x"})
    assert [(medium.kind, medium.value) for medium in film.media] == [("video", ["1.png", "2.png"])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": user({"type": "image"}, TEXT)}, "has a part of type image without a file"),
        ({"messages": user({"type": "image"}, TEXT), "images": ["1", "2"]}, "more images than places"),
        ({"messages": user({"type": "text", "text": 5}, {"type": "image", "image": "a"})}, "as a part of a message"),
        ({"messages": user(7, {"type": "image", "image": "a"})}, "has 7 as a part of a message"),
    ],
)
def test_wrong_parts_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        documents(tmp_path, row)


def test_parquet_of_datasets(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, content = picture(tmp_path)
    rows = [
        {"image": {"bytes": content, "path": None}, "text": "x"},
        {"image": {"bytes": None, "path": "a.png"}, "text": "y"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = read_documents(tmp_path / "x.parquet")
    assert [document.content for document in found] == ["x", "y"]
    for document in found:
        assert np.array_equal(np.asarray(document.media[0].image()), np.asarray(Image.open(path)))


def medium(kind: str, value: Any, base: Path = Path()) -> Medium:
    return Medium(kind=kind, value=value, where="row 1", base=base)


def test_forms_of_an_image(tmp_path: Path) -> None:
    path, content = picture(tmp_path)
    expected = np.asarray(Image.open(path))
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for value in (uri, path, str(path), content, {"bytes": content}, expected, Image.open(path)):
        assert np.array_equal(np.asarray(medium("image", value, tmp_path).image()), expected)


def test_images_are_upright_and_in_colours(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (4, 6), 9).save(tmp_path / "a.jpg", exif=exif)
    found = medium("image", "a.jpg", tmp_path).image()
    assert (found.mode, found.size) == ("RGB", (6, 4))


def test_forms_of_a_sound(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    content = sound_bytes()
    (tmp_path / "a.wav").write_bytes(content)
    expected = np.array([0.25, 0.5, -0.25], dtype=np.float32)
    uri = "data:audio/wav;base64," + base64.b64encode(content).decode()
    decoded = {"array": [0.25, 0.5, -0.25], "sampling_rate": 16000, "path": "a.wav"}
    for value in ("a.wav", uri, {"bytes": content, "path": "x"}, decoded):
        assert np.array_equal(medium("audio", value, tmp_path).sound(16000), expected)


def test_sounds_are_resampled() -> None:
    pytest.importorskip("soxr")
    value = {"array": np.ones(800, dtype=np.float32), "sampling_rate": 8000}
    assert medium("audio", value).sound(16000).shape == (1600,)


@pytest.mark.parametrize("address", ["https://h/a.png", "HTTP://h/a.png", "s3://b/a.png", "hf://datasets/a/b"])
def test_nothing_is_downloaded(address: str) -> None:
    for kind, read in (("image", lambda found: found.image()), ("audio", lambda found: found.sound(16000))):
        with pytest.raises(DataError, match="is an address, and nothing is downloaded"):
            read(medium(kind, address))


@pytest.mark.parametrize("value", [5, {"bytes": None, "path": None}, "", "\0", "/dev/zero", "."])
def test_values_that_are_no_file(value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of row 1"):
        medium("image", value, tmp_path).image()


def test_an_image_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    picture(tmp_path)
    with pytest.raises(DataError, match="cannot be decoded: Image size"):
        medium("image", "a.png", tmp_path).image()


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile 'other.gif'\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.gif\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_video_names_no_other_files_or_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    pytest.importorskip("av")
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "other.gif", save_all=True, append_images=frames[1:])
    monkeypatch.chdir(tmp_path)
    assert len(medium("video", "other.gif").frames(lambda count, *_: range(count)).indices) == 2
    with pytest.raises(DataError, match="the video of row 1 cannot be decoded"):
        medium("video", text.encode()).frames(lambda count, *_: range(count))


def test_a_video_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("runtime.data.media._MOST_BYTES", 3 * 16 * 16 + 1)
    assert len(medium("video", "a.gif", tmp_path).frames(lambda *_: [1]).indices) == 1
    with pytest.raises(DataError, match=r"the video a\.gif of row 1 has more than 769 bytes of frames"):
        medium("video", "a.gif", tmp_path).frames(lambda count, *_: range(count))


@pytest.mark.parametrize("rate", [0, 1, 10**9, float("nan"), float("inf"), 1e-6])
def test_sounds_of_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(DataError, match=r"the audio of row 1 has .* samples per second"):
        medium("audio", {"array": [0.0] * 10, "sampling_rate": rate}).sound(16000)


def test_a_sound_that_states_a_wrong_length_is_refused() -> None:
    soundfile = pytest.importorskip("soundfile")
    written = io.BytesIO()
    soundfile.write(written, np.zeros(100, dtype=np.int16), 16000, format="FLAC")
    content = bytearray(written.getvalue())
    content[21] |= 0x0F  # the number of samples has 36 bits
    content[22:26] = b"\xff" * 4
    with pytest.raises(DataError, match="the audio of row 1 has 68,719,476,735 samples"):
        medium("audio", bytes(content)).sound(16000)


def test_media_of_a_data_set_are_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        picture(folder)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "a.png")
    image = {"type": "image", "image": "a.png"}
    found = as_document({"messages": user(image)}, "row 1").relative_to(tmp_path / "set", tmp_path / "set").media[0]
    assert found.image().mode == "RGB"
    for outside in ("../a.png", str(tmp_path / "a.png"), "link.png"):
        with pytest.raises(DataError, match="is not a file of its data set"):
            replace(found, value=outside).image()


def test_a_processor_with_a_model_for_sounds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "audio_tokenizer": {"audio_tokenizer_class": "DacModel"}})
    )
    with pytest.raises(DataError, match="has a processor with a model for sounds"):
        load_processor(tmp_path)
