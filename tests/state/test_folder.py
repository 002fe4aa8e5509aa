"""Snapshots on disk: whole ones come back, damaged ones are refused, half ones don't exist."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ringfence
from ringfence.errors import HostError, ImageError, UsageError
from ringfence.memory.dirty import PAGE, Run
from ringfence.memory.ram import GuestMemory
from ringfence.state import folder, plain

SIZE = 1 << 20
STATE = {"version": 1, "word": 7}
MACHINE = {"class": "MachineConfig"}


def memory_of(pages: dict[int, bytes], rom: bytes = b"") -> GuestMemory:
    memory = GuestMemory(SIZE, rom)
    for page, text in pages.items():
        memory.write(page * PAGE, text)
    return memory


def write(
    path: Path,
    memory: GuestMemory,
    base: folder.Snapshot | None = None,
    dirty: tuple[Run, ...] = (),
) -> folder.Snapshot:
    with folder.Writer(path) as writer:
        writer.write(memory, STATE, {}, base, dirty)
        writer.publish(MACHINE)
    return folder.load(path)


@pytest.fixture
def snapshot(tmp_path: Path) -> folder.Snapshot:
    return write(tmp_path / "one", memory_of({0: b"zero", 7: b"seven", 255: b"last"}))


def test_it_comes_back(snapshot: folder.Snapshot) -> None:
    assert snapshot.state == STATE
    assert snapshot.machine == MACHINE
    snapshot.verify()
    memory = snapshot.memory()
    assert memory.read(7 * PAGE, 5) == b"seven"
    assert memory.read(255 * PAGE, 4) == b"last"
    assert memory.read(8 * PAGE, 4) == bytes(4)
    memory.close()
    assert not list(snapshot.path.parent.glob(".*"))


def test_a_rom_comes_along(tmp_path: Path) -> None:
    found = write(tmp_path / "rom", memory_of({1: b"ram"}, b"R" * PAGE))
    memory = found.memory()
    assert memory.rom is not None
    assert bytes(memory.everything()[SIZE:]) == b"R" * PAGE
    memory.close()


def test_pages_written_since_are_a_layer(tmp_path: Path, snapshot: folder.Snapshot) -> None:
    later = memory_of({0: b"ZERO", 7: bytes(5), 9: b"not told"})
    second = write(tmp_path / "two", later, snapshot, (Run(0, 1), Run(7, 1)))
    third = write(tmp_path / "sub" / "three", memory_of({9: b"nine"}), second, (Run(9, 1),))
    third.verify()
    memory = third.memory()
    assert memory.read(0, 4) == b"ZERO"
    assert memory.read(7 * PAGE, 5) == bytes(5)
    assert memory.read(9 * PAGE, 4) == b"nine"
    assert memory.read(255 * PAGE, 4) == b"last"
    memory.close()
    assert (second.path / "memory").stat().st_blocks < 64
    (snapshot.path / "manifest.json").unlink()
    with pytest.raises(ImageError, match="is no snapshot"):
        folder.load(third.path)


def test_another_parent_of_the_same_name_is_refused(
    tmp_path: Path, snapshot: folder.Snapshot
) -> None:
    write(tmp_path / "two", memory_of({}), snapshot, (Run(0, 1),))
    snapshot.path.rename(tmp_path / "away")
    write(snapshot.path, memory_of({}))
    with pytest.raises(ImageError, match="not the snapshot that"):
        folder.load(tmp_path / "two")


def test_a_manifest_with_any_byte_changed_is_refused(snapshot: folder.Snapshot) -> None:
    file = snapshot.path / "manifest.json"
    text = file.read_bytes()
    for at in range(0, len(text), 3):
        if chr(text[at]).isspace():
            continue
        file.write_bytes(text[:at] + bytes([text[at] ^ 0x11]) + text[at + 1 :])
        with pytest.raises(ImageError):
            folder.load(snapshot.path)
    for length in range(0, len(text) - 2, 37):
        file.write_bytes(text[:length])
        with pytest.raises(ImageError):
            folder.load(snapshot.path)


def reseal(snapshot: folder.Snapshot, change: dict[str, Any]) -> None:
    """Forge a manifest: change something and make its checksum right."""
    file = snapshot.path / "manifest.json"
    outer = plain.loads(file.read_bytes(), "manifest")
    outer["snapshot"]["memory"].update(change)
    outer["sha256"] = folder._checksum(outer["snapshot"])
    file.write_text(json.dumps(json.loads(plain.dumps(outer))))


@pytest.mark.parametrize(
    "change",
    [
        {"size": SIZE * 2},
        {"size": -SIZE},
        {"size": "1M"},
        {"rom": 1 << 60},
        {"runs": [[0, 1 << 40]]},
        {"runs": [[-1, 2]]},
        {"runs": [[5, 1], [4, 1]]},
        {"runs": [[0, 0]]},
        {"runs": [7]},
        {"parent": {"path": Path(), "identity": "x"}},
        {"parent": 3},
    ],
)
def test_forged_sizes_are_refused(snapshot: folder.Snapshot, change: dict[str, Any]) -> None:
    reseal(snapshot, change)
    with pytest.raises(ImageError):
        folder.load(snapshot.path)


def test_damaged_files_are_refused(snapshot: folder.Snapshot) -> None:
    state, memory = snapshot.path / "state.json", snapshot.path / "memory"
    text = state.read_bytes()
    state.write_bytes(text.replace(b"7", b"8"))
    with pytest.raises(ImageError, match="changed or damaged"):
        folder.load(snapshot.path)
    state.write_bytes(text)
    with memory.open("r+b") as file:
        file.seek(7 * PAGE)
        file.write(b"SEVEN")
    with pytest.raises(ImageError, match="changed or damaged"):
        folder.load(snapshot.path).verify()
    os.truncate(memory, SIZE - PAGE)
    with pytest.raises(ImageError, match=r"bytes, expected"):
        folder.load(snapshot.path)
    memory.unlink()
    with pytest.raises(ImageError, match="can't be read"):
        folder.load(snapshot.path)


def test_no_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match=r"No space left.*make room"):
        write(tmp_path / "full", memory_of({0: b"x"}))
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path: Path) -> None:
    memory = memory_of({0: b"x"})
    with folder.Writer(tmp_path / "same") as first:
        with pytest.raises(UsageError, match="under way"), folder.Writer(tmp_path / "same"):
            pass
        first.write(memory, STATE, {}, None, ())
        first.publish(MACHINE)
    with pytest.raises(UsageError, match="exists"), folder.Writer(tmp_path / "same"):
        pass
    folder.load(tmp_path / "same").verify()


KILLED = """
import os, signal, sys
from pathlib import Path
from ringfence.memory.ram import GuestMemory
from ringfence.state import folder
with folder.Writer(Path(sys.argv[1])) as writer:
    writer.write(GuestMemory(1 << 20), {"version": 1}, {}, None, ())
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_leaves_no_snapshot_and_is_cleaned_up_after(tmp_path: Path) -> None:
    path = tmp_path / "one"
    environment = {**os.environ, "PYTHONPATH": str(Path(ringfence.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, path], env=environment, check=False)
    assert done.returncode == -9
    assert not path.exists()
    assert [each.name for each in tmp_path.iterdir()] == [".one.partial"]
    write(path, memory_of({3: b"y"})).verify()
    assert [each.name for each in tmp_path.iterdir()] == ["one"]
