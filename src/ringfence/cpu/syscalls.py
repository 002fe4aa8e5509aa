"""The quick ways into a kernel and back: SYSCALL and SYSRET, SYSENTER and SYSEXIT.

As AMD's processors have them: SYSENTER and SYSEXIT exist outside long mode only, SYSCALL in 32-bit
modes, too. Sources: AMD APM vol. 2, 6.1; vol. 3, SYSCALL, SYSRET, SYSENTER, SYSEXIT.
"""

from __future__ import annotations

from ringfence.cpu.debug import DR6_BS
from ringfence.cpu.flags import get_rflags, raise_fault, set_rflags
from ringfence.cpu.ports import debug_note, mode_changed, step_masked
from ringfence.cpu.stack import in_64bit
from ringfence.cpu.state import (
    ATTR_DPL_SHIFT,
    CR0_PE,
    CS,
    EFER_LMA,
    EFER_SCE,
    FLAG_IF,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    GP,
    OK,
    RCX,
    RDX,
    RSP,
    SS,
    UD,
    Cpu,
)
from ringfence.native.dialect import native, native_inline

R11 = 11
LOW32 = 0xFFFFFFFF
ATTR_FLAT_CODE = 0xA9B
"""G, L, present, DPL 0, code, readable, accessed."""
ATTR_FLAT_CODE32 = 0xC9B
"""The same with D in place of L."""
ATTR_FLAT_DATA = 0xC93
"""G, D, present, DPL 0, data, writable, accessed."""
SYSRET_FLAGS = 0x3C7FD7


@native_inline
def flat_segments(cpu: Cpu, attr: int, code: int, stack: int, level: int) -> int:
    """The fixed flat segments that these instructions load (SDM vol. 2, SYSCALL)."""
    cpu.seg_selector[CS] = code
    cpu.seg_base[CS] = 0
    cpu.seg_limit[CS] = LOW32
    cpu.seg_attr[CS] = attr | (level << ATTR_DPL_SHIFT)
    cpu.seg_selector[SS] = stack
    cpu.seg_base[SS] = 0
    cpu.seg_limit[SS] = LOW32
    cpu.seg_attr[SS] = ATTR_FLAT_DATA | (level << ATTR_DPL_SHIFT)
    cpu.cpl = level
    return OK


@native_inline
def settle_step(cpu: Cpu) -> int:
    """TF as SYSCALL and SYSRET leave it decides about their single-step trap, not TF before.

    So a kernel that masks TF is not stepped into, and a SYSRET that sets it traps at once, as if
    the SYSCALL that it belongs to had just ended (SDM vol. 3, 18.3.1.4).
    """
    if cpu.other_flags & FLAG_TF:
        return debug_note(cpu, DR6_BS)
    return step_masked(cpu)


@native
def fx_syscall(cpu: Cpu) -> int:
    """SYSCALL (AMD APM vol. 3, SYSCALL)."""
    if not cpu.efer & EFER_SCE or not cpu.cr0 & CR0_PE:
        return raise_fault(cpu, UD, 0)
    flags = get_rflags(cpu) & ~FLAG_RF
    selector = (cpu.star >> 32) & 0xFFFC
    cpu.gpr[RCX] = cpu.next_rip
    if not cpu.efer & EFER_LMA:
        flat_segments(cpu, ATTR_FLAT_CODE32, selector, selector + 8, 0)
        cpu.rip = cpu.star & LOW32
        set_rflags(cpu, flags & ~(FLAG_IF | FLAG_VM))
    else:
        cpu.rip = cpu.lstar if in_64bit(cpu) else cpu.cstar
        cpu.gpr[R11] = flags
        flat_segments(cpu, ATTR_FLAT_CODE, selector, selector + 8, 0)
        set_rflags(cpu, flags & ~cpu.sfmask)
        settle_step(cpu)
    mode_changed(cpu)
    return OK


@native
def fx_sysret(cpu: Cpu) -> int:
    """SYSRET: op[0] is 1 with REX.W (AMD APM vol. 3, SYSRET).

    RCX is not checked to be canonical: as on AMD CPUs, the fault follows at CPL 3.
    """
    if not cpu.efer & EFER_SCE or not cpu.cr0 & CR0_PE:
        return raise_fault(cpu, UD, 0)
    if cpu.cpl:
        return raise_fault(cpu, GP, 0)
    selector = (cpu.star >> 48) & 0xFFFF
    stack = ((selector + 8) & 0xFFFF) | 3
    if cpu.op[0]:
        flat_segments(cpu, ATTR_FLAT_CODE, ((selector + 16) & 0xFFFF) | 3, stack, 3)
        cpu.rip = cpu.gpr[RCX]
    else:
        flat_segments(cpu, ATTR_FLAT_CODE32, selector | 3, stack, 3)
        cpu.rip = cpu.gpr[RCX] & LOW32
    if cpu.efer & EFER_LMA:
        set_rflags(cpu, cpu.gpr[R11] & SYSRET_FLAGS)
        settle_step(cpu)
    else:
        set_rflags(cpu, get_rflags(cpu) | FLAG_IF)
    mode_changed(cpu)
    return OK


@native
def fx_sysenter(cpu: Cpu) -> int:
    """SYSENTER: #UD in long mode, as on AMD CPUs (AMD APM vol. 3, SYSENTER)."""
    if cpu.efer & EFER_LMA:
        return raise_fault(cpu, UD, 0)
    selector = cpu.sysenter_cs & 0xFFFC
    if not cpu.cr0 & CR0_PE or selector == 0:
        return raise_fault(cpu, GP, 0)
    flat_segments(cpu, ATTR_FLAT_CODE32, selector, selector + 8, 0)
    set_rflags(cpu, get_rflags(cpu) & ~(FLAG_VM | FLAG_IF))
    cpu.gpr[RSP] = cpu.sysenter_esp & LOW32
    cpu.rip = cpu.sysenter_eip & LOW32
    mode_changed(cpu)
    return OK


@native
def fx_sysexit(cpu: Cpu) -> int:
    """SYSEXIT: #UD in long mode, as on AMD CPUs (AMD APM vol. 3, SYSEXIT)."""
    if cpu.efer & EFER_LMA:
        return raise_fault(cpu, UD, 0)
    selector = cpu.sysenter_cs & 0xFFFC
    if not cpu.cr0 & CR0_PE or cpu.cpl or selector == 0:
        return raise_fault(cpu, GP, 0)
    flat_segments(cpu, ATTR_FLAT_CODE32, (selector + 16) | 3, (selector + 24) | 3, 3)
    cpu.gpr[RSP] = cpu.gpr[RCX] & LOW32
    cpu.rip = cpu.gpr[RDX] & LOW32
    mode_changed(cpu)
    return OK
