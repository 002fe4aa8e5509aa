"""Writing host code natively: the few encodings that depend on registers, and the templates.

The bytes of every encoding are those of ``emit``, which writes them for recipes and templates; SDM
vol. 2 is the source. Instructions are put as little-endian words, one store for most of them, so up
to eight bytes behind ``Writer.out`` may be overwritten.
"""

from __future__ import annotations

from typing import cast

from ringfence.engine.translate.block import gs
from ringfence.engine.translate.emit import R10
from ringfence.engine.translate.tables import (
    HOST,
    NONE,
    PARKED,
    RELOC_FAR,
    RELOC_VA32,
    RELOC_VA64,
    Link,
    Miss,
    Template,
    Writer,
)
from ringfence.native.dialect import (
    address_of,
    load64,
    native,
    native_inline,
    sext,
    slt,
    store8,
    store32,
    store64,
)

(
    T_PARK,
    T_PARK_R10,
    T_UNPARK,
    T_READ,
    T_READ_USER,
    T_WRITE,
    T_WRITE_USER,
    T_DELTA,
    T_DELTA_USER,
    T_STACK,
    T_STACK_USER,
    T_RECOVER,
    T_RECOVER_USER,
    T_RECOVER_WRITE,
    T_RECOVER_WRITE_USER,
    T_INDIRECT,
    T_INDIRECT_USER,
    T_CHECKED,
    T_CHECKED_USER,
    T_STACK_PAGE,
    T_STACK_PAGE_USER,
) = range(21)
"""Numbers of templates (see ``templates``)."""

CARRY = 0x10
"""CF alone, as iced-x86's ``RflagsBits``: what chains of ADC and SBB keep alive."""
_RIP = gs("rip")


@native_inline
def put(w: Writer, value: int, count: int) -> int:
    """Append ``count`` bytes, the low ones of a word."""
    store64(w.out, value)
    w.out += count
    return 0


@native_inline
def forget_held(w: Writer, register: int) -> int:
    """A register is written: R10 holds no slot's value any more."""
    if register == R10:
        w.held = 0
    return 0


@native
def copy_bytes(w: Writer, source: int, count: int) -> int:
    """Append bytes from host memory."""
    for n in range((count + 7) >> 3):
        store64(w.out + n * 8, load64(source + n * 8))
    w.out += count
    return 0


@native
def put_template(w: Writer, number: int) -> int:
    """Append a template; where it starts."""
    if number > T_UNPARK or number == T_PARK_R10:
        w.held = 0
    start = w.out
    t: Template = cast(Template, w.templates + number * Template.size)
    copy_bytes(w, address_of(t.code[0]), t.length)
    return start


@native
def aim(w: Writer, position: int, target: int) -> int:
    """Point the 32-bit displacement at ``position`` to an address in the trace."""
    store32(position, target - position - 4)
    return 0


@native
def gs_load(w: Writer, register: int, displacement: int) -> int:
    """``mov r64, gs:[disp]``."""
    forget_held(w, register)
    store64(w.out, 0x25048B4865 | (register >> 3) << 10 | (register & 7) << 27)
    store32(w.out + 5, displacement)
    w.out += 9
    return 0


@native
def load_entry(w: Writer, register: int, word: int) -> int:
    """``mov r64, gs:[r10 + disp8]``: a word of the TLB entry that a look-up compared with."""
    forget_held(w, register)
    put(w, 0x428B4965 | (register >> 3) << 10 | (register & 7) << 27, 4)
    return put(w, word, 1)


@native
def gs_store(w: Writer, register: int, displacement: int) -> int:
    """``mov gs:[disp], r64``."""
    store64(w.out, 0x2504894865 | (register >> 3) << 10 | (register & 7) << 27)
    store32(w.out + 5, displacement)
    w.out += 9
    return 0


@native
def gs_store_immediate(w: Writer, displacement: int, value: int) -> int:
    """``mov qword gs:[disp], simm32``."""
    store64(w.out, 0x2504C74865)
    store32(w.out + 5, displacement)
    store32(w.out + 9, value)
    w.out += 13
    return 0


@native
def gs_byte(w: Writer, operation: int, displacement: int, value: int) -> int:
    """An instruction on ``byte gs:[disp], imm8``: GS_MOVE_BYTE or GS_COMPARE_BYTE."""
    store32(w.out, operation)
    store32(w.out + 4, displacement)
    store8(w.out + 8, value)
    w.out += 9
    return 0


GS_MOVE_BYTE, GS_COMPARE_BYTE = 0x2504C665, 0x253C8065


@native
def gs_jump(w: Writer, displacement: int) -> int:
    """``jmp gs:[disp]``."""
    w.held = 0
    store32(w.out, 0x2524FF65)
    store32(w.out + 4, displacement)
    w.out += 8
    return 0


@native
def gs_call(w: Writer, displacement: int) -> int:
    """``call gs:[disp]``."""
    w.held = 0
    store32(w.out, 0x2514FF65)
    store32(w.out + 4, displacement)
    w.out += 8
    return 0


@native_inline
def move(w: Writer, target: int, source: int) -> int:
    """``mov r64, r64``."""
    forget_held(w, target)
    rex = 0x48 | (source >> 3) << 2 | target >> 3
    put(w, rex | 0x8900 | (0xC0 | (source & 7) << 3 | target & 7) << 16, 3)
    return 0


@native_inline
def move_r10(w: Writer, value: int) -> int:
    """``mov r10d, imm32``."""
    w.held = 0
    put(w, 0xBA41 | (value & 0xFFFFFFFF) << 16, 6)
    return 0


@native
def move_simm32(w: Writer, register: int, value: int) -> int:
    """``mov r64, simm32``."""
    forget_held(w, register)
    store32(w.out, 0xC0C748 | register >> 3 | (register & 7) << 16)
    store32(w.out + 3, value)
    w.out += 7
    return 0


@native
def move_imm64(w: Writer, register: int, value: int) -> int:
    """``mov r64, imm64``."""
    forget_held(w, register)
    put(w, 0xB848 | register >> 3 | (register & 7) << 8, 2)
    put(w, value, 8)
    return 0


@native
def lea(w: Writer, target: int, base: int, index: int, scale: int, disp: int, narrow: int) -> int:
    """``lea r, [base + (index << scale) + disp]``; NONE for no base or index, but not both.

    ``narrow`` writes the 32-bit register.
    """
    forget_held(w, target)
    rex = (0x40 if narrow else 0x48) | (target >> 3) << 2
    reg = (target & 7) << 3
    if index != NONE:
        rex = rex | (index >> 3) << 1
    if base == NONE:
        put(w, rex | 0x8D00 | (4 | reg) << 16 | (scale << 6 | (index & 7) << 3 | 5) << 24, 4)
        put(w, disp, 4)
        return 0
    rex = rex | base >> 3
    mode = 0x80
    size = 4
    if disp == 0 and base & 7 != 5:
        mode = 0
        size = 0
    elif sext(disp, 8) == disp:
        mode = 0x40
        size = 1
    if index == NONE and base & 7 != 4:
        put(w, rex | 0x8D00 | (mode | reg | base & 7) << 16, 3)
    else:
        sib = 0x20 | base & 7
        if index != NONE:
            sib = scale << 6 | (index & 7) << 3 | base & 7
        put(w, rex | 0x8D00 | (mode | reg | 4) << 16 | sib << 24, 4)
    put(w, disp, size)
    return 0


# --- words that depend on the place ------------------------------------------------------------


@native
def word(w: Writer, position: int, kind: int, addend: int) -> int:
    """Remember a word to be filled in when the trace is placed.

    What a displacement of 2 GiB leads to may be too far from the page's start for a signed word:
    RELOC_FAR then stands for the difference, 4 GiB.
    """
    at = w.relocations + w.relocation_count * 8
    far = RELOC_FAR if slt(0x7FFFFFFF, addend) else 0
    store32(at, (position - w.code) << 2 | kind | far)
    store32(at + 4, addend)
    w.relocation_count += 1
    return 0


@native
def set_rip(w: Writer, offset: int) -> int:
    """``Cpu.rip`` = page + offset; uses R10 for far addresses."""
    if w.wide:
        word(w, w.out + 2, RELOC_VA64, offset)
        move_imm64(w, R10, 0)
        gs_store(w, R10, _RIP)
    else:
        word(w, w.out + 9, RELOC_VA32, offset)
        gs_store_immediate(w, _RIP, 0)
    return 0


@native
def load_address(w: Writer, register: int, offset: int) -> int:
    """``register`` = page + offset."""
    if w.wide:
        word(w, w.out + 2, RELOC_VA64, offset)
        move_imm64(w, register, 0)
    else:
        word(w, w.out + 3, RELOC_VA32, offset)
        move_simm32(w, register, 0)
    return 0


@native
def park(w: Writer, live: int) -> int:
    """Move the ``live`` flags out of the host's flags; the others may get lost."""
    if w.state != PARKED:
        if live == CARRY:
            put(w, 0x2504920F65, 5)  # setc gs:[parked + 1]
            put(w, gs("parked") + 1, 4)
        else:
            put_template(w, T_PARK)
        w.state = PARKED
    return 0


@native
def unpark(w: Writer, live: int) -> int:
    """Bring the ``live`` flags back into the host's flags."""
    if w.state == PARKED:
        if live == CARRY:
            put(w, 0x2524BA0F65, 5)  # bt dword gs:[parked], 8
            put(w, gs("parked"), 4)
            put(w, 8, 1)
        else:
            put_template(w, T_UNPARK)
        w.state = HOST
    return 0


@native_inline
def add_miss(
    w: Writer, position: int, retry: int, write: int, kind: int, offset: int, kept: int
) -> int:
    """Remember a look-up's jump that goes to a stub."""
    miss: Miss = cast(Miss, address_of(w.misses[0]) + w.miss_count * Miss.size)
    miss.position = position
    miss.retry = retry
    miss.write = write
    miss.kind = kind
    miss.offset = offset
    miss.kept = kept
    w.miss_count += 1
    return 0


@native
def add_link(w: Writer, target: int, within: int, parks: int, conditional: int) -> int:
    """Remember the direct jump just written, whose displacement are the last four bytes."""
    link: Link = cast(Link, address_of(w.links[0]) + w.link_count * Link.size)
    link.position = w.out - 4
    link.target = target
    link.within = within
    link.park = parks
    link.conditional = conditional
    w.link_count += 1
    return 0


@native_inline
def jump_back(w: Writer, target: int) -> int:
    """``jmp`` to a place in the trace."""
    put(w, 0xE9, 5)
    store32(w.out - 4, target - w.out)
    return 0


@native
def swap(w: Writer, inward: int) -> int:
    """Exchange the registers of ``w.swaps`` on the way into a trace, or out of it."""
    swaps = w.swaps
    while swaps:
        homeless = gs("gpr") + (swaps & 15) * 8
        displaced = gs("displaced") + (swaps >> 4 & 15) * 8
        host = w.home[swaps & 15]
        gs_store(w, host, displaced if inward else homeless)
        gs_load(w, host, homeless if inward else displaced)
        swaps = swaps >> 8
    return 0


@native_inline
def swap_in(w: Writer) -> int:
    """Arrange registers as the trace wants them."""
    return swap(w, 1)


@native_inline
def swap_out(w: Writer) -> int:
    """Put registers back where they are between traces."""
    return swap(w, 0)
