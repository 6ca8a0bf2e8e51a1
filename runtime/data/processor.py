"""Make a model's inputs from documents with images, sounds or videos, by the model's processor.

The processor is that of the model's directory, loaded without its own code and without a network. It decides the names,
shapes and dtypes of the inputs, and the tokens that stand for media. Each document becomes one sample: a batch of one.

- A conversation is rendered by the processor's chat template. A text with its placeholders (`<image>`) is used as it
  is, and one without them becomes a user's message, if there is a template.
- For a model that generates text from sound or images alone (Whisper), the text becomes the labels, and the inputs of
  the decoder follow from them.
- `labels` of other models are the tokens of the text: -100 for media, which a perplexity does not count.

Shapes: S tokens of a sample, T tokens of labels.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import PAD, START
from runtime.console import quiet
from runtime.data.decoder import LABELS, NOT_A_LABEL, shifted
from runtime.data.media import AUDIO, IMAGE, VIDEO, Frames, Medium
from runtime.data.named_tensors import IDS, Sample
from runtime.data.processor_files import NEEDS_MODEL, missing_package, processor_in
from runtime.errors import DataError
from runtime.host.offline import offline
from runtime.host.regular_files import read_text
from runtime.model.config import parse_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from runtime.data.documents import Document

DECODER_IDS = "decoder_input_ids"
_MEDIA_TOKENS = tuple(
    f"{kind}_{name}" for kind in (IMAGE, AUDIO, VIDEO) for name in ("token_id", "token_index", "pad_token_id")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaProcessor:
    """A model's processor, and what its samples need to know of the model.

    Attributes:
        processor: of transformers.
        directory: it was loaded from.
        names: the parameters of the model's forward; empty if they are unknown.
        config: of the model.
    """

    processor: Any
    directory: Path
    names: tuple[str, ...]
    config: PretrainedConfig

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @property
    def media_tokens(self) -> tuple[int, ...]:
        """The ids of tokens that stand for media."""
        places = (self.config, self.tokenizer, self.processor)
        found = [getattr(place, name, None) for place in places for name in _MEDIA_TOKENS]
        return tuple(sorted({token for token in found if type(token) is int and token >= 0}))

    @property
    def padding_token(self) -> int:
        """The id to pad with."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in tokens if token is not None))

    def sample(self, document: Document) -> Sample:
        """Return the model's inputs for one document, each tensor as in a batch of one.

        Raises:
            DataError: the media cannot be opened, or the processor rejects the document.
        """
        made = self._made([document])
        if self._is_transcript:
            made |= self._transcript(document)
        elif IDS in made:
            made[LABELS] = text_labels(made[IDS], self.media_tokens)
        return {name: made[name] for name in (*self.names, LABELS) if name in made} if self.names else made

    def is_joinable(self, document: Document) -> bool:
        """Whether the inputs of a batch are those of its samples, each concatenated along the first dimension."""
        import torch

        single, double = self._made([document]), self._made([document, document])
        return all(torch.equal(double[name], torch.cat([value, value])) for name, value in single.items())

    def _made(self, documents: Sequence[Document]) -> Sample:
        """Run the processor on a batch of documents."""
        where = documents[0].where
        if self._is_transcript and not documents[0].media:
            raise DataError(f"{where} has no audio or image, which the model requires", hint="remove it")
        given: dict[str, Any] = {"return_tensors": "pt"} | self._media(documents)
        if not self._is_transcript:
            given["text"] = [self._prompt(document) for document in documents]
            bos = self.tokenizer.bos_token
            if bos is not None and given["text"][0].startswith(bos):
                given["add_special_tokens"] = False
        return self._as_tensors(self._processed(given, where), where)

    @property
    def _is_transcript(self) -> bool:
        return bool(self.names) and IDS not in self.names

    def _media(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Open the media of documents; return arguments of the processor."""

        def of(kind: str, part: str) -> list[list[Medium]]:
            found = [[medium for medium in document.media if medium.kind == kind] for document in documents]
            for medium in found[0][:1]:
                if getattr(self.processor, part, None) is None:
                    name = type(self.processor).__name__
                    raise DataError(f"{medium.where} has {medium.kind} data, but {name} has no {part}")
            return found if found[0] else []

        given: dict[str, Any] = {}
        if images := of(IMAGE, "image_processor"):
            given["images"] = [[medium.image() for medium in each] for each in images]
        if sounds := of(AUDIO, "feature_extractor"):
            rate = int(getattr(self.processor.feature_extractor, "sampling_rate", 16000))
            given |= {"audio": [medium.sound(rate) for each in sounds for medium in each], "sampling_rate": rate}
        if videos := of(VIDEO, "video_processor"):
            given |= self._videos(videos)
        return given

    def _videos(self, media: Sequence[Sequence[Medium]]) -> dict[str, Any]:
        """Sample the frames of videos as the video processor would."""
        from transformers.video_utils import VideoMetadata

        own = self.processor.video_processor

        def choose(num_total: int, rate: float | None, height: int, width: int) -> Sequence[int]:
            if not getattr(own, "do_sample_frames", False):
                return range(num_total)
            facts = VideoMetadata(total_num_frames=num_total, fps=rate, height=height, width=width)
            facts.duration = num_total / rate if rate else None
            options = {name: getattr(own, name, None) for name in ("fps", "num_frames")}
            given = {name: value for name, value in options.items() if value is not None}
            if len(given) == len(options):
                del given["num_frames"]
            chosen: Sequence[int] = [int(index) for index in own.sample_frames(metadata=facts, **given)]
            return chosen

        def facts(frames: Frames) -> VideoMetadata:
            return VideoMetadata(
                total_num_frames=frames.num_total,
                fps=frames.rate,
                duration=frames.num_total / frames.rate if frames.rate else None,
                frames_indices=frames.indices,
                height=frames.pixels_FHWC.shape[1],
                width=frames.pixels_FHWC.shape[2],
            )

        found = [[medium.frames(choose) for medium in each] for each in media]
        return {
            "videos": [[frames.pixels_FHWC for frames in each] for each in found],
            "video_metadata": [[facts(frames) for frames in each] for each in found],
            "do_sample_frames": False,
        }

    def _prompt(self, document: Document) -> str:
        content = document.content
        if isinstance(content, str):
            places = [getattr(self.processor, f"{kind}_token", None) for kind in (IMAGE, AUDIO, VIDEO)]
            has_places = any(isinstance(place, str) and place in content for place in places)
            if has_places or not document.media or not self._has_template:
                return content
            parts = [{"type": medium.kind} for medium in document.media]
            parts += [{"type": "text", "text": content}] if content.strip() else []
            content = [{"role": "user", "content": parts}]
        if not self._has_template:
            raise DataError(
                f"{document.where} has messages, but {self.directory} has no chat template",
                hint="use the processor of an instruction-tuned model, or give texts with the processor's placeholders",
            )
        return self._rendered(document, content)

    @property
    def _has_template(self) -> bool:
        return getattr(self.processor, "chat_template", None) is not None

    def _rendered(self, document: Document, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render messages with the chat template, in the form of their text that the template prints.

        Some templates print only text that is a list of parts, others only strings.
        """
        texts = [text for message in messages for text in _texts(message.get("content"))]
        fallback, failure = "", None
        for form in (messages, [_in_parts(message) for message in messages]):
            try:
                prompt = self.processor.apply_chat_template([_with_names(message) for message in form], tokenize=False)
            except MemoryError:
                raise
            except Exception as error:  # a template is a program and can raise anything
                failure = error
                continue
            if all(text.strip() in prompt for text in texts):
                return str(prompt)
            fallback = fallback or str(prompt)
        if fallback:
            return fallback
        raise DataError(f"{document.where} does not fit the chat template: {failure}") from failure

    def _processed(self, given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        try:
            with quiet("transformers"), warnings.catch_warnings(), offline():
                warnings.simplefilter("ignore")
                found: Mapping[str, Any] = self.processor(**given)
        except MemoryError:
            raise
        except ImportError as error:
            raise missing_package(type(self.processor).__name__, error) from error
        except Exception as error:  # processors raise many kinds of exceptions
            why = (str(error) or type(error).__name__).partition("\n")[0]
            raise DataError(f"{type(self.processor).__name__} rejects {where}: {why}") from error
        return found

    def _as_tensors(self, found: Mapping[str, Any], where: str) -> Sample:
        import torch

        made: Sample = {}
        for name, value in found.items():
            if self.names and name not in self.names:
                continue
            try:
                tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"{name} of {where} is not one tensor: {str(error).partition(chr(10))[0]}",
                    hint="use media of one size in each record",
                ) from error
            made[name] = tensor.detach().contiguous()
        return made

    def _transcript(self, document: Document) -> Sample:
        """Return the labels of the text, and the decoder's inputs if the model takes them."""
        import torch

        if LABELS not in self.names:
            return {}
        parts = (self.config, self.config.get_text_config(decoder=True))
        starts = [getattr(part, "decoder_start_token_id", None) for part in parts]
        start = next((int(token) for token in starts if token is not None), None)
        ids = list(self.tokenizer(text_target=_answer(document), verbose=False)["input_ids"])
        ids = ids[1:] if ids[:1] == [start] else ids  # the shift adds it
        if not ids:
            raise DataError(f"{document.where} has no tokens", hint="remove it")
        labels_BT = torch.tensor([ids], dtype=torch.int64)
        if DECODER_IDS not in self.names:
            return {LABELS: labels_BT}
        rule = {PAD: self.padding_token} | ({} if start is None else {START: start})
        return {LABELS: labels_BT, DECODER_IDS: shifted(labels_BT, rule)}


def load_processor(directory: Path) -> MediaProcessor:
    """Load the processor of a model's directory, and the model's config.

    Raises:
        DataError: the directory contains no processor, the processor needs its own code, or a package is missing.
    """
    found = processor_in(directory)
    try:
        with quiet("transformers"):
            config = parse_config(directory)
    except MemoryError:
        raise
    except Exception as error:  # transformers validates with many kinds of exceptions
        why = str(error).partition("\n")[0]
        raise DataError(f"the config in {directory} cannot be loaded: {why}", hint=NEEDS_MODEL) from error
    return MediaProcessor(processor=found, directory=directory, names=_forward_names(directory), config=config)


def _forward_names(directory: Path) -> tuple[str, ...]:
    """Return the parameters of the forward of the class that config.json names; nothing if it has code of its own."""
    import transformers

    table = json.loads(read_text(directory / "config.json"))
    names = table.get("architectures")
    cls = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if table.get("auto_map") or not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return ()
    return tuple(inspect.signature(cls.forward).parameters)


def text_labels(ids_BS: torch.Tensor, media_tokens: Sequence[int]) -> torch.Tensor:
    """Return the tokens to predict, int64 [B, S]: -100 for tokens of media."""
    import torch

    is_medium_BS = torch.isin(ids_BS, torch.tensor(list(media_tokens) or [-1]))
    return ids_BS.to(torch.int64).masked_fill(is_medium_BS, NOT_A_LABEL)


def _answer(document: Document) -> str:
    """Return the text that a model should generate; for a conversation, the text of the assistant."""
    if isinstance(document.content, str):
        return document.content
    answers = [message for message in document.content if message.get("role") == "assistant"]
    texts = [text for message in answers for text in _texts(message.get("content"))]
    if not texts:
        hint = 'add {"role": "assistant", "content": "..."}, or use records like {"audio": "NAME", "text": "..."}'
        raise DataError(f"{document.where} has no text of the assistant, which the model should generate", hint=hint)
    return " ".join(texts)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose text is a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """Add an empty value to the parts of media in a message: some templates look for one."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [part if part.get("type") not in (IMAGE, AUDIO, VIDEO) else {**part, part["type"]: ""} for part in content]
    return {**message, "content": parts}
