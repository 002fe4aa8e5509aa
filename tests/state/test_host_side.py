"""What a machine has of its host's, on another host."""

from __future__ import annotations

from pathlib import Path

import pytest

import doubles
from ringfence.errors import UsageError
from ringfence.sharing.options import ShareOptions
from ringfence.state.receive import Allowed


def test_folders_are_named_at_the_target(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with doubles.scripted(doubles.echo, shares=[f"{here},tag=work"]) as machine:
        config = machine.config
    with pytest.raises(UsageError, match="--share FOLDER,tag=work"):
        Allowed(engine="translate").accepted(config)
    allowed = Allowed(engine="translate", shares=[f"{there},tag=work,ro", f"{here},tag=more"])
    assert allowed.accepted(config).shares == (ShareOptions(there, "work", read_only=True),)
