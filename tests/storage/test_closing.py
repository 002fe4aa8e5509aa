"""Disks that can't be opened or closed as they should: an error says so, nothing stays open."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ringfence.errors import HostError
from ringfence.memory.buffers import Buffers
from ringfence.storage import Storage
from ringfence.storage.options import DiskOptions, open_disk

DATA: Buffers = [memoryview(bytes(512))]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 1 MiB."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def full(*arguments: Any, **more: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_free(path: Path) -> bool:
    """Whether nobody has it open for writing."""
    open_disk(DiskOptions(path, "raw")).close()
    return True


def test_all_disks_are_closed_where_one_cannot_be_flushed(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = image.with_name("other.img")
    other.write_bytes(image.read_bytes())
    storage = Storage([DiskOptions(image, "raw"), DiskOptions(other, "raw")])
    for disk in storage.disks:
        disk.write(0, DATA)
    with monkeypatch.context() as patched, pytest.raises(HostError) as caught:
        patched.setattr(os, "fdatasync", full)
        storage.close()
    assert str(image) in str(caught.value) and str(other) in str(caught.value)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    assert is_free(image) and is_free(other)
    storage.close()


@pytest.mark.parametrize(("module", "name"), [(tempfile, "mkstemp"), (os, "ftruncate")])
def test_no_room_for_what_is_thrown_away(
    module: Any, name: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(HostError, match="TMPDIR"):
        patched.setattr(module, name, full)
        open_disk(DiskOptions(image, "raw", snapshot=True))
    assert is_free(image)
