"""Every architecture of transformers as a small random model: what `make coverage` and the suite run on.

A case is a model type of one of transformers' auto mappings and the class it maps to. Its config is the type's default
one, shrunken by `seqbuild.shrink.config`; EXCEPTIONS says what a default config leaves unsaid or states inconsistently.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from seqbuild.sample.thin import randomize
from seqbuild.shrink.config import shrink_table
from seqbuild.verify.recompile import stated
from tests.zoo_exceptions import EXCEPTIONS, PARTS, UNUSABLE
from tests.zoo_vision import BROKEN, VISION

MAPPINGS = {
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text encoder": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    "image encoder": modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
}

COMPOSED = {"vision-encoder-decoder": ("vit", "bert"), "speech-encoder-decoder": ("wav2vec2", "bert")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the coverage table."""

    mapping: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.mapping}/{self.model_type}"


def cases() -> Iterator[Case]:
    """Each class once, under the first mapping that has it."""
    seen: set[str] = set()
    for mapping, table in MAPPINGS.items():
        for model_type, names in table.items():
            class_name = names if isinstance(names, str) else names[0]
            if class_name not in seen:
                seen.add(class_name)
                yield Case(mapping=mapping, model_type=model_type, class_name=class_name)


def case_of(name: str) -> Case:
    """The case of that name."""
    (found,) = (case for case in cases() if case.name == name)
    return found


def unusable(case: Case) -> str:
    """Why the case cannot be built or run here: packages that it lacks, a fault of its own; nothing if it can."""
    if case.model_type in UNUSABLE:
        return UNUSABLE[case.model_type]
    if (case.class_name, transformers.__version__) in BROKEN:
        return BROKEN[case.class_name, transformers.__version__]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(transformers, case.class_name)._from_config(small_config(case))
    except ImportError as error:
        lines = dict.fromkeys(line.strip() for line in str(error).splitlines() if "requires" in line)
        return " ".join(line.split(" but ")[0] for line in lines) or str(error)
    except Exception:
        return ""  # a failure of ours: building it says so
    return ""


def small_config(case: Case) -> PretrainedConfig:
    """The case's config, shrunken; `architectures` is filled in, as a saved model's is."""
    cls = getattr(transformers, case.class_name)
    changes = _exceptions(case) | EXCEPTIONS.get(case.class_name, {})
    full = _default_config(case.model_type)
    part = _part_for(full, cls.config_class)
    table = _changed(shrink_table(stated(part.to_dict())), changes)
    config = type(part).from_dict(table)
    config.architectures = [case.class_name]
    return config


def small_model(case: Case, attention: str | None = "eager") -> PreTrainedModel:
    """The case's model with random weights, in eval mode."""
    cls, config = getattr(transformers, case.class_name), small_config(case)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: PreTrainedModel = cls._from_config(config, dtype=torch.float32, attn_implementation=attention)
    randomize(model)
    return model.eval()


def _exceptions(case: Case) -> Mapping[str, Any]:
    """A case's own entries, else its type's: those of `tests.zoo_vision` speak of whole configs, not of their text."""
    if case.name in VISION:
        return VISION[case.name]
    is_seeing = case.mapping.startswith("image") and case.model_type in VISION
    return (VISION if is_seeing else EXCEPTIONS).get(case.model_type, {}) | EXCEPTIONS.get(case.class_name, {})


def _default_config(model_type: str) -> PretrainedConfig:
    """The type's default config; one that consists of any two models may have none."""
    if model_type in COMPOSED:
        encoder, decoder = (CONFIG_MAPPING[name]() for name in COMPOSED[model_type])
        composed: PretrainedConfig = CONFIG_MAPPING[model_type].from_encoder_decoder_configs(encoder, decoder)
        return composed
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:  # huggingface_hub has its own
        if model_type not in PARTS:
            raise
        return CONFIG_MAPPING[model_type](**copy.deepcopy(PARTS[model_type]))


def _part_for(config: PretrainedConfig, wanted: type) -> PretrainedConfig:
    """The config itself, or the part of it that the class takes (the text model of a multimodal type)."""
    if isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _changed(table: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        *owners, key = path.split(".")
        place = table
        for owner in owners:
            place = place.setdefault(owner, {})
        place[key] = value
    return table
