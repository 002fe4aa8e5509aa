"""The file behind firmware's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.errors import HostError, ImageError
from ringfence.storage.nvram import Nvram

TEMPLATE = b"template" * 512


def test_made_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "vars"
    first = Nvram(path, TEMPLATE)
    first.write(8, b"changed")
    with pytest.raises(HostError, match="in use"):
        Nvram(path, TEMPLATE)
    first.close()
    second = Nvram(path, TEMPLATE)
    assert second.content[:16] == b"templatechangede"
    second.close()
    assert [each.name for each in tmp_path.iterdir()] == ["vars"]


def test_without_a_file() -> None:
    nvram = Nvram(None, TEMPLATE)
    nvram.write(0, b"T")
    assert nvram.content[:4] == b"Temp"
    nvram.close()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        Nvram(tmp_path / "vars", b"")
    (tmp_path / "vars").write_bytes(b"short")
    with pytest.raises(ImageError, match="5 bytes"):
        Nvram(tmp_path / "vars", TEMPLATE)
    with pytest.raises(HostError, match="can't be used"):
        Nvram(tmp_path / "none" / "vars", TEMPLATE)
    with pytest.raises(HostError, match="can't be used"):
        Nvram(tmp_path, TEMPLATE)


def test_full_disk(tmp_path: Path) -> None:
    nvram = Nvram(tmp_path / "vars", TEMPLATE)
    real = nvram._fd
    with Path("/dev/full").open("r+b", buffering=0) as full:
        nvram._fd = full.fileno()
        with pytest.raises(OSError, match="No space"):
            nvram.write(0, b"lost")
        nvram._fd = real
    assert nvram.content[:4] == b"temp"
    nvram.close()
