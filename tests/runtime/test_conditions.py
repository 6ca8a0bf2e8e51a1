"""Relations between sizes that an artifact states."""

from __future__ import annotations

import pytest

from runtime.artifact.size_expressions import check_condition, holds
from runtime.errors import ArtifactError

SIZES = {"batch": 4, "width": 20}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("batch * 5 == width", True),
        ("width % (batch - 1) == 0", False),
        ("max(batch, width // 2) > 9", True),
        ("width % (batch // 14) != 0", False),
        ("trunc((batch + 3) / 2) == 3", True),
        ("ceil(width / 3) == floor(width / 3) + 1", True),
        ("round(width / 8.5) == 2", True),
    ],
)
def test_a_condition_is_calculated(condition: str, expected: bool) -> None:
    check_condition(condition, SIZES)
    assert holds(condition, SIZES) is expected


@pytest.mark.parametrize(
    "condition",
    [
        "batch",
        "batch == height",
        "open('x') == 1",
        "batch ** 2 == 16",
        "1 < batch < 5",
        "trunc() == 1",
        "1e400 == batch",
    ],
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(ArtifactError, match="an invalid expression over sizes"):
        check_condition(condition, SIZES)
