"""The shape of a sample: how many sequences, of which length."""

from __future__ import annotations

from dataclasses import dataclass

# Sizes that no model has, so that a size of the data is never taken for one of the model's own.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_SHORTER = 3, 37, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """How a made-up sample shall look.

    Attributes:
        batch: rows of text.
        sequence: tokens of a row, besides those that stand for images and sounds.
        padding: `left`, `right` or nothing; row i of the first three is padded by three tokens less i.
        images: how many images (or sounds) each row has, where a model takes them by row.
        scale: which of the sizes that the model allows for images and sounds; 0 is the smallest, and where it allows
            one only, all are the same.
        seed: of token ids, pixels and the like.
    """

    batch: int = SAMPLE_BATCH
    sequence: int = SAMPLE_SEQUENCE
    padding: str = ""
    images: int = 1
    scale: int = 0
    seed: int = 0


# What steps that need values are rehearsed on: the sample, and others whose sizes differ from it and among each other.
REHEARSAL_SHAPES = (
    SampleShape(images=2),  # an axis of one would be burnt in
    SampleShape(batch=SAMPLE_BATCH + 2, sequence=SAMPLE_SEQUENCE + 10, images=3, scale=1, seed=1),
    SampleShape(batch=SAMPLE_BATCH - 1, sequence=SAMPLE_SEQUENCE + 4, scale=2, seed=2),
)
