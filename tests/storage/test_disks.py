"""Every format against a model: a bytearray that is written in the same way."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ringfence.errors import HostError, ImageError, UsageError
from ringfence.storage import Storage
from ringfence.storage.disk import Disk
from ringfence.storage.options import DiskOptions, open_disk, parse_disk
from storage.conftest import Make

SIZE = 3 * (1 << 20) + 512
SECTOR = 512


def views(data: bytes, chance: random.Random) -> list[memoryview]:
    """Data in a few writable pieces, as a guest's request has them."""
    whole = memoryview(bytearray(data))
    cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(3))})
    return [whole[a:b] for a, b in pairwise(cuts)]


def exercise(disk: Disk, model: bytearray, seed: int, rounds: int = 250) -> None:
    """Do the same to a disk and to its model, and compare what is read."""
    chance = random.Random(seed)
    for _ in range(rounds):
        length = chance.choice(
            (SECTOR, 4096, 65536, 200 * SECTOR, SECTOR * chance.randrange(1, 99))
        )
        offset = chance.randrange(0, disk.size - SECTOR + 1, SECTOR)
        length = min(length, disk.size - offset)
        what = chance.randrange(10)
        if what < 5:
            data = chance.randbytes(length)
            if chance.random() < 0.5 or not disk.write_now(offset, views(data, chance)):
                disk.write(offset, views(data, chance))
            model[offset : offset + length] = data
        elif what < 8:
            got = views(bytes(length), chance)
            if chance.random() < 0.5 or not disk.read_now(offset, got):
                disk.read(offset, got)
            assert b"".join(got) == model[offset : offset + length]
        elif what == 8:
            disk.write_zeroes(offset, length, unmap=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        else:
            disk.discard(offset, length)
            model[offset : offset + length] = disk.read_bytes(offset, length)
            if chance.random() < 0.3:
                disk.flush()
    assert disk.read_bytes(0, disk.size) == model


def contents(seed: int, size: int = SIZE) -> bytes:
    """A disk's contents with holes in them."""
    chance = random.Random(seed)
    data = bytearray(size)
    for _ in range(10):
        at = chance.randrange(0, size - 9000)
        data[at : at + 9000] = chance.randbytes(9000)
    return bytes(data)


@pytest.mark.parametrize("direct", [False, True])
def test_raw(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(contents(1))
    disk = open_disk(DiskOptions(path, "raw", direct=direct))
    model = bytearray(contents(1))
    exercise(disk, model, 5)
    disk.close()
    assert path.read_bytes() == model


def test_overlay_leaves_the_base_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(contents(2))
    path.chmod(0o444)
    disk = open_disk(DiskOptions(path, "raw", snapshot=True))
    exercise(disk, bytearray(contents(2)), 6)
    disk.close()
    assert path.read_bytes() == contents(2)


@pytest.mark.parametrize(
    "options",
    [(), ("compat=0.10",), ("cluster_size=512",), ("cluster_size=2M",), ("lazy_refcounts=on",)],
    ids=str,
)
def test_qcow2(make: Make, qemu_img: Callable[..., str], check, options: tuple[str, ...]) -> None:
    path = make("disk.qcow2", SIZE, *(part for option in options for part in ("-o", option)))
    model = bytearray(SIZE)
    for seed in (7, 8):
        disk = open_disk(parse_disk(path))
        exercise(disk, model, seed)
        disk.close()
        check(path)
    plain = path.with_suffix(".raw")
    qemu_img("convert", "-O", "raw", path, plain)
    assert plain.read_bytes() == model


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_backing(make: Make, qemu_img: Callable[..., str], check, kind: str, compat: str) -> None:
    """An image over another, smaller one; compressed clusters in it."""
    size = 1 << 20
    plain = make("x.qcow2", 512).with_name("base.raw")
    plain.write_bytes(contents(3, size))
    base = plain
    if kind == "qcow2":
        base = plain.with_name("base.qcow2")
        qemu_img("convert", "-c", "-O", "qcow2", plain, base)
    path = make("top.qcow2", SIZE, "-b", base.name, "-F", kind, "-o", f"compat={compat}")
    before = base.read_bytes()
    model = bytearray(contents(3, size).ljust(SIZE, b"\0"))
    disk = open_disk(parse_disk(path))
    assert disk.read_bytes(0, SIZE) == model
    exercise(disk, model, 9)
    disk.close()
    check(path)
    assert base.read_bytes() == before


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_writing_over_compressed_clusters(
    make: Make, qemu_img: Callable[..., str], check, kind: str
) -> None:
    path = make("x.qcow2", 512).with_name("packed.qcow2")
    plain = path.with_name("plain.raw")
    plain.write_bytes(contents(4))
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", plain, path)
    model = bytearray(contents(4))
    disk = open_disk(parse_disk(path))
    exercise(disk, model, 10)
    disk.close()
    check(path)


def test_internal_snapshots(make: Make, qemu_img: Callable[..., str], check) -> None:
    from ringfence.storage.qcow2 import Qcow2Disk

    path = make("disk.qcow2", SIZE)
    model = bytearray(SIZE)
    disk = open_disk(parse_disk(path))
    exercise(disk, model, 11, 60)
    disk.close()
    qemu_img("snapshot", "-c", "before", path)
    old = bytes(model)
    disk = open_disk(parse_disk(path))
    exercise(disk, model, 12, 60)
    disk.close()
    check(path)
    disk = Qcow2Disk(path, snapshot="before")
    assert [each.name for each in disk.snapshots] == ["before"]
    assert disk.read_bytes(0, SIZE) == old
    disk.close()
    with pytest.raises(UsageError):
        Qcow2Disk(path, snapshot="after")
    qemu_img("snapshot", "-a", "before", path)
    check(path)


def test_refcount_table_grows(make: Make, check) -> None:
    """512-byte clusters: a table of one cluster counts 8 MiB."""
    path = make("disk.qcow2", 40 << 20, "-o", "cluster_size=512")
    disk = open_disk(parse_disk(path))
    data = memoryview(bytearray(random.Random(1).randbytes(12 << 20)))
    disk.write(0, [data])
    disk.close()
    check(path)
    disk = open_disk(parse_disk(path))
    assert disk.read_bytes(0, len(data)) == data
    disk.close()


def test_a_disk_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    first = open_disk(parse_disk(path))
    for options in ("", ",readonly"):
        with pytest.raises(HostError):
            open_disk(parse_disk(f"{path}{options}"))
    first.close()
    with_two = Storage([parse_disk(f"{path},readonly")] * 2)
    assert len(with_two.disks) == 2
    with_two.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.img", DiskOptions(Path("a.img"), "raw")),
        ("a.QCOW2,format=raw", DiskOptions(Path("a.QCOW2"), "raw")),
        ("a.qcow2,readonly,snapshot=off", DiskOptions(Path("a.qcow2"), "qcow2", read_only=True)),
        ("a,,b,serial=X 1,direct", DiskOptions(Path("a,b"), "raw", direct=True, serial="X 1")),
    ],
)
def test_options(text: str, expected: DiskOptions) -> None:
    assert parse_disk(text) == expected
    assert parse_disk(expected) is expected


@pytest.mark.parametrize(
    "text", ["", ",readonly", "a,format=vmdk", "a,serial=" + 21 * "x", "a,what", "a,readonly=maybe"]
)
def test_bad_options(text: str) -> None:
    with pytest.raises(UsageError):
        parse_disk(text)


@pytest.mark.parametrize("options", ["", ",format=qcow2", ",direct"])
def test_what_is_no_image(tmp_path: Path, options: str) -> None:
    for name, data in (("empty", b""), ("short", b"QFI\xfb\0\0\0\3")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError):
            open_disk(parse_disk(f"{path}{options}"))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ImageError):
            open_disk(parse_disk(f"{path}{options}"))
