"""For every architecture of the zoo that keeps a cache: what is measured is what transformers' own cache holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import runtime
from seqbuild.build import build
from tests.runtime.small import Small
from tests.runtime.test_key_values import kept, measured, sizes
from tests.zoo import Case, cases, small_model, unusable

pytestmark = pytest.mark.wide

KEEPING = ("causal LM", "seq2seq")
# Their code keeps more than keys and values of each layer, or computes a layer several times.
UNKNOWN: dict[str, str] = {
    "causal LM/deepseek_v4": "keeps one tensor as keys and values, and compressed ones beside it",
    "causal LM/dory": "runs its layers in loops, each of which has a cache of its own",
}


@pytest.mark.parametrize("case", [case for case in cases() if case.mapping in KEEPING], ids=lambda case: case.name)
@pytest.mark.filterwarnings("default")
def test_the_cache_holds_what_is_measured(case: Case, tmp_path: Path) -> None:
    if unusable(case):
        pytest.skip(unusable(case))
    model = small_model(case, None)
    model.config.dtype = torch.float32
    model.save_pretrained(tmp_path / "model")
    try:
        made = build(tmp_path / "model", out=tmp_path / "artifacts", text_only=True)
    except runtime.SeqbuildError as error:
        pytest.skip(f"not compiled: {error}")
    if made.manifest.policy != "linear":
        pytest.skip("not traced through its layers")
    batches = [sample(made.manifest, model.config, size) for size in ((2, 9), (1, 7))]
    loaded = getattr(transformers, case.class_name).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    try:
        expected = kept(loaded, batches)
    except (AttributeError, TypeError):
        expected = []  # its output has no cache
    except IndexError:
        pytest.skip("fails in transformers with a cache")  # Blenderbot's decoder alone
    if case.name in UNKNOWN or not expected:
        assert not made.manifest.cached
        return
    small = Small(weights=tmp_path / "model", artifact=made.path)
    got = sizes(measured(small, batches))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def sample(
    manifest: runtime.artifact.manifest.Manifest, config: transformers.PretrainedConfig, size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Tokens for each input of text, masks of ones."""
    vocabulary = min(int(getattr(config.get_text_config(decoder=True), "vocab_size", 50) or 50), 50)
    generator = torch.Generator().manual_seed(size[1])
    batch = {}
    for entry in manifest.inputs:
        is_text = entry.name.endswith("input_ids")
        batch[entry.name] = (
            torch.randint(3, vocabulary, size, generator=generator) if is_text else torch.ones(size, dtype=torch.int64)
        )
    return batch
