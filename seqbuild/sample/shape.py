"""The shape of a sample: number and length of sequences, images and sounds."""

from __future__ import annotations

from dataclasses import dataclass

# The hint of errors about samples that cannot be generated.
PASS_SAMPLE = "pass a file with the model's inputs with --sample"

# Sizes that no model uses, so that a size of the data cannot be mistaken for one of the model.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_SHORTER = 3, 37, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """Shape of a generated sample.

    Attributes:
        batch: rows of text.
        sequence: tokens of a row, besides placeholders of images and sounds.
        padding: `left`, `right` or nothing; row i of the first three is padded by three tokens less i.
        images: images (or sounds) in each row, for models that take them by row.
        scale: index of the sizes that the model supports for images and sounds; 0 is the smallest. If it supports only
            one, all are the same.
        seed: of token ids, pixels and other random values.
    """

    batch: int = SAMPLE_BATCH
    sequence: int = SAMPLE_SEQUENCE
    padding: str = ""
    images: int = 1
    scale: int = 0
    seed: int = 0


# Shapes for rehearsing steps that need values: the sample, and others with different sizes.
REHEARSAL_SHAPES = (
    SampleShape(images=2),  # an axis of size one would become a constant
    SampleShape(batch=SAMPLE_BATCH + 2, sequence=SAMPLE_SEQUENCE + 10, images=3, scale=1, seed=1),
    SampleShape(batch=SAMPLE_BATCH - 1, sequence=SAMPLE_SEQUENCE + 4, scale=2, seed=2),
)
