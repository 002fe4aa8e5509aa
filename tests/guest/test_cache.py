"""The cache folder: shared by processes, damaged, left in the middle; a guest always boots.

Nothing here knows what is in the files: they are changed from the outside, and the next run has
to ignore what is wrong with them and make it anew.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from guest import support
from guest.conftest import Filled
from guest.support import BOOT, MakeInitrd, Session, boot_arguments
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

HELLO = "#!/bin/busybox sh\necho 0 > /proc/self/x 2> /dev/null\necho $((6*7)) it is\npoweroff -f\n"


def files(folder: Path) -> list[Path]:
    """The files of a cache."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def boots(image: Image, initrd: Path, folder: Path) -> None:
    """Assert that a guest boots with this cache folder."""
    ended = support.run(*boot_arguments(image.kernel, initrd, folder))
    assert ended.status == 0, ended.errors
    assert "42 it is\n" in ended.text
    assert "Traceback" not in ended.errors


def test_two_processes_fill_one_cache(filled: Filled) -> None:
    for ended in filled.runs:
        assert ended.status == 0, ended.errors
        assert ended.errors == ""
        assert "reboot: Power down" in ended.text
    names = [path.name for path in files(filled.folder)]
    assert names
    assert not [name for name in names if name.endswith(".tmp")], "temporary files were left"


def truncate(path: Path) -> None:
    """Cut a file off in the middle."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    """Leave nothing of a file."""
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Invert a bit in each page of a file."""
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2 % 4096, len(data), 4096):
        data[at] ^= 0x10
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    """Write what does not belong there behind a file's end."""
    with path.open("ab") as file:
        file.write(b"\xcc" * 5000)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_files_are_ignored(
    damage: Callable[[Path], None],
    filled: Filled,
    cloud: Image,
    with_init: MakeInitrd,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(filled.folder, folder)
    for path in files(folder):
        damage(path)
    boots(cloud, with_init(HELLO), folder)


@pytest.mark.parametrize("damage", [truncate, flip, empty, lengthen])
def test_damaged_files_are_ignored_by_a_small_guest(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    for turn in range(3):
        ended = support.run(
            *("run", "builtin", "--memory", "64M", "--cache-dir", folder, "--timeout", "60"),
            typed=b"echo one two\rpoweroff\r",
        )
        assert ended.status == 0, (turn, ended.errors)
        assert "one two\n" in ended.text
        assert ended.errors == ""
        for path in files(folder):
            damage(path)


def test_a_folder_that_can_t_be_used_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = support.run(
        *("run", "builtin", "--memory", "64M", "--cache-dir", tmp_path / "file" / "below"),
        typed=b"poweroff\r",
    )
    assert ended.status in (0, 2, 6), ended.errors
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("words", [b"Linux version", b"Run /init"])
def test_sigterm_leaves_a_cache_that_works(
    words: bytes, cloud: Image, with_init: MakeInitrd, filled: Filled, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for path in files(filled.folder):  # the engine's own code, so that only the guest's is new
        if path.name.startswith("native-"):
            shutil.copy(path, folder)
    initrd = with_init(HELLO)
    session = Session(*boot_arguments(cloud.kernel, initrd, folder))
    try:
        session.wait_for(words, BOOT)
        session.process.send_signal(signal.SIGTERM)
        ended = session.end(20)
    finally:
        session.close()
    assert ended.status == 128 + signal.SIGTERM
    assert "Traceback" not in ended.errors
    assert not [path for path in files(folder) if path.name.endswith(".tmp")]
    boots(cloud, initrd, folder)
