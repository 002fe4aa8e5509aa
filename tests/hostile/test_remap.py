"""Code that changes under running, linked translations: by stores, and by new mappings."""

from __future__ import annotations

import struct
import threading

import pytest

from engine.harness import CODE3, DATA3, HIGH, LARGE, G, P, U, W
from hostile.support import DONE, PAGE, HostileGuest, code

AT = 0x4000_0000
RET = b"\xc3"


def mov_eax(value: int) -> bytes:
    """``mov eax, imm32``."""
    return b"\xb8" + value.to_bytes(4, "little")


def jump(distance: int) -> bytes:
    """``jmp`` over so many bytes."""
    return b"\xe9" + struct.pack("<i", distance)


def test_store_into_the_next_instruction(guest: HostileGuest) -> None:
    """In a loop, so that the instruction is translated, linked and in the jump table."""
    end = guest.kernel(
        f"""
        mov ecx, 50
        xor ebx, ebx
        lea rdi, [rip + target + 1]
    again:
        mov [rdi], ecx
    target:
        mov eax, 0x11223344
        add rbx, rax
        dec ecx
        jnz again
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == sum(range(1, 51))


def test_store_into_own_page_before_every_jump(guest: HostileGuest) -> None:
    """The store's trace is followed by a direct jump, an indirect one, a call and a return."""
    end = guest.kernel(
        f"""
        mov ecx, 40
        xor ebx, ebx
        lea rdi, [rip + one + 1]
        lea rsi, [rip + one]
    again:
        mov [rdi], ecx
        jmp one
    one:
        mov eax, 0
        add rbx, rax
        shl eax, 1
        mov [rip + two + 1], eax
        call two
        add rbx, rax
        mov [rip + three + 1], ecx
        lea rax, [rip + three]
        jmp rax
    three:
        mov eax, 0
        add rbx, rax
        dec ecx
        jnz again
        {DONE}
    two:
        mov eax, 0
        ret
        """
    )
    assert end.trap == -1
    assert end.rbx == 4 * sum(range(1, 41))


def test_store_through_an_alias(guest: HostileGuest) -> None:
    """Code runs at many linear addresses of one page and is written at yet another one."""
    page = guest.page()
    guest.put(page, mov_eax(0) + RET)
    for n in range(32):
        guest.map(AT + n * PAGE, page, P | W)
    end = guest.kernel(
        f"""
        mov ecx, 60
        xor ebx, ebx
    again:
        mov eax, ecx
        and eax, 31
        shl eax, 12
        add eax, {AT}
        mov esi, ecx
        and esi, 7
        shl esi, 12
        add esi, {AT}
        mov [rsi + 1], ecx
        call rax
        add rbx, rax
        dec ecx
        jnz again
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == sum(range(1, 61))


def test_second_page_shared_by_two_first_pages(guest: HostileGuest) -> None:
    """Two address spaces' instructions run from pages of their own into one common page."""
    first = [guest.page(), guest.page()]
    common = guest.page()
    at = 0x4010_0000
    for n, page in enumerate(first):
        guest.put(page + PAGE - 1, mov_eax(0x1000)[:1])
        guest.put(page, bytes((n,)))
    guest.put(common, mov_eax(0x1000)[1:] + RET)
    guest.map(at, first[0], P | W)
    guest.map(at + PAGE, common, P | W)
    entry = HIGH + guest._entry(at, 1)
    end = guest.kernel(
        f"""
        xor ebx, ebx
        movabs r12, {HIGH + common}
        movabs r13, {entry}
        mov r14d, {at + PAGE - 1}
        call r14
        call r14
        mov dword ptr [r13], {first[1] | P | W}
        invlpg [{at}]
        call r14
        call r14
        mov dword ptr [r12], 7
        call r14
        mov ebx, eax
        mov dword ptr [r13], {first[0] | P | W}
        invlpg [{at}]
        call r14
        shl rax, 32
        or rbx, rax
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == 7 << 32 | 7


FLUSHES = {
    "invlpg": "invlpg [r15]",
    "cr3": "mov rax, cr3; mov cr3, rax",
    "cr4": "mov rax, cr4; btc eax, 7; mov cr4, rax; btc eax, 7; mov cr4, rax",
}


@pytest.mark.parametrize(
    ("flush", "is_global"),
    # A write to CR3 keeps global pages.
    [(flush, g) for flush in FLUSHES for g in (False, True) if not (g and flush == "cr3")],
)
@pytest.mark.parametrize("way", ["jump", "branch", "indirect", "return", "fall", "straddle"])
@pytest.mark.parametrize("user", [False, True])
def test_remapped_code(
    guest: HostileGuest, flush: str, is_global: bool, way: str, user: bool
) -> None:
    """After the flush that the manual asks for, the new page's code runs, whatever leads to it."""
    pages = [guest.page(), guest.page(), guest.page()]
    tail = f"add rbx, rax\n{'int 0x80' if user else 'ret'}\n"
    for n, page in enumerate(pages):
        body = code(f"mov eax, {1 << 8 * n}\n{tail}")
        guest.put(page, body)
        guest.put(page + 64, body)
    front = guest.page()
    bits = P | W | (U if user else 0) | (G if is_global else 0)
    guest.map(AT, front, bits)
    guest.map(AT + PAGE, pages[0], bits)
    target = AT + PAGE + 64
    ways = {
        "jump": jump(PAGE + 64 - 5),
        "branch": b"\x31\xc0\x0f\x84" + struct.pack("<i", PAGE + 64 - 8),
        "indirect": code(f"mov eax, {target}; jmp rax"),
        "return": code(f"mov eax, {target}; push rax; ret"),
        "fall": b"",
        "straddle": b"",
    }
    start = {"fall": PAGE - 1, "straddle": PAGE - 2}.get(way, 0)
    guest.put(front, ways[way])
    if way == "fall":
        guest.put(front + PAGE - 1, b"\x90")
    if way == "straddle":
        # The low byte of the constant is in the first page.
        guest.put(front + PAGE - 2, mov_eax(1)[:2])
        for n, page in enumerate(pages):
            guest.put(page, (1 << 8 * n >> 8).to_bytes(3, "little") + code(tail))
    entry = HIGH + guest._entry(AT + PAGE, 1)
    stack = guest.page(2)
    guest.map(AT - 2 * PAGE, stack, P | W | U)
    guest.map(AT - PAGE, stack + PAGE, P | W | U)
    rounds = 12
    visit = f"mov eax, {AT + start}; call rax"
    if user:
        cs, ss = CODE3, DATA3
        visit = f"""
        mov rbp, rsp
        push {ss}
        push {AT - 64}
        push 2
        push {cs}
        push {AT + start}
        iretq
        """
    # INT 0x80 from user code comes back into the loop, behind the IRETQ.
    gate_at = 0x2000 + 16 * 0x80
    saved = guest.memory.read(gate_at, 16)
    loop = f"""
        xor ebx, ebx
        mov r15d, {AT + PAGE}
        movabs r14, {entry}
        mov r13d, {rounds}
    again:
        mov r12d, 3
    inner:
        mov eax, {pages[0]}
        lea ecx, [r12 - 1]
        shl ecx, 12
        add eax, ecx
        or eax, {bits}
        mov [r14], eax
        {FLUSHES[flush]}
        mov r8d, 4
    visits:
        {visit}
        {"mov rsp, rbp" if user else ""}
        dec r8d
        jnz visits
        dec r12d
        jnz inner
        dec r13d
        jnz again
        {DONE}
        """
    data = code(loop)
    at = guest.page()
    guest.put(at, data)
    try:
        if user:
            back = HIGH + at + data.index(b"\x48\xcf") + 2
            gate = struct.pack(
                "<HHHHII", back & 0xFFFF, 8, 0xEE00, back >> 16 & 0xFFFF, back >> 32, 0
            )
            guest.memory.write(gate_at, gate)
        end = guest.go(HIGH + at)
    finally:
        guest.memory.write(gate_at, saved)
    assert end.trap == -1, end
    expected = 0x010101 if way != "straddle" else 0x010101 + 2
    assert end.rbx == 4 * rounds * expected


def test_invlpg_drops_all_of_a_large_code_page(guest: HostileGuest) -> None:
    """Code in a 2 MiB page that is only ever fetched; INVLPG names another 4 KiB of it."""
    old, new = 0xA00000, 0xC00000
    at = 0x4020_0000
    guest.put(old + 5 * PAGE, mov_eax(1) + RET)
    guest.put(new + 5 * PAGE, mov_eax(2) + RET)
    guest.map(at, old, P | W | LARGE, 2)
    entry = HIGH + guest._entry(at, 2)
    end = guest.kernel(
        f"""
        mov r12d, {at + 5 * PAGE}
        call r12
        call r12
        mov ebx, eax
        movabs rcx, {entry}
        mov dword ptr [rcx], {new | P | W | LARGE}
        invlpg [{at}]
        call r12
        shl eax, 8
        or ebx, eax
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == 0x201


def test_invlpg_drops_a_global_large_page_after_cr3(guest: HostileGuest) -> None:
    """A global 2 MiB data page in the lower half outlives MOV CR3 but not INVLPG."""
    old, new = 0xA00000, 0xC00000
    at = 0x4020_0000
    guest.memory.write(old + 0x5000, b"\x01")
    guest.memory.write(new + 0x5000, b"\x02")
    guest.map(at, old, P | W | LARGE | G, 2)
    entry = HIGH + guest._entry(at, 2)
    end = guest.kernel(
        f"""
        mov al, [{at + 0x5000}]
        movzx ebx, al
        mov rax, cr3
        mov cr3, rax
        movabs rcx, {entry}
        mov dword ptr [rcx], {new | P | W | LARGE | G}
        invlpg [{at}]
        mov al, [{at + 0x5000}]
        movzx eax, al
        shl eax, 8
        or ebx, eax
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == 0x201


def test_large_page_split(guest: HostileGuest) -> None:
    """A large page becomes 512 small ones, some elsewhere; then large again."""
    old, new = 0xA00000, 0xC00000
    at = 0x4020_0000
    table = guest.page()
    for n in range(512):
        target = new if n % 2 else old
        guest.memory.write(table + 8 * n, (target + n * PAGE | P | W).to_bytes(8, "little"))
        guest.put(old + n * PAGE, mov_eax(1) + RET)
        guest.put(new + n * PAGE, mov_eax(0x10000) + RET)
    guest.map(at, old, P | W | LARGE, 2)
    entry = HIGH + guest._entry(at, 2)
    end = guest.kernel(
        f"""
        xor ebx, ebx
        mov r15d, 3
        movabs r14, {entry}
    outer:
        mov dword ptr [r14], {old | P | W | LARGE}
        invlpg [{at + 7 * PAGE}]
        call all
        mov dword ptr [r14], {table | P | W}
        invlpg [{at + 8 * PAGE}]
        call all
        dec r15d
        jnz outer
        {DONE}
    all:
        mov r12d, {at}
        mov r13d, 512
    one:
        call r12
        add rbx, rax
        add r12, {PAGE}
        dec r13d
        jnz one
        ret
        """
    )
    assert end.trap == -1
    assert end.rbx == 3 * (512 + 256 + 256 * 0x10000)


def test_jump_linked_while_a_mapping_is_stale(guest: HostileGuest) -> None:
    """A page table entry changes without a flush; nothing of that may outlive the flush."""
    one, two = guest.page(), guest.page()
    at = 0x4030_0000
    # Each maps page RSI in its own place (no flush), then jumps inside "its" page. The code there
    # kills the flags, so that the jump needs no detour for them.
    entry = HIGH + guest._entry(at, 1)
    for page, value in ((one, 1), (two, 2)):
        guest.put(page, code("mov [r14], rsi") + jump(0x100))
        end_of_first = len(code("mov [r14], rsi")) + 5
        guest.put(page + end_of_first + 0x100, code(f"xor eax, eax; mov al, {value}; ret"))
    guest.map(at, one, P | W)
    end = guest.kernel(
        f"""
        movabs r14, {entry}
        mov r13d, {at}
        xor ebx, ebx
        mov r12d, 4
    again:
        mov esi, {two | P | W}
        call r13
        mov dword ptr [r14], {one | P | W}
        invlpg [r13]
        mov esi, {one | P | W}
        call r13
        shl rbx, 8
        or rbx, rax
        dec r12d
        jnz again
        {DONE}
        """
    )
    assert end.trap == -1
    assert end.rbx == 0x01010101


def test_devices_write_over_translated_code(guest: HostileGuest) -> None:
    """By a device's write, between two runs and under a loop that waits for it."""
    page = guest.page()
    guest.put(page, mov_eax(1) + RET)
    guest.map(AT, page, P | W)
    source = f"mov r12d, {AT}; call r12; {DONE}"
    assert guest.kernel(source).rax == 1
    guest.memory.dma_write(page, mov_eax(2) + RET)
    assert guest.kernel(source).rax == 2
    guest.memory.dma_write(page, mov_eax(0) + RET)
    later = threading.Timer(0.05, lambda: guest.memory.dma_write(page, mov_eax(7) + RET))
    later.start()
    end = guest.kernel(f"mov r12d, {AT}; again: call r12; test eax, eax; jz again; {DONE}")
    later.join()
    assert end.rax == 7


def test_stack_on_two_pages_while_flags_are_live(guest: HostileGuest) -> None:
    """Look-ups that move to where flags are dead, past one that changes the stack's page."""
    page = guest.page(2)
    for n in range(2):
        guest.map(AT + n * PAGE, page + n * PAGE, P | W)
    guest.memory.write(page + PAGE - 0x18, (1 << 63).to_bytes(8, "little"))
    guest.memory.write(page + PAGE + 0x7E0, (100).to_bytes(8, "little"))
    end = guest.kernel(
        f"""
        mov r13, rsp
        mov rsp, {AT + PAGE - 0x20}
        mov r14d, 3
    again:
        mov rbx, [rip + big]
        xor ecx, ecx
        mov rax, [rsp + 0x800]
        add rbx, [rsp + 8]
        adc rcx, [rsp + 0x800]
        dec r14d
        jnz again
        mov rsp, r13
        {DONE}
    big:
        .quad 0x8000000000000005
        """
    )
    assert end.trap == -1
    assert (end.rax, end.rbx, end.rcx) == (100, 5, 101)
