"""Bytes of the host instructions that the translator adds around copied guest instructions.

Plain functions that return machine code; SDM vol. 2 is the source of every encoding. Scratch
registers are R9 and R10 (see ``thunks`` for the whole register convention).
"""

from __future__ import annotations

import struct

from ringfence.cpu.cpuid import host_cpuid
from ringfence.cpu.state import TSC_RATIO_BITS
from ringfence.engine.translate.block import gs
from ringfence.memory.mmu import HOST_DELTA, HOST_PAGE, READ_TAG, TLB_ENTRIES, USER_ENTRY, WRITE_TAG

R9, R10, R11 = 9, 10, 11


def _i32(value: int) -> bytes:
    return struct.pack("<i", value)


def gs_load(register: int, displacement: int) -> bytes:
    """``mov r64, gs:[disp]``."""
    rex = 0x48 | (register >> 3) << 2
    return bytes((0x65, rex, 0x8B, 0x04 | (register & 7) << 3, 0x25)) + _i32(displacement)


def gs_store(register: int, displacement: int) -> bytes:
    """``mov gs:[disp], r64``."""
    rex = 0x48 | (register >> 3) << 2
    return bytes((0x65, rex, 0x89, 0x04 | (register & 7) << 3, 0x25)) + _i32(displacement)


def gs_store_imm(displacement: int, value: int) -> bytes:
    """``mov qword gs:[disp], simm32``; a 32-bit value with its top bit set takes two dwords."""
    if -(1 << 31) <= value < 1 << 31:
        return b"\x65\x48\xc7\x04\x25" + _i32(displacement) + _i32(value)
    halves = ((displacement, value & 0xFFFF_FFFF), (displacement + 4, value >> 32 & 0xFFFF_FFFF))
    return b"".join(b"\x65\xc7\x04\x25" + _i32(at) + struct.pack("<I", half) for at, half in halves)


def gs_compare_byte(displacement: int, value: int) -> bytes:
    """``cmp byte gs:[disp], imm8``."""
    return b"\x65\x80\x3c\x25" + _i32(displacement) + bytes((value,))


def gs_decrement(displacement: int) -> bytes:
    """``sub dword gs:[disp], 1``."""
    return b"\x65\x83\x2c\x25" + _i32(displacement) + b"\x01"


def gs_jump(displacement: int) -> bytes:
    """``jmp gs:[disp]``."""
    return b"\x65\xff\x24\x25" + _i32(displacement)


def gs_call(displacement: int) -> bytes:
    """``call gs:[disp]``."""
    return b"\x65\xff\x14\x25" + _i32(displacement)


def gs_load_zx16(register: int, displacement: int) -> bytes:
    """``movzx r32, word gs:[disp]``."""
    rex = 0x40 | (register >> 3) << 2
    return bytes((0x65, rex, 0x0F, 0xB7, 0x04 | (register & 7) << 3, 0x25)) + _i32(displacement)


def mov(target: int, source: int) -> bytes:
    """``mov r64, r64``."""
    return bytes(
        (0x48 | (source >> 3) << 2 | target >> 3, 0x89, 0xC0 | (source & 7) << 3 | target & 7)
    )


def mov_imm32(register: int, value: int) -> bytes:
    """``mov r32, imm32`` (zero-extends)."""
    rex = bytes((0x41,)) if register >> 3 else b""
    return rex + bytes((0xB8 | register & 7,)) + struct.pack("<I", value & 0xFFFFFFFF)


def mov_imm64(register: int, value: int) -> bytes:
    """``mov r64, imm64``."""
    return bytes((0x48 | register >> 3, 0xB8 | register & 7)) + struct.pack("<Q", value)


def lea(target: int, base: int, index: int = -1, scale: int = 1, disp: int = 0) -> bytes:
    """``lea r64, [base + index*scale + disp]``; ``base`` -1 for none, ``index`` -1 for none."""
    rex = 0x48 | (target >> 3) << 2
    reg = (target & 7) << 3
    if base < 0:
        assert index >= 0
        rex |= (index >> 3) << 1
        sib = {1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}[scale] | (index & 7) << 3 | 5
        return bytes((rex, 0x8D, 0x04 | reg, sib)) + _i32(disp)
    rex |= base >> 3
    if disp == 0 and base & 7 != 5:
        mode, tail = 0x00, b""
    elif -128 <= disp <= 127:
        mode, tail = 0x40, struct.pack("<b", disp)
    else:
        mode, tail = 0x80, _i32(disp)
    if index < 0 and base & 7 != 4:
        return bytes((rex, 0x8D, mode | reg | base & 7)) + tail
    if index < 0:
        sib = 0x20 | base & 7
    else:
        rex |= (index >> 3) << 1
        sib = {1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}[scale] | (index & 7) << 3 | base & 7
    return bytes((rex, 0x8D, mode | reg | 4, sib)) + tail


PARKED = gs("parked")


def park(spare: int = R9) -> bytes:
    """Move the status flags' values from the host's flags into the block; clobbers ``spare``.

    LAHF and SETcc, as PUSHF costs tens of cycles.
    """
    return (
        mov(spare, 0)
        + b"\x9f\x0f\x90\xc0"  # lahf; seto al
        + b"\x65\x66\x89\x04\x25" + _i32(PARKED)  # mov gs:[parked], ax
        + mov(0, spare)
    )  # fmt: skip


PARK = park()
UNPARK = (
    gs_store(0, gs("scratch", 0))
    + b"\x65\x0f\xb7\x04\x25" + _i32(PARKED)  # movzx eax, word gs:[parked]
    + b"\x04\x7f"  # add al, 0x7f: overflows exactly if OF was set
    + b"\x9e"  # sahf
    + gs_load(0, gs("scratch", 0))
)  # fmt: skip
"""Bring the parked flags back into the host's flags; all registers survive."""

TLB_SHIFT = 6
TLB_MASK = (TLB_ENTRIES - 1) << TLB_SHIFT


_HAS_BMI2 = bool(host_cpuid(7)[1] >> 8 & 1)
_PAGE_TO_R10 = (
    b"\xc4\x43\x7b\xf0\xd1" + bytes((12 - TLB_SHIFT,))  # rorx r10d, r9d, 6
    if _HAS_BMI2
    else b"\x45\x89\xca"  # mov r10d, r9d
    + b"\x41\xc1\xea" + bytes((12 - TLB_SHIFT,))  # shr r10d, 6
)  # fmt: skip
"""The bits of R9 that index the TLB, where R10 wants them; other bits come with them."""


def _tag(write: bool, user: bool) -> bytes:
    """Displacement of an entry's tag (GS points at the array)."""
    return bytes(((WRITE_TAG if write else READ_TAG) + (USER_ENTRY if user else 0),))


def _host(user: bool) -> bytes:
    """Displacement of an entry's host page."""
    return bytes((HOST_PAGE + (USER_ENTRY if user else 0),))


def tlb_check(size: int, write: bool, user: bool) -> tuple[bytes, int]:
    """Look R9 up; then R9 + R10 is the host address.

    Returns the code and the position of the 32-bit displacement of its jump to the miss stub.
    The comparison fails for a page that is absent or not permitted and for an access that leaves
    the page.
    """
    tag, host = _tag(write, user), _host(user)
    head = (
        _PAGE_TO_R10
        + b"\x41\x81\xe2" + _i32(TLB_MASK)  # and r10d, mask
        + b"\x65\x4d\x33\x4a" + tag  # xor r9, gs:[r10 + tag]
        + b"\x49\x81\xf9" + _i32(0x1000 - size)  # cmp r9, 0x1000 - size
        + b"\x0f\x87"  # ja miss
    )  # fmt: skip
    tail = b"\x65\x4d\x8b\x52" + host  # mov r10, gs:[r10 + host]
    return head + b"\0\0\0\0" + tail, len(head)


def tlb_delta(user: bool, slot: int) -> bytes:
    """Behind a look-up's comparison: R10 = host minus linear address, kept in ``gs:[slot]``."""
    delta = bytes((HOST_DELTA + (USER_ENTRY if user else 0),))
    return b"\x65\x4d\x8b\x52" + delta + gs_store(R10, slot)  # mov r10, gs:[r10 + delta]


def stack_check(size: int, user: bool) -> bytes:
    """The same look-up in the stack's one-page TLB, up to the displacement of its miss jump."""
    return (
        b"\x65\x4c\x33\x0c\x25" + _i32(gs("stack_tag", int(user)))  # xor r9, gs:[stack_tag]
        + b"\x49\x81\xf9" + _i32(0x1000 - size)  # cmp r9, 0x1000 - size
        + b"\x0f\x87\0\0\0\0"  # ja miss
    )  # fmt: skip


def stack_page(user: bool) -> bytes:
    """Behind a look-up's comparison for a write: make the page found the stack's."""
    delta = bytes((HOST_DELTA + (USER_ENTRY if user else 0),))
    return (
        b"\x65\x4d\x8b\x4a" + _tag(True, user)  # mov r9, gs:[r10 + tag]
        + gs_store(R9, gs("stack_tag", int(user)))
        + b"\x65\x4d\x8b\x52" + delta  # mov r10, gs:[r10 + delta]
        + gs_store(R10, gs("stack_delta", int(user)))
    )  # fmt: skip


def tlb_recover(write: bool, user: bool) -> bytes:
    """In a miss stub: turn R9 back into the linear address."""
    return b"\x65\x4d\x33\x4a" + _tag(write, user)


COMBINE = b"\x4f\x8d\x0c\x11"
"""``lea r9, [r9 + r10]``."""
LOAD_R9 = b"\x4f\x8b\x0c\x11"
"""``mov r9, [r9 + r10]``."""


def indirect_jump(user: bool) -> bytes:
    """Jump to the guest address in R9 by the jump table; leaves the flags alone."""
    table = gs("jump_user") if user else gs("jump_kernel")
    return b"\x45\x0f\xb7\xd1" + b"\x65\x42\xff\x24\xd5" + _i32(table)


def checked_jump(user: bool, lookup: int) -> bytes:
    """The same behind an access by hand, which may have changed code; clobbers the flags.

    ``lookup`` is the place in the block of the thunk that sees to that, and to breakpoints, first.
    """
    leave = gs_store(R9, gs("rip")) + gs_jump(lookup)
    return (
        b"\x65\x48\x83\x3c\x25" + _i32(gs("stale_code")) + b"\0"  # with debug_pending
        + b"\x74" + bytes((len(leave),)) + leave  # je
        + indirect_jump(user)
    )  # fmt: skip


def rdtsc(scaled: bool) -> bytes:
    """RDTSC with the guest's offset, and its ratio if that is not one; clobbers the flags."""
    scale = (
        b"\x65\x48\xf7\x24\x25" + _i32(gs("tsc_ratio"))  # mul gs:[tsc_ratio]
        + b"\x48\x0f\xac\xd0" + bytes((TSC_RATIO_BITS,))  # shrd rax, rdx, 48
    )  # fmt: skip
    return (
        b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"  # rdtsc; shl rdx, 32; or rax, rdx
        + (scale if scaled else b"")
        + b"\x65\x48\x03\x04\x25" + _i32(gs("tsc_offset"))  # add rax, gs:[tsc_offset]
        + b"\x48\x89\xc2\x48\xc1\xea\x20\x89\xc0"  # mov rdx, rax; shr rdx, 32; mov eax, eax
    )  # fmt: skip


def rdtscp(scaled: bool) -> bytes:
    """RDTSCP: waits as the host's does, and gives the guest's IA32_TSC_AUX."""
    code = rdtsc(scaled)
    assert code.startswith(b"\x0f\x31")
    return (
        b"\x0f\x01\xf9" + code[2:]
        + b"\x65\x8b\x0c\x25" + _i32(gs("tsc_aux"))  # mov ecx, gs:[tsc_aux]
    )  # fmt: skip


def swapgs() -> bytes:
    """Exchange GS base and KERNEL_GS_BASE."""
    base, kernel = gs("seg_base", 5), gs("kernel_gs_base")
    return gs_load(R9, base) + gs_load(R10, kernel) + gs_store(R10, base) + gs_store(R9, kernel)
