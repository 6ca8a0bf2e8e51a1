"""What libraries make of the names in an artifact's config and tokenizer files, where the check has passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models

from runtime.data.tokenizer import load_tokenizer
from runtime.errors import DataError, ModelError
from runtime.host.offline import offline
from runtime.model.config import read_config, require_plain_attention
from tests.attacks.attack import watched


def directory(path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    return path


@pytest.mark.parametrize("model_type", ["upernet", "dpt", "mask2former", "depth_anything"])
def test_no_backbone_is_looked_for_at_the_hub(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks the hub whether there is a repository of that name, and takes its config from there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    root = directory(tmp_path, {"model_type": model_type, "backbone": "evil", "use_timm_backbone": False})
    with watched(root) as seen, pytest.raises(ModelError, match="offline"):
        read_config(root)
    assert seen == []


def test_the_hub_is_out_of_reach_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline():
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()


KERNEL = "someone/kernels"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "_attn_implementation": KERNEL},
        {"model_type": "llama", "attn_implementation": KERNEL},
        {"model_type": "llama", "attribute_map": {"a": "_attn_implementation"}, "a": KERNEL},
        {"model_type": "qwen3_moe", "experts_implementation": KERNEL},
    ],
)
def test_kernels_are_refused_wherever_a_config_names_them(config: dict[str, Any], tmp_path: Path) -> None:
    root = directory(tmp_path, config)
    with watched(root) as seen, pytest.raises(ModelError, match=KERNEL):
        read_config(root)
    assert seen == []


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize(
    ("model_type", "part", "part_type"), [("llava", "text_config", "llama"), ("upernet", "backbone_config", "swin")]
)
def test_no_part_of_a_config_keeps_a_kernel(
    name: str, model_type: str, part: str, part_type: str, tmp_path: Path
) -> None:
    root = directory(tmp_path, {"model_type": model_type, part: {"model_type": part_type, name: KERNEL}})
    try:
        assert KERNEL not in str(vars(getattr(read_config(root), part)))
    except ModelError as error:
        assert KERNEL in str(error)


def test_parts_that_a_class_does_not_count_are_looked_at() -> None:
    from transformers import LlamaConfig

    outer, inner = LlamaConfig(attn_implementation="eager"), LlamaConfig(attn_implementation="eager")
    outer.__dict__["parts"] = [{"inner": inner}]
    require_plain_attention(outer, Path("a"))
    inner._attn_implementation = KERNEL
    with pytest.raises(ModelError, match=KERNEL):
        require_plain_attention(outer, Path("a"))


@pytest.mark.parametrize(
    "name",
    [
        "AutoModel",
        "LlamaForCausalLM",
        "Trainer",
        "ProcessorMixin",
        "RagTokenizer",
        "BertJapaneseTokenizer",
        "VitsTokenizer",
    ],
)
@pytest.mark.parametrize("is_in_config", [False, True])
def test_only_tokenizers_are_loaded_as_tokenizers(name: str, is_in_config: bool, tmp_path: Path) -> None:
    entry = {"tokenizer_class": name}
    root = directory(
        tmp_path, {"model_type": "llama", **(entry if is_in_config else {})}, {} if is_in_config else entry
    )
    with pytest.raises(DataError, match=name):
        load_tokenizer(root)
    with watched(root) as seen, pytest.raises(DataError, match=name):  # once more, with all libraries imported
        load_tokenizer(root)
    assert seen == []


@pytest.mark.parametrize(
    "name",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "TokenizersBackendFast", "LlamaTokenizerFast", "QWenTokenizer"],
)
def test_ordinary_tokenizers_load(name: str, tmp_path: Path) -> None:
    assert load_tokenizer(directory(tmp_path, {"model_type": "llama"}, {"tokenizer_class": name}))


def test_code_of_a_tokenizer_is_not_executed(tmp_path: Path) -> None:
    entry = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    root = directory(tmp_path, {"model_type": "llama"}, entry)
    (root / "evil.py").write_text("raise SystemExit('it was executed')")
    with watched(root) as seen, pytest.raises(DataError, match="custom code"):
        load_tokenizer(root)
    assert seen == []
