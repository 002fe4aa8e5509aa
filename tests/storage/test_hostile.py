"""Images that somebody has made to hurt, and processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ringfence
from ringfence.errors import RingfenceError
from ringfence.storage.options import open_disk, parse_disk
from ringfence.storage.qcow2 import Qcow2Disk
from storage.conftest import Make

SIZE = 4 << 20


def attempt(path: Path) -> None:
    """Use an image in every way; only errors of ours may come of it."""
    for options in ("", ",readonly"):
        try:
            disk = open_disk(parse_disk(f"{path}{options}"))
        except RingfenceError:
            continue
        actions: list[Callable[[], object]] = [
            lambda: disk.read_bytes(0, min(disk.size, 1 << 20)),  # noqa: B023
            lambda: disk.read_bytes(disk.size - 512, 512),  # noqa: B023
        ]
        if not options:
            data = memoryview(bytearray(70000 // 512 * 512))
            actions += [
                lambda: disk.write(512, [data]),  # noqa: B023
                lambda: disk.write_zeroes(0, 65536),  # noqa: B023
                lambda: disk.discard(65536, 65536),  # noqa: B023
                disk.flush,
            ]
        for action in actions:
            try:
                action()
            except (RingfenceError, OSError):
                continue
        try:
            disk.close()
        except (RingfenceError, OSError):
            continue


@pytest.mark.parametrize("seed", range(4))
def test_damaged_images(make: Make, qemu_img: Callable[..., str], seed: int) -> None:
    """Bits flipped and words forged in header and tables."""
    base = make("base.qcow2", SIZE)
    path = make("disk.qcow2", SIZE, "-b", base.name, "-F", "qcow2", "-o", "cluster_size=4k")
    with_data = open_disk(parse_disk(path))
    with_data.write(0, [memoryview(bytearray(b"x" * 300000))[: 300000 // 512 * 512]])
    with_data.close()
    qemu_img("snapshot", "-c", "s", path)
    good = path.read_bytes()
    chance = random.Random(seed)
    interesting = (0, 1, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) + 0x1000, 0x1000, 1 << 60)
    for _ in range(120):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            table = chance.choice((0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000))
            at = table + chance.choice((chance.randrange(112), chance.randrange(4000)))
            if chance.random() < 0.5:
                data[at] ^= 1 << chance.randrange(8)
            else:
                size = chance.choice((4, 8))
                value = chance.choice(interesting) & (1 << 8 * size) - 1
                data[at : at + size] = value.to_bytes(size, "big")
        path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        attempt(path)


def test_tables_are_never_data(make: Make) -> None:
    """An L2 entry that points to the header must not let the guest write there."""
    path = make("disk.qcow2", SIZE)
    disk = open_disk(parse_disk(path))
    disk.write(0, [memoryview(bytearray(512))])
    disk.close()
    raw = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", raw, 40)
    (l2,) = struct.unpack_from(">Q", raw, l1)
    header, reftable = 0, struct.unpack_from(">Q", raw, 48)[0]
    for target in (reftable, l1, l2 & (1 << 56) - 1):
        struct.pack_into(">Q", raw, l2 & (1 << 56) - 1, 1 << 63 | target)
        path.write_bytes(raw)
        disk = open_disk(parse_disk(path))
        with pytest.raises(RingfenceError):
            disk.write(0, [memoryview(bytearray(b"y" * 512))])
        disk.close()
    assert path.read_bytes()[header : header + 4] == b"QFI\xfb"


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.raw", "link"])
def test_backing_files_stay_in_the_folder(make: Make, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "outside.raw").write_bytes(b"secret" * 1000)
    (folder / "link").symlink_to(tmp_path / "outside.raw")
    path = make("images/disk.qcow2", SIZE, "-b", name, "-F", "raw")
    with pytest.raises(RingfenceError, match="another folder"):
        open_disk(parse_disk(path))
    disk = open_disk(parse_disk(f"{path},backing"))
    assert disk.read_bytes(0, 512).strip(b"\0")
    disk.close()


def test_circle_of_backing_files(make: Make, qemu_img: Callable[..., str]) -> None:
    path = make("disk.qcow2", SIZE)
    qemu_img("rebase", "-u", "-b", path.name, "-F", "qcow2", path)
    with pytest.raises(RingfenceError):
        Qcow2Disk(path, read_only=True)


def test_backing_file_without_format(make: Make) -> None:
    base = make("base.qcow2", SIZE)
    path = make("disk.qcow2", SIZE, "-b", base.name, "-F", "qcow2")
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack(">I", 0xE2792ACA))
    raw[at : at + 4] = b"\0\0\0\1"
    path.write_bytes(raw)
    with pytest.raises(RingfenceError, match="format"):
        open_disk(parse_disk(path))


WRITER = """
import random, sys
from ringfence.storage.options import open_disk, parse_disk

disk = open_disk(parse_disk(sys.argv[1]))
chance = random.Random(1)
number = 0
while True:
    number += 1
    for _ in range(4):
        at = chance.randrange(0, disk.size // 4096) * 4096
        block = (b"%08d %08d " % (number, at)).ljust(4096, b".")
        disk.write(at, [memoryview(bytearray(block))])
        print(at, number)
    disk.flush()
    print("flushed", number, flush=True)
"""


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
@pytest.mark.parametrize("rounds", [3, 40])
def test_what_was_flushed_survives_a_kill(
    make: Make, qemu_img: Callable[..., str], tmp_path: Path, name: str, rounds: int
) -> None:
    """A writer says what it has flushed and is killed in the midst of more."""
    path = tmp_path / name
    if name.endswith("raw"):
        path.write_bytes(bytes(SIZE))
    else:
        make(name, SIZE)
    program = [sys.executable, "-c", WRITER, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(ringfence.__file__).parents[1])}
    expected: dict[int, int] = {}
    pending: dict[int, int] = {}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            first, second = line.split()
            if first != "flushed":
                pending[int(first)] = int(second)
                continue
            expected |= pending
            pending = {}
            if int(second) >= rounds:
                break
        child.send_signal(signal.SIGKILL)
    disk = open_disk(parse_disk(path))
    for at, number in expected.items():
        found = disk.read_bytes(at, 4096)
        if found[:8] != b"%08d" % number:
            # Only what was written behind the last line we have read may have replaced it.
            assert int(found[:8]) > rounds, at
            assert found[9:17] == b"%08d" % at
    disk.close()
    if name.endswith("qcow2"):
        qemu_img("check", "-q", "-r", "leaks", path)
        assert "No errors" in qemu_img("check", path)
