"""Every attack of the collection is refused, with its reason, before anything of it is executed."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtime
from runtime.chain import check
from runtime.errors import ArtifactError
from tests.attacks.attack import OWNED, Attack, watched
from tests.attacks.directories import DIRECTORIES
from tests.attacks.experts import ATTACKS as EXPERTS
from tests.attacks.experts import experts
from tests.attacks.programs import PROGRAMS
from tests.attacks.tables import TABLES

ATTACKS = [*PROGRAMS, *TABLES, *DIRECTORIES, *EXPERTS]


@pytest.fixture(scope="session", autouse=True)
def _libraries() -> None:
    """What the check needs is imported before anything is watched."""
    import torch

    import runtime.chain
    import runtime.language.program

    assert torch.ops.aten.neg.default and runtime.chain and runtime.language.program


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "artifact"
    attack.make(root)
    with watched(root) as seen:
        with pytest.raises(ArtifactError) as first:
            check(root)
        with pytest.raises(ArtifactError) as second:
            runtime.load(root, allow_version_skew=True, trust_remote_code=True)
    assert attack.reason, "an attack states why it is refused"
    assert attack.reason in str(first.value)
    assert str(second.value) == str(first.value)
    assert seen == []
    assert not (tmp_path / OWNED).exists()
    assert len(str(first.value)) < 2000


def test_the_mixture_that_attacks_change_is_accepted(tmp_path: Path) -> None:
    experts("", "").make(tmp_path / "artifact")
    assert check(tmp_path / "artifact")[0].mixtures


def test_there_are_enough_of_them() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names)) >= 200


def test_the_watch_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with watched(tmp_path) as seen:
        exec(compile("import os; os.system('true'); open('owned', 'w').close()", str(tmp_path / "a.py"), "exec"))
    assert [event.split()[0] for event in seen] == ["executed", "os.system", "wrote"]
