"""Load a processor from a directory, without its code and without a network."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import quiet
from runtime.data.media import MEDIA_EXTRA
from runtime.data.tokenizer import require_tokenizer_class
from runtime.errors import DataError
from runtime.host.offline import offline
from runtime.host.regular_files import read_text, require_regular_entries

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
NEEDS_MODEL = "images, audio and video need the directory of the model with its processor"
_CLASS_KEYS = ("processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type")
_AUDIO_TOKENIZER = "audio_tokenizer"  # a model, which a processor would load from any place


def processor_in(directory: Path) -> ProcessorMixin:
    """Load the processor in a directory with transformers; only classes of transformers are used.

    Raises:
        DataError: the directory contains no processor, the processor needs its own code, or a package is missing.
    """
    from transformers import AutoProcessor
    from transformers.processing_utils import ProcessorMixin

    if not any((directory / name).is_file() for name in PROCESSOR_FILES[:2]):
        raise DataError(f"{directory} has no processor ({', '.join(PROCESSOR_FILES[:2])})", hint=NEEDS_MODEL)
    try:
        require_regular_entries(directory)
    except OSError as error:
        raise DataError(f"the processor's file {error.filename} cannot be read: {error.strerror}") from error
    try:
        with quiet("transformers"), warnings.catch_warnings(), offline():
            warnings.simplefilter("ignore")
            require_tokenizer_class(directory)
            _require_processor_classes(directory)
            auto: Any = AutoProcessor
            found = auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except ImportError as error:
        raise missing_package(f"the processor in {directory}", error) from error
    except DataError:
        raise
    except Exception as error:  # many libraries take part
        why = str(error).partition("\n")[0]
        raise DataError(f"the processor in {directory} cannot be loaded: {why}", hint=NEEDS_MODEL) from error
    if not isinstance(found, ProcessorMixin):
        raise DataError(f"{directory} has {type(found).__name__} instead of a processor", hint=NEEDS_MODEL)
    return found


def _require_processor_classes(directory: Path) -> None:
    """Require that the classes named by the files are processors: transformers would load any class, such as a model.

    Raises:
        DataError: one is another class.
    """
    import transformers
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.processing_utils import ProcessorMixin

    bases = (ProcessorMixin, ImageProcessingMixin, FeatureExtractionMixin)
    for file in (*PROCESSOR_FILES, "tokenizer_config.json", "config.json"):
        table = json.loads(read_text(directory / file)) if (directory / file).is_file() else {}
        parts = [table, *(part for part in table.values() if isinstance(part, dict))] if isinstance(table, dict) else []
        if any(_AUDIO_TOKENIZER in part for part in parts) or (directory / f"{_AUDIO_TOKENIZER}_config.json").exists():
            raise DataError(f"{directory} has a processor with a model for sounds, which is not supported")
        for name in (part.get(key) for part in parts for key in _CLASS_KEYS):
            found = getattr(transformers, name, None) if isinstance(name, str) else None
            # The class of a missing package has `is_dummy`.
            if isinstance(found, type) and not issubclass(found, bases) and not getattr(found, "is_dummy", False):
                raise DataError(f"{directory / file} names {name} as a processor, which is another class")


def missing_package(what: str, error: ImportError) -> DataError:
    """Describe a package that a processor needs."""
    lines = [line.strip().partition(" but ")[0] for line in str(error).splitlines() if line.strip()]
    return DataError(
        f"{what} requires a package that is missing: {lines[0] if lines else error.name}", hint=MEDIA_EXTRA
    )
