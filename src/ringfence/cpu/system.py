"""System instructions that belong to no larger family: tables, caches, halt, flags, time.

Conventions of every effect ``fx_*`` in this package: on entry ``rip`` is the instruction's address
and ``next_rip`` the one after it. OK means done, with ``rip`` = ``next_rip``; FAULT means that an
exception is pending and nothing else has changed; EXIT means that the VMM completes the
instruction (writes its results, advances ``rip``), except for HLT, which is over when it exits.

Sources: Intel SDM vol. 2 for each instruction; vol. 3, 2.8 (system instructions).
"""

from __future__ import annotations

from ringfence.cpu.control import LOW32, advance, leave, refused, set_gpr, umip_refuses
from ringfence.cpu.flags import (
    get_rflags,
    is_canonical,
    raise_fault,
    set_rflags,
)
from ringfence.cpu.ports import (
    interrupts_enabled,
    linear_read,
    linear_write,
    tlb_flush_all,
    tlb_flush_nonglobal,
    tlb_flush_page,
)
from ringfence.cpu.realmode import iopl_refuses
from ringfence.cpu.stack import in_64bit, is_protected, push, set_stack, stack_read
from ringfence.cpu.state import (
    CR4_PCIDE,
    CR4_TSD,
    EXIT_HALT,
    EXIT_HYPERCALL,
    FAULT,
    FLAG_AC,
    FLAG_DF,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    LDTR,
    OK,
    RAX,
    RCX,
    RDX,
    RSP,
    SHADOW_STI,
    STATUS_FLAGS,
    TR,
    UD,
    Cpu,
)
from ringfence.cpu.tsc import guest_tsc
from ringfence.native.dialect import native, native_inline

POPF_ALWAYS = STATUS_FLAGS | FLAG_TF | FLAG_DF | FLAG_NT
POPF_WIDE = POPF_ALWAYS | FLAG_AC | FLAG_ID


# --- descriptor tables --------------------------------------------------------------------------


@native_inline
def table_base_bytes(cpu: Cpu) -> int:
    """Bytes of a base address in memory."""
    return 8 if in_64bit(cpu) else 4


@native
def read_table_register(cpu: Cpu) -> int:
    """The bytes at ``ea``: base into ``op[0]``, limit into ``op[1]``, both checked.

    ``op[0]`` is the operand size: with 2 bytes the base has 24 bits (SDM vol. 2, LGDT).
    """
    narrow = cpu.op[0] == 2
    if cpu.cpl:
        return refused(cpu)
    if linear_read(cpu, cpu.ea, 2, 0):
        return FAULT
    limit = cpu.value
    if linear_read(cpu, cpu.ea + 2, table_base_bytes(cpu), 0):
        return FAULT
    if not is_canonical(cpu.value):
        return refused(cpu)
    cpu.op[0] = cpu.value & 0xFFFFFF if narrow and not in_64bit(cpu) else cpu.value
    cpu.op[1] = limit
    return OK


@native
def write_table_register(cpu: Cpu, base: int, limit: int) -> int:
    """Store limit and base at ``ea``; a fault in the second store leaves the first one done."""
    user = cpu.cpl == 3
    if umip_refuses(cpu):
        return refused(cpu)
    if linear_write(cpu, cpu.ea, 2, limit, user):
        return FAULT
    if linear_write(cpu, cpu.ea + 2, table_base_bytes(cpu), base, user):
        return FAULT
    return advance(cpu)


@native
def fx_lgdt(cpu: Cpu) -> int:
    """LGDT: limit and base at ``ea``, operand size in ``op[0]``."""
    if read_table_register(cpu):
        return FAULT
    cpu.gdtr_base = cpu.op[0]
    cpu.gdtr_limit = cpu.op[1]
    return advance(cpu)


@native
def fx_lidt(cpu: Cpu) -> int:
    """LIDT: limit and base at ``ea``, operand size in ``op[0]``."""
    if read_table_register(cpu):
        return FAULT
    cpu.idtr_base = cpu.op[0]
    cpu.idtr_limit = cpu.op[1]
    return advance(cpu)


@native
def fx_sgdt(cpu: Cpu) -> int:
    """SGDT: to ``ea``."""
    return write_table_register(cpu, cpu.gdtr_base, cpu.gdtr_limit)


@native
def fx_sidt(cpu: Cpu) -> int:
    """SIDT: to ``ea``."""
    return write_table_register(cpu, cpu.idtr_base, cpu.idtr_limit)


@native_inline
def store_selector(cpu: Cpu, segment: int) -> int:
    """SLDT or STR to a register: ``op[0]`` general register, ``op[1]`` operand size."""
    if umip_refuses(cpu):
        return refused(cpu)
    set_gpr(cpu, cpu.op[0], cpu.op[1], cpu.seg_selector[segment])
    return advance(cpu)


@native_inline
def store_selector_mem(cpu: Cpu, segment: int) -> int:
    """SLDT or STR to memory: 16 bits at ``ea``."""
    if umip_refuses(cpu):
        return refused(cpu)
    if linear_write(cpu, cpu.ea, 2, cpu.seg_selector[segment], cpu.cpl == 3):
        return FAULT
    return advance(cpu)


@native
def fx_sldt(cpu: Cpu) -> int:
    """SLDT r: ``op[0]`` general register, ``op[1]`` operand size."""
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    return store_selector(cpu, LDTR)


@native
def fx_str(cpu: Cpu) -> int:
    """STR r: ``op[0]`` general register, ``op[1]`` operand size."""
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    return store_selector(cpu, TR)


@native
def fx_sldt_mem(cpu: Cpu) -> int:
    """SLDT m16 at ``ea``."""
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    return store_selector_mem(cpu, LDTR)


@native
def fx_str_mem(cpu: Cpu) -> int:
    """STR m16 at ``ea``."""
    if not is_protected(cpu):
        return raise_fault(cpu, UD, 0)
    return store_selector_mem(cpu, TR)


# --- translations and caches --------------------------------------------------------------------


@native
def fx_invlpg(cpu: Cpu) -> int:
    """INVLPG: the page of ``ea``; nothing is cached for addresses that aren't canonical."""
    if cpu.cpl:
        return refused(cpu)
    if is_canonical(cpu.ea):
        tlb_flush_page(cpu, cpu.ea)
    return advance(cpu)


@native
def fx_invpcid(cpu: Cpu) -> int:
    """INVPCID: ``op[0]`` general register with the type, descriptor at ``ea``.

    Cached translations carry no PCID, so each type drops at least what it must.
    """
    kind = cpu.gpr[cpu.op[0]]
    if cpu.cpl or kind > 3:
        return refused(cpu)
    if linear_read(cpu, cpu.ea, 8, 0):
        return FAULT
    pcid = cpu.value
    if linear_read(cpu, cpu.ea + 8, 8, 0):
        return FAULT
    address = cpu.value
    if pcid >> 12 or (kind < 2 and pcid and not cpu.cr4 & CR4_PCIDE):
        return refused(cpu)
    if kind == 0:
        if not is_canonical(address):
            return refused(cpu)
        tlb_flush_page(cpu, address)
    elif kind == 2:
        tlb_flush_all(cpu)
    else:
        tlb_flush_nonglobal(cpu)
    return advance(cpu)


@native
def fx_wbinvd(cpu: Cpu) -> int:
    """WBINVD, WBNOINVD and INVD: memory is coherent here, only the privilege is checked."""
    return refused(cpu) if cpu.cpl else advance(cpu)


# --- waiting, interrupts, flags -------------------------------------------------------------------


@native
def fx_hlt(cpu: Cpu) -> int:
    """HLT: over at once, so ``rip`` is already past it when the VMM sees ``halted``."""
    if cpu.cpl:
        return refused(cpu)
    cpu.halted = 1
    cpu.interrupt_shadow = 0
    advance(cpu)
    return leave(cpu, EXIT_HALT)


@native_inline
def below_iopl(cpu: Cpu) -> int:
    """Whether the current privilege is too low for I/O and IF (SDM vol. 1, 19.5.1)."""
    return cpu.cpl > (cpu.other_flags & FLAG_IOPL) >> 12


@native
def fx_cli(cpu: Cpu) -> int:
    """CLI."""
    if below_iopl(cpu):
        return refused(cpu)
    cpu.flag_if = 0
    return advance(cpu)


@native
def fx_sti(cpu: Cpu) -> int:
    """STI: interrupts stay held off for one more instruction if IF was clear."""
    if below_iopl(cpu):
        return refused(cpu)
    if not cpu.flag_if:
        cpu.flag_if = 1
        cpu.interrupt_shadow = SHADOW_STI
        interrupts_enabled(cpu)
    return advance(cpu)


@native
def fx_pushf(cpu: Cpu) -> int:
    """PUSHF, PUSHFD, PUSHFQ: ``op[0]`` size; RF and VM read as 0."""
    if iopl_refuses(cpu):
        return refused(cpu)
    if push(cpu, cpu.op[0], get_rflags(cpu) & ~(FLAG_RF | FLAG_VM)):
        return FAULT
    return advance(cpu)


@native
def fx_popf(cpu: Cpu) -> int:
    """POPF, POPFD, POPFQ: ``op[0]`` size; IF needs CPL <= IOPL, IOPL needs CPL 0."""
    size = cpu.op[0]
    old = get_rflags(cpu)
    if iopl_refuses(cpu):
        return refused(cpu)
    if stack_read(cpu, cpu.gpr[RSP], size, cpu.cpl == 3):
        return FAULT
    changeable = POPF_ALWAYS if size == 2 else POPF_WIDE
    if cpu.cpl == 0:
        changeable |= FLAG_IOPL
    if not below_iopl(cpu):
        changeable |= FLAG_IF
    value = (old & ~changeable) | (cpu.value & changeable)
    set_stack(cpu, cpu.gpr[RSP] + size)
    cpu.rip = cpu.next_rip
    set_rflags(cpu, value if size == 2 else value & ~FLAG_RF)
    return OK


# --- time, processor number, counters -----------------------------------------------------------


@native
def fx_rdtsc(cpu: Cpu) -> int:
    """RDTSC."""
    if cpu.cpl and cpu.cr4 & CR4_TSD:
        return refused(cpu)
    now = guest_tsc(cpu)
    cpu.gpr[RAX] = now & LOW32
    cpu.gpr[RDX] = now >> 32
    return advance(cpu)


@native
def fx_rdtscp(cpu: Cpu) -> int:
    """RDTSCP: RDTSC, and IA32_TSC_AUX in ECX."""
    if fx_rdtsc(cpu):
        return FAULT
    cpu.gpr[RCX] = cpu.tsc_aux & LOW32
    return OK


@native
def fx_rdpid(cpu: Cpu) -> int:
    """RDPID: IA32_TSC_AUX into general register ``op[0]``."""
    cpu.gpr[cpu.op[0]] = cpu.tsc_aux
    return advance(cpu)


@native
def fx_rdpmc(cpu: Cpu) -> int:
    """RDPMC: there's no counter to read, so every index (and user mode, CR4.PCE or not) is #GP."""
    return refused(cpu)


@native
def fx_vmcall(cpu: Cpu) -> int:
    """VMCALL (``op[0]`` 0) and VMMCALL (1), at any privilege: the VMM answers."""
    cpu.exit_data[0] = cpu.op[0]
    cpu.exit_data[1] = cpu.cpl
    return leave(cpu, EXIT_HYPERCALL)
