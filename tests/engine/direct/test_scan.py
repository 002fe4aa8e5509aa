"""Where instructions begin, and which pages have critical ones."""

from __future__ import annotations

import contextlib
import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import iced_x86
import pytest

from ringfence.engine.direct import lengths, scan
from ringfence.native.compiler import compile_image
from ringfence.native.library import Library

PAGE = 4096
Function = Callable[..., int]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(
        compile_image([lengths.shape, scan.is_harmless, scan.defuse], "", optimize=False)
    )


@pytest.fixture(scope="module")
def shape(library: Library) -> Callable[[bytes], tuple[int, int]]:
    """Length of an instruction and offset of its opcode."""
    function = library.function("shape", 1)
    room = ctypes.create_string_buffer(64)

    def call(code: bytes) -> tuple[int, int]:
        room.raw = code.ljust(64, b"\x90")
        found = function(ctypes.addressof(room))
        return found & 0xFF, found >> 8

    return call


def random_instructions(count: int) -> Iterator[bytes]:
    """Random bytes, most of them with one of the prefixes or escapes that decide lengths."""
    source = random.Random(20)
    starts = [
        b"",
        b"\x66",
        b"\x48",
        b"\x0f",
        b"\x66\x0f",
        b"\xf3\x48\x0f",
        b"\x0f\x38",
        b"\x0f\x3a",
    ]
    starts += [b"\xc5", b"\xc4", b"\x62", b"\x67", b"\x66\x41", b"\xf2", b"\x64"]
    for _ in range(count):
        yield source.choice(starts) + source.randbytes(15)


def test_lengths_are_those_of_a_decoder(shape: Callable[[bytes], tuple[int, int]]) -> None:
    """Whatever iced-x86 takes for an instruction, but for moves of control and debug registers."""
    wrong = []
    for code in random_instructions(60_000):
        found = iced_x86.Decoder(64, code[:15]).decode()
        if found.is_invalid or found.is_privileged:
            continue
        if shape(code)[0] != found.len:
            wrong.append((code[: found.len].hex(), found.len, shape(code)[0], str(found)))
    assert not wrong


@pytest.mark.parametrize(
    ("code", "opcode"),
    [("0fa2", 0), ("660fa2", 1), ("f3480fc7f8", 2), ("c5f877", 2), ("c4e27918c0", 3)],
)
def test_where_the_opcode_is(
    code: str, opcode: int, shape: Callable[[bytes], tuple[int, int]]
) -> None:
    assert shape(bytes.fromhex(code)) == (len(code) // 2, opcode)


CRITICAL = {
    "cpuid": "0fa2",
    "xgetbv": "0f01d0",
    "vmcall": "0f01c1",
    "vmmcall": "0f01d9",
    "rdpkru": "0f01ee",
    "wrpkru": "0f01ef",
    "rdpru": "0f01fd",
    "rdpid": "f30fc7f8",
    "rdpid of a REX register": "f3410fc7f8",
    "lsl": "0f03c1",
    "sysenter": "0f34",
}
HARMLESS = {
    "mov eax, imm": "b80fa20000",
    "jz far away": "0f840fa20000",
    "lea": "488d050fa20000",
    "rdseed": "0fc7f8",
    "rdrand": "480fc7f0",
    "xend": "0f01d5",
    "syscall": "0f05",
    "cmpxchg16b": "480fc70f",
}
BEFORE = bytes.fromhex(
    "5548 89e5 4883ec10 c745fc00000000 8b45fc 83c001 8945fc c3 0f1f4000".replace(" ", "")
)


@pytest.fixture(scope="module")
def harmless(library: Library) -> Callable[[bytes, bytes | None], bool]:
    """What the scan says of a page, and of the one behind it."""
    function = library.function("is_harmless", 4)
    room = ctypes.create_string_buffer(scan.SCAN_BYTES)
    pages = ctypes.create_string_buffer(2 * PAGE)

    def call(page: bytes, behind: bytes | None) -> bool:
        pages.raw = page + (behind or bytes(PAGE))
        at = ctypes.addressof(pages)
        return bool(function(at, 0, at + PAGE if behind else 0, ctypes.addressof(room)))

    return call


def page_with(code: bytes, offset: int) -> bytes:
    """A page of ordinary code with an instruction at about an offset, and how much sticks out."""
    before = (BEFORE * (offset // len(BEFORE) + 1))[: offset // len(BEFORE) * len(BEFORE)]
    before += b"\x90" * (offset - len(before))
    return before + code + BEFORE * ((2 * PAGE) // len(BEFORE))


@pytest.mark.parametrize("offset", [0, 1, 40, 2000, PAGE - 8])
@pytest.mark.parametrize("code", CRITICAL.values(), ids=CRITICAL)
def test_critical_pages(
    code: str, offset: int, harmless: Callable[[bytes, bytes | None], bool]
) -> None:
    whole = page_with(bytes.fromhex(code), offset)
    assert not harmless(whole[:PAGE], whole[PAGE : 2 * PAGE])


@pytest.mark.parametrize("offset", [40, 2000, PAGE - 8])
@pytest.mark.parametrize("code", HARMLESS.values(), ids=HARMLESS)
def test_pages_that_look_so(
    code: str, offset: int, harmless: Callable[[bytes, bytes | None], bool]
) -> None:
    """Where there is code in front that tells what the bytes are."""
    whole = page_with(bytes.fromhex(code), offset)
    assert harmless(whole[:PAGE], whole[PAGE : 2 * PAGE])


def test_the_page_behind_decides(harmless: Callable[[bytes, bytes | None], bool]) -> None:
    cut = b"\x90" * (PAGE - 1) + b"\x0f"
    assert not harmless(cut, b"\xa2".ljust(PAGE, b"\x90"))
    assert harmless(cut, b"\xaf\xc1".ljust(PAGE, b"\x90"))
    assert not harmless(cut, None)


@pytest.fixture(scope="module")
def defused(library: Library) -> Callable[[bytes], bytes | None]:
    """A page with traps in place of critical instructions; None where that is too uncertain."""
    scanned, change = library.function("is_harmless", 4), library.function("defuse", 2)
    room = ctypes.create_string_buffer(scan.SCAN_BYTES)
    pages = ctypes.create_string_buffer(3 * PAGE)

    def call(page: bytes) -> bytes | None:
        around = page_with(b"", 0)[:PAGE]
        pages.raw = around + page + around
        at, copy = ctypes.addressof(pages), ctypes.addressof(room)
        assert not scanned(at + PAGE, at, at + 2 * PAGE, copy)
        done = change(copy, at)
        return room.raw[scan.FRONT : scan.PAGE_END] if done else None

    return call


@pytest.mark.parametrize("code", CRITICAL.values(), ids=CRITICAL)
def test_traps_for_critical_instructions(
    code: str, defused: Callable[[bytes], bytes | None]
) -> None:
    """One byte for each, and no other byte."""
    instruction = bytes.fromhex(code)
    page = bytearray(page_with(b"", 0)[:PAGE])
    spot = 30 * len(BEFORE)
    again = 60 * len(BEFORE)
    page[spot:spot] = instruction
    page[again + len(instruction) : again + len(instruction)] = instruction
    del page[PAGE:]
    changed = defused(bytes(page))
    assert changed is not None
    different = [n for n in range(PAGE) if changed[n] != page[n]]
    opcode = instruction.index(0x0F)
    assert different == [spot + opcode, again + len(instruction) + opcode]
    assert all(changed[n] == scan.INVALID for n in different)


def test_data_are_left_alone(defused: Callable[[bytes], bytes | None]) -> None:
    """Tables with the bytes of a critical instruction: whoever reads them has to find them."""
    source = random.Random(3)
    tried = 0
    for _ in range(300):
        page = bytearray(source.randbytes(PAGE))
        page[2000:2002] = b"\x0f\xa2"
        with contextlib.suppress(AssertionError):  # most are seen to be no instruction at once
            assert defused(bytes(page)) is None
            tried += 1
    assert tried > 20


def test_programs_have_few_critical_pages(
    harmless: Callable[[bytes, bytes | None], bool],
) -> None:
    """And where objdump sees a CPUID, there is one."""
    tool = shutil.which("objdump")
    busybox = shutil.which("busybox")
    if tool is None or busybox is None:
        pytest.skip("no program to look at")
    lines = subprocess.run([tool, "-d", busybox], capture_output=True, text=True, check=True).stdout
    data = Path(busybox).read_bytes()
    headers = subprocess.run([tool, "-h", busybox], capture_output=True, text=True, check=True)
    text = next(line.split() for line in headers.stdout.splitlines() if " .text " in line)
    size, address, start = (int(word, 16) for word in (text[2], text[3], text[5]))
    names = ("cpuid", "xgetbv", "rdpid", "rdpkru", "wrpkru", "lsl", "sysenter", "vmcall")
    critical = {
        int(line.split(":")[0], 16) >> 12
        for line in lines.splitlines()
        if "\t" in line and line.split("\t")[-1].split(" ")[0] in names
    }
    first = address & -PAGE
    for page in range(first, (address + size) & -PAGE, PAGE):
        at = start + page - address
        if at >= 0:
            want = page >> 12 not in critical
            assert harmless(data[at : at + PAGE], data[at + PAGE : at + 2 * PAGE]) is want, hex(
                page
            )
