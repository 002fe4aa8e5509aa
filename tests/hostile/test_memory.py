"""A guest reaches its RAM and its devices, and nothing else of the host."""

from __future__ import annotations

import ctypes
import os
import random
import struct

import pytest

from engine.harness import HIGH, LARGE, NX, TABLES, P, U, W
from hostile.support import (
    DONE,
    M64,
    MMIO,
    PAGE,
    HostileGuest,
    canaries,
    code,
    guards,
    host_addresses,
)
from ringfence.cpu import state
from ringfence.memory.mmu import TLB_ENTRIES

AT = 0x4000_0000
ROUNDS = int(os.environ.get("RINGFENCE_TEST_ROUNDS", "1"))
GP, PF, SS = state.GP, state.PF, state.SS_FAULT
LOADS = ("mov rax, [rdi]", "mov al, [rdi]", "movups xmm0, [rdi]", "add rax, [rdi + rcx*8]")
STORES = (
    "mov [rdi], rax",
    "mov byte ptr [rdi], 0x5a",
    "movups [rdi], xmm0",
    "lock xadd [rdi], rax",
    "push qword ptr [rdi]",
    "fxsave [rdi]",
    "vmovups [rdi], ymm0",
    "bts qword ptr [rdi], rcx",
    "mov rsi, rdi; movsb",
    "mov ecx, 8; rep stosb",
    "mov ecx, 8; mov rsi, rdi; std; rep movsq; cld",
    "cmpxchg8b [rdi]",
)


@pytest.fixture(autouse=True)
def _unharmed(guest: HostileGuest) -> None:
    """The guard pages are there before (and by the next test's set-up, after) each test."""
    assert guards(guest) == ["---p", "---p"]


@pytest.mark.parametrize("cpl", [0, 3])
def test_host_addresses(guest: HostileGuest, cpl: int) -> None:
    """Every kind of access at addresses where the host has something."""
    source = random.Random(1)
    with canaries() as places:
        targets = [*host_addresses(guest).values(), *places]
        for instruction in (*LOADS, *STORES):
            for target in source.sample(targets, 6):
                guest.reset()
                page = guest.page()
                guest.put(page, code(f"{instruction}\nnop\nud2"))
                guest.map(AT, page, P | U)
                guest.map(AT + PAGE, guest.page(), P | W | U)
                end = guest.go(AT, cpl, rdi=target, rsp=AT + PAGE + 0x800)
                assert end.trap == PF, (instruction, hex(target), end)
                assert end.cr2 & ~0xFFF in (target & ~0xFFF, (target + 63) & ~0xFFF), instruction


def empty_tags() -> list[int]:
    """What the tags of empty entries look like, and addresses that differ from them by little."""
    found = []
    for index in range(0, TLB_ENTRIES, 7):
        never = (index ^ 1) << 12
        found += [never, never | 0xFF8, never ^ 1 << 63, never ^ 1 << 47, ~never & M64]
    return found


def test_no_address_matches_an_empty_entry(guest: HostileGuest) -> None:
    """Sweep of the address space: low, high, non-canonical, every single bit, empty tags."""
    source = random.Random(2)
    wild = [1 << n for n in range(64)] + [M64 ^ 1 << n for n in range(64)] + empty_tags()
    wild += [source.getrandbits(64) for _ in range(200 * ROUNDS)]
    wild += [source.getrandbits(10) << 12 | source.getrandbits(64) & ~0x3FFFFF for _ in range(200)]
    wild += [0x7FFF_FFFF_FFF8 + n for n in range(16)] + [M64 - n for n in range(16)]
    load, store = guest.page(), guest.page()
    guest.put(load, code("mov rax, [rdi]; ud2"))
    guest.put(store, code("mov [rdi], rax; ud2"))
    guest.map(AT, load, P | U)
    guest.map(AT + PAGE, store, P | U)
    mapped = [(AT, 2 * PAGE), (0x6000_0000, 0x800_0000), (0x3456_6000_0000, 0x8000)]
    mapped += [(HIGH, guest.memory.size)]
    for address in wild:
        if any(base - 8 < address < base + size for base, size in mapped):
            continue
        for rip in (AT, AT + PAGE):
            for cpl in (0, 3):
                end = guest.go(rip, cpl, rdi=address, rax=0x5A5A)
                canonical = (address + 7 + (1 << 47) & M64) >> 48 == 0
                canonical = canonical and (address + (1 << 47) & M64) >> 48 == 0
                if canonical:
                    assert end.trap == PF, hex(address)
                else:
                    assert end.trap in (GP, PF), hex(address)


@pytest.mark.parametrize("beyond", ["mmio", "end of ram", "nothing", "hole", "read-only"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_accesses_across_the_edge_of_ram(guest: HostileGuest, beyond: str, cpl: int) -> None:
    """The first page is RAM's last one; accesses of every size step over its end."""
    last = guest.memory.size - PAGE
    other = {
        "mmio": MMIO | P | W | U,
        "end of ram": guest.memory.size | P | W | U,
        "nothing": 0,
        "hole": 0xF_FFFF_F000 | P | W | U,
        "read-only": guest.page() | P | U,
    }[beyond]
    with canaries():
        for instruction in (*LOADS, *STORES):
            for back in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 64, 511):
                guest.map(AT + PAGE, last, P | W | U | NX)
                guest.map(AT + 2 * PAGE, other & ~0xFFF, other & 0xFFF)
                guest.map(AT, last - 2 * PAGE, P | U)
                guest.map(AT + 3 * PAGE, last - 3 * PAGE, P | W | U)
                guest.put(last - 2 * PAGE, code(f"{instruction}\nout 0xf4, al\nud2"))
                guest.forget()
                place = AT + 2 * PAGE - back & ~(15 if "fxsave" in instruction else 0)
                end = guest.go(AT, cpl, rdi=place, rsp=AT + 4 * PAGE - 64, rcx=0)
                assert end.trap in (-1, GP, PF), (instruction, back)


@pytest.mark.parametrize("name", ["movs", "stos", "lods", "scas", "cmps"])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("size", "bwdq")
def test_string_instructions_leave_ram(
    guest: HostileGuest, name: str, down: bool, size: str
) -> None:
    """From RAM into a device, over the end of RAM, into nothing, and around 2^64."""
    bytes_ = {"b": 1, "w": 2, "d": 4, "q": 8}[size]
    top = M64 - PAGE + 1
    low = guest.page(2)
    last = guest.memory.size - PAGE
    for address, physical in (
        (AT, last - PAGE),
        (AT + PAGE, last),
        (AT + 2 * PAGE, last + PAGE),
        (AT + 3 * PAGE, MMIO),
        (AT + 4 * PAGE, low),
        (top, low),
        (0, low + PAGE),
    ):
        guest.map(address, physical, P | W)
    with canaries():
        for start in (AT + 2 * PAGE, AT + 3 * PAGE, AT + 4 * PAGE, top, 0, AT + 5 * PAGE):
            for other in (AT + 0x100, start + 3 & M64, AT + 3 * PAGE):
                direction = "std" if down else "cld"
                body = f"{direction}; mov ecx, 40; repe {name}{size}; cld; {DONE}"
                if name in ("movs", "stos", "lods"):
                    body = body.replace("repe", "rep")
                end = guest.kernel(
                    body, rdi=start - 5 * bytes_ - 1, rsi=other + (4000 if down else 0)
                )
                assert end.trap in (-1, PF, GP)
                guest.forget()


def test_page_tables_point_anywhere(guest: HostileGuest) -> None:
    """Entries of every level with random content: beyond RAM, devices, themselves, reserved."""
    source = random.Random(3)
    size = guest.memory.size
    table = guest.page()
    root = guest.page()
    guest.memory.write(root, guest.memory.read(TABLES, PAGE))
    places = [
        size, size - PAGE, MMIO, 0xFEE0_0000, 0xF_FFFF_F000, 0xF_FFFF_FFFF_F000, table, root,
        0xFFFF_F000, 1 << 32, 0,
    ]  # fmt: skip
    run = guest.page()
    guest.put(run, code("mov rax, [rdi]; mov [rdi], rax; mov rsi, rdi; movsq; jmp rdi"))
    frames = [guest.page() for _ in range(3)]
    with canaries():
        for _ in range(300 * ROUNDS):
            chain = [table, *frames]
            slots = [source.randrange(512) for _ in range(4)]
            slots[0] = source.choice([1, 2, 255, 256])
            depth = source.randrange(4)
            guest.memory.write(root + 8 * slots[0], struct.pack("<Q", chain[0] | P | W | U))
            for level in range(1, 4):
                target = chain[level] | P | W | U
                if level == depth or level == 3:
                    target = source.choice(places) | P | W | U
                    target |= source.choice([0, 0, LARGE, 1 << 51, 1 << 40, NX, 1 << 12])
                at = chain[level - 1] + 8 * slots[level]
                guest.memory.write(at, struct.pack("<Q", target))
            address = sum(slot << 12 + 9 * (3 - n) for n, slot in enumerate(slots))
            address |= source.choice([0, 8, 0xFF8, 0xFFC])
            if slots[0] & 256:
                address |= 0xFFFF << 48
            end = guest.go(HIGH + run, rdi=address, cr3=root)
            assert end.trap != -1
            for n in range(3):
                guest.memory.write(chain[n], bytes(PAGE))


@pytest.mark.parametrize("back", [64, 128, 512, 576, 832, 896])
@pytest.mark.parametrize("name", ["xsave", "xrstor", "fxsave", "fxrstor", "cmpxchg16b"])
def test_wide_operands_at_the_edge(guest: HostileGuest, name: str, back: int) -> None:
    """State areas that end in RAM's last byte, behind it, in a device."""
    last = guest.memory.size - PAGE
    guest.memory.write(last, bytes(PAGE))
    for behind in (guest.memory.size, MMIO, 0):
        guest.map(AT, last, P | W)
        guest.map(AT + PAGE, behind, P | W if behind else 0)
        for shift in (0, 8, 16):
            with canaries():
                end = guest.kernel(
                    f"mov eax, 7; xor edx, edx; {name} [rdi]; {DONE}", rdi=AT + PAGE - back + shift
                )
                assert end.trap in (-1, GP, PF)
        guest.forget()


def test_state_that_the_host_would_refuse(guest: HostileGuest) -> None:
    """XRSTOR and FXRSTOR of random areas: what is accepted must not fault when it is restored."""
    source = random.Random(4)
    area = guest.page()
    guest.map(AT, area, P | W)
    text = f"mov eax, 7; xor edx, edx; xrstor [rdi]; cpuid; emms; {DONE}"
    for n in range(150 * ROUNDS):
        data = bytearray(source.randbytes(1024))
        if n % 3:
            data[512:576] = struct.pack("<Q", source.randrange(16)) + bytes(56)
        if n % 2:
            struct.pack_into("<I", data, 24, source.getrandbits(16))
        guest.memory.write(area, bytes(data))
        body = text if n % 4 else text.replace("xrstor", "fxrstor")
        end = guest.kernel(body, rdi=AT)
        assert end.trap in (-1, GP, state.MF), end
        guest.next_free = area + PAGE
        guest.forget()


@pytest.mark.parametrize("cpl", [0, 3])
def test_random_code(guest: HostileGuest, cpl: int) -> None:
    """Random bytes as code, registers full of host addresses."""
    source = random.Random(cpl)
    with canaries() as places:
        targets = [*host_addresses(guest).values(), *places]
        for _ in range(400 * ROUNDS):
            guest.reset()
            page = guest.page(2)
            guest.put(page, source.randbytes(64) + b"\x0f\x0b" * 8)
            guest.map(AT, page, P | W | U)
            guest.map(AT + PAGE, page + PAGE, P | W | U)
            registers = {
                name: source.choice(targets) + source.choice([0, 0, 8, -8, 0x7F, -0x80])
                for name in state.GPR_NAMES
            }
            registers["rsp"] = source.choice([AT + PAGE + 0x800, source.choice(targets)])
            guest.begin(AT, cpl, **registers)
            guest.limited(0.05)
            saved = ctypes.string_at(guest.memory.host_base, 8)
            assert len(saved) == 8


def test_non_canonical_stack(guest: HostileGuest) -> None:
    """RSP just inside and outside of the canonical range, for pushes, calls and frames."""
    for rsp in (0x8000_0000_0000, 0x8000_0000_0008, 0xFFFF_8000_0000_0000, 7, 0, 0x7FFF << 48):
        for source in ("push rax", "pop rax", "call 1f; 1: nop", "ret", "leave",
                       "iretq", "pushfq", "enter 8, 3"):  # fmt: skip
            end = guest.kernel(f"{source}; {DONE}", rsp=rsp, rbp=rsp)
            assert end.trap in (SS, PF, GP, state.DF), (hex(rsp), source, end)
            guest.reset()
