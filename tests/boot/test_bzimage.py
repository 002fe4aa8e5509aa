"""Kernels of every packing are unpacked; anything else is refused with a message that helps."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.boot.bzimage import flat_program, open_kernel, parse_header
from ringfence.boot.unpack import unpack
from ringfence.errors import ImageError

Maker = Callable[..., bytes]
PACKINGS = ("gzip", "xz", "lzma", "bzip2", "zstd", "lz4")


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing(packing: str, elf: Maker, bzimage: Maker, pack: Maker) -> None:
    vmlinux = elf()
    kernel = open_kernel(bzimage(pack(packing, vmlinux)))
    assert (kernel.elf, kernel.compression) == (vmlinux, packing)
    assert kernel.version == "6.1.0-test (someone) #1"
    assert kernel.header is not None
    assert kernel.header.version == 0x020F


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_vmlinux(packing: str, elf: Maker, pack: Maker) -> None:
    kernel = open_kernel(pack(packing, elf()))
    assert (kernel.elf, kernel.header, kernel.compression) == (elf(), None, packing)


def test_relocations_may_follow_the_elf(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    vmlinux = elf() + b"relocations" * 100
    assert open_kernel(bzimage(pack("zstd", vmlinux))).elf == vmlinux


def test_several_lz4_blocks(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    vmlinux = elf() + random.Random(1).randbytes(20 << 20)
    assert open_kernel(bzimage(pack("lz4", vmlinux))).elf == vmlinux


def test_bare_vmlinux_tells_its_version(elf: Maker) -> None:
    kernel = open_kernel(elf() + b"\0Linux version %s\0Linux version 6.9.1 (me) #2\n\0")
    assert (kernel.version, kernel.compression) == ("6.9.1 (me) #2", "none")


def test_zero_setup_sects_means_four(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    assert open_kernel(bzimage(pack("gzip", elf()), setup_sects=0)).elf == elf()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"boot_flag": 0}, "neither a bzImage"),
        ({"header": 0}, "HdrS"),
        ({"version": 0x0201}, "protocol 2.01"),
        ({"loadflags": 0}, "zImage"),
        ({"payload_length": 0}, "no payload"),
        ({"payload_length": 1 << 30}, "cut off"),
        ({"payload_offset": 0xFFFFFFFF}, "cut off"),
        ({"payload_offset": 0x90}, "no known compression"),
    ],
)
def test_bad_header(
    changes: dict[str, int], says: str, elf: Maker, bzimage: Maker, pack: Maker
) -> None:
    with pytest.raises(ImageError, match=says):
        open_kernel(bzimage(pack("gzip", elf()), **changes))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"x", "only 1 bytes"),
        (bytes(1 << 16), "neither"),
        (b"070701" + bytes(1000), "cpio"),
        (b"!<arch>\n" + bytes(1000), "Debian package"),
        (b"QFI\xfb" + bytes(1000), "qcow2"),
        (b"#!/bin/sh\n", "script"),
        (b"\x7fELF", "no ELF|vmlinux"),
        (b"\x89LZO\x00\x0d\x0a\x1a\x0a" + bytes(100), "LZO"),
    ],
)
def test_not_a_kernel(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says) as caught:
        from ringfence.boot.elf import read_segments

        read_segments(open_kernel(data).elf)
    assert "\n" not in str(caught.value)


def test_gzipped_initrd_given_as_kernel(pack: Maker) -> None:
    with pytest.raises(ImageError, match="is it the initrd"):
        open_kernel(pack("gzip", b"070701" + bytes(100)))


def test_payload_that_is_no_elf(bzimage: Maker, pack: Maker) -> None:
    with pytest.raises(ImageError, match="expected an ELF file"):
        open_kernel(bzimage(pack("xz", b"MZ" + bytes(100))))


def test_truncated_anywhere_in_the_header(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    image = bzimage(pack("gzip", elf()))
    for length in [*range(1, 0x26C), 0x400, 0xB00, len(image) - 65]:
        with pytest.raises(ImageError):
            open_kernel(image[:length])


@pytest.mark.parametrize("packing", PACKINGS)
def test_truncated_payload(packing: str, elf: Maker, pack: Maker) -> None:
    noise = elf() + random.Random(2).randbytes(1 << 16)
    packed = pack(packing, noise)
    for length in (len(packed) // 2, 40, 8, 6):
        with pytest.raises(ImageError) as caught:
            unpack(packed[:length], "kernel")
        assert "kernel" in str(caught.value)


@pytest.mark.parametrize("packing", PACKINGS)
def test_unpacking_stops_at_the_limit(packing: str, pack: Maker) -> None:
    with pytest.raises(ImageError, match="more than 1 MiB"):
        unpack(pack(packing, bytes(32 << 20)), "kernel", limit=1 << 20)


def test_random_bytes_never_surprise(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    source = random.Random(3)
    image = bzimage(pack("gzip", elf()))
    for _ in range(300):
        mangled = bytearray(image)
        for _ in range(source.randrange(1, 20)):
            mangled[source.randrange(0x1F0, len(mangled))] = source.randrange(256)
        with contextlib.suppress(ImageError):
            open_kernel(bytes(mangled))
        with pytest.raises(ImageError):
            open_kernel(source.randbytes(source.randrange(1, 5000)))


def test_header_copies_only_its_own_length(elf: Maker, bzimage: Maker, pack: Maker) -> None:
    image = bytearray(bzimage(pack("gzip", elf())))
    image[0x26C:0x290] = b"\xff" * 0x24
    image[0x1EF] = 0xFF
    header = parse_header(bytes(image))
    assert header.raw[0x26C:0x290] == bytes(0x24)
    assert header.raw[0x1EF] == 0


def test_files(tmp_path: Path, elf: Maker) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf())
    assert open_kernel(path).elf == open_kernel(str(path)).elf == elf()
    (tmp_path / "empty").touch()
    for name, says in (
        ("", "directory"),
        ("none", "does not exist"),
        ("empty", "empty"),
        ("vmlinux/x", "not exist|can't be read"),
        ("a\0b", "can't be read|not exist"),
    ):
        with pytest.raises(ImageError, match=says):
            open_kernel(tmp_path / name)
    with pytest.raises(ImageError, match="not a regular file"):
        open_kernel("/dev/null")


def test_kernels_without_a_payload_are_entered_as_they_are(
    elf: Maker, bzimage: Maker, pack: Maker
) -> None:
    packed = pack("gzip", elf())
    kernel = open_kernel(bzimage(packed, payload_offset=0, init_size=3 << 20))
    assert (kernel.elf, kernel.code_64) == (b"", True)
    program = flat_program(kernel)
    assert (program.bits, program.entry, program.base, program.end) == (
        64, 0x100200, 0x100000, 0x400000,
    )  # fmt: skip
    kernel = open_kernel(bzimage(packed), as_is=True)
    assert flat_program(kernel).bits == 32
    assert bytes(flat_program(kernel).segments[0].data) == kernel.code
    relocatable = open_kernel(bzimage(packed, relocatable=1), as_is=True)
    assert flat_program(relocatable).entry == 16 << 20
    old = open_kernel(bzimage(packed, version=0x0204))
    assert (flat_program(old).bits, flat_program(old).entry) == (32, 0x100000)


@pytest.mark.parametrize(
    "changes", [{"init_size": 0xFFFF_FFFF}, {"pref_address": 1 << 40}, {"pref_address": 0x8000}]
)
def test_bad_places(changes: dict[str, int], bzimage: Maker) -> None:
    kernel = open_kernel(bzimage(b"x", payload_offset=0, relocatable=1, **changes))
    with pytest.raises(ImageError, match="wants to be at"):
        flat_program(kernel)
