"""A virtual CPU's state on its way between `Cpu`, where all engines keep it, and KVM.

Each part is one pair of functions over one of KVM's structures; `load` gives all to KVM, `store`
takes all back. What KVM has no place for (MTRRs and other registers that the model serves itself,
the time-stamp counter's offset) stays in the view.

Source: Linux, Documentation/virt/kvm/api.rst; segment attributes as in a VMCB (AMD APM vol. 2,
15.5.1), because `Cpu` keeps them so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from ringfence.cpu import components, msr, state
from ringfence.cpu.cpuid import host_cpuid
from ringfence.cpu.dump import rflags
from ringfence.cpu.registers import set_rflags
from ringfence.engine.kvm import abi
from ringfence.engine.kvm.abi import Request
from ringfence.engine.kvm.device import VcpuFile

APIC_BASE_ENABLED, APIC_BASE_BSP = 0xFEE00800, 0x100
"""What KVM is told of the local APIC, which is on the board: it is on; whose is the boot CPU's."""
XSTATE_KEPT = (
    components.X87_STATE
    | components.SSE_STATE
    | sum(1 << component.number for component in components.EXTENDED)
)
"""Components of vector state that the model may offer."""
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
"""KVM's names of the segment registers, in the order of ``state.SEGMENT_NAMES``."""
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")

MSR_FIELDS = {
    msr.STAR: "star",
    msr.LSTAR: "lstar",
    msr.CSTAR: "cstar",
    msr.SFMASK: "sfmask",
    msr.KERNEL_GS_BASE: "kernel_gs_base",
    msr.SYSENTER_CS: "sysenter_cs",
    msr.SYSENTER_ESP: "sysenter_esp",
    msr.SYSENTER_EIP: "sysenter_eip",
    msr.PAT: "pat",
    msr.TSC_AUX: "tsc_aux",
}
"""Registers that KVM serves from its own state, and our fields for them."""
KVM_MSRS = frozenset({*MSR_FIELDS, msr.EFER, msr.FS_BASE, msr.GS_BASE})
"""All registers that the guest reaches without us; the last three are in ``struct kvm_sregs``."""


@cache
def _areas() -> list[tuple[int, int, int]]:
    """Pieces of an XSAVE area: offset in ``Cpu.xsave``, in KVM's, which is the host's; size."""
    pieces = [(0, 0, components.LEGACY_BYTES)]
    for component in components.EXTENDED:
        size, offset, *_ = host_cpuid(0xD, component.number)
        if size == component.size and offset + size <= ctypes.sizeof(abi.KvmXsave):
            pieces.append((component.offset, offset, size))
    return pieces


def load(vcpu: VcpuFile, cpu: Any, interrupt: int = -1) -> None:
    """Give KVM the whole state of a view, and the vector that is under way (-1 for none)."""
    load_sregs(vcpu, cpu)
    load_regs(vcpu, cpu)
    xcrs = abi.KvmXcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = cpu.xcr0
    vcpu.ask(Request.SET_XCRS, xcrs)
    load_xsave(vcpu, cpu)
    debug = abi.KvmDebugregs(dr6=cpu.dr[6], dr7=cpu.dr[7])
    debug.db[:] = cpu.dr[:4]
    vcpu.ask(Request.SET_DEBUGREGS, debug)
    vcpu.set_msrs([(index, getattr(cpu, name)) for index, name in MSR_FIELDS.items()])
    events = abi.KvmVcpuEvents()
    events.interrupt.shadow = cpu.interrupt_shadow
    events.nmi.masked = cpu.nmi_blocked
    if cpu.exc_vector != state.NO_EXCEPTION:
        events.exception.injected = 1
        events.exception.nr = cpu.exc_vector
        events.exception.has_error_code = state.HAS_ERROR_CODE >> cpu.exc_vector & 1
        events.exception.error_code = cpu.exc_error
    if interrupt >= 0:
        events.interrupt.injected = 1
        events.interrupt.nr = interrupt
    events.flags = abi.VCPUEVENT_VALID_SHADOW
    vcpu.ask(Request.SET_VCPU_EVENTS, events)


def load_xsave(vcpu: VcpuFile, cpu: Any) -> None:
    """Vector and x87 state to KVM."""
    area = abi.KvmXsave()
    for here, there, size in _areas():
        ctypes.memmove(ctypes.addressof(area) + there, ctypes.addressof(cpu.xsave) + here, size)
    vcpu.ask(Request.SET_XSAVE, area)


def store(vcpu: VcpuFile, cpu: Any) -> int:
    """Take the whole state into a view; return the external interrupt under way, or -1."""
    store_regs(vcpu, cpu)
    store_sregs(vcpu, cpu)
    xcrs = vcpu.get(Request.GET_XCRS, abi.KvmXcrs)
    for entry in xcrs.xcrs[: xcrs.nr_xcrs]:
        if entry.xcr == 0:
            cpu.xcr0 = entry.value
    area = vcpu.get(Request.GET_XSAVE, abi.KvmXsave)
    for here, there, size in _areas():
        ctypes.memmove(ctypes.addressof(cpu.xsave) + here, ctypes.addressof(area) + there, size)
    cpu.xsave[components.HEADER] &= XSTATE_KEPT
    debug = vcpu.get(Request.GET_DEBUGREGS, abi.KvmDebugregs)
    cpu.dr[:] = [*debug.db, 0, 0, debug.dr6, debug.dr7]
    for name, value in zip(MSR_FIELDS.values(), vcpu.get_msrs(MSR_FIELDS), strict=True):
        setattr(cpu, name, value)
    events = vcpu.get(Request.GET_VCPU_EVENTS, abi.KvmVcpuEvents)
    cpu.interrupt_shadow = events.interrupt.shadow & (state.SHADOW_STI | state.SHADOW_MOV_SS)
    cpu.nmi_blocked = events.nmi.masked
    pending = events.exception
    shown = pending.injected or pending.pending
    cpu.exc_vector = pending.nr if shown else state.NO_EXCEPTION
    cpu.exc_error = pending.error_code if shown and pending.has_error_code else 0
    cpu.exc_address = cpu.cr2
    return int(events.interrupt.nr) if events.interrupt.injected else -1


def load_regs(vcpu: VcpuFile, cpu: Any) -> None:
    """General registers, RIP, RFLAGS to KVM."""
    regs = abi.KvmRegs(rip=cpu.rip, rflags=rflags(cpu))
    for n, name in enumerate(state.GPR_NAMES):
        setattr(regs, name, cpu.gpr[n])
    vcpu.ask(Request.SET_REGS, regs)
    # KVM says this at exits only; whether a HLT ends for an interrupt is asked before the first.
    vcpu.run.if_flag = bool(regs.rflags & state.FLAG_IF)


def store_regs(vcpu: VcpuFile, cpu: Any) -> None:
    """General registers, RIP, RFLAGS from KVM."""
    regs = vcpu.get(Request.GET_REGS, abi.KvmRegs)
    for n, name in enumerate(state.GPR_NAMES):
        cpu.gpr[n] = getattr(regs, name)
    cpu.rip = cpu.next_rip = regs.rip
    set_rflags(cpu, regs.rflags)


def load_sregs(vcpu: VcpuFile, cpu: Any) -> None:
    """Segments, tables, control registers to KVM."""
    sregs = abi.KvmSregs(apic_base=APIC_BASE_ENABLED | (0 if vcpu.number else APIC_BASE_BSP))
    for n, name in enumerate(_SEGMENTS):
        _to_segment(getattr(sregs, name), cpu, n)
    sregs.gdt.base, sregs.gdt.limit = cpu.gdtr_base, cpu.gdtr_limit
    sregs.idt.base, sregs.idt.limit = cpu.idtr_base, cpu.idtr_limit
    for name in _CONTROL:
        setattr(sregs, name, getattr(cpu, name))
    vcpu.ask(Request.SET_SREGS, sregs)


def store_sregs(vcpu: VcpuFile, cpu: Any) -> None:
    """Segments, tables, control registers from KVM."""
    sregs = vcpu.get(Request.GET_SREGS, abi.KvmSregs)
    for n, name in enumerate(_SEGMENTS):
        _from_segment(getattr(sregs, name), cpu, n)
    cpu.gdtr_base, cpu.gdtr_limit = sregs.gdt.base, sregs.gdt.limit
    cpu.idtr_base, cpu.idtr_limit = sregs.idt.base, sregs.idt.limit
    for name in _CONTROL:
        setattr(cpu, name, getattr(sregs, name))
    cpu.cpl = sregs.ss.dpl


def _to_segment(segment: abi.KvmSegment, cpu: Any, n: int) -> None:
    attr = cpu.seg_attr[n]
    segment.base, segment.limit = cpu.seg_base[n], cpu.seg_limit[n]
    segment.selector = cpu.seg_selector[n]
    segment.type = attr & state.ATTR_TYPE
    segment.s = bool(attr & state.ATTR_S)
    segment.dpl = attr >> state.ATTR_DPL_SHIFT & 3
    segment.present = bool(attr & state.ATTR_P)
    segment.avl = bool(attr & state.ATTR_AVL)
    segment.l = bool(attr & state.ATTR_L)
    segment.db = bool(attr & state.ATTR_DB)
    segment.g = bool(attr & state.ATTR_G)
    segment.unusable = not segment.present


def _from_segment(segment: abi.KvmSegment, cpu: Any, n: int) -> None:
    cpu.seg_base[n], cpu.seg_limit[n] = segment.base, segment.limit
    cpu.seg_selector[n] = segment.selector
    attr = segment.type | segment.s << 4 | segment.dpl << state.ATTR_DPL_SHIFT
    for bit, name in (
        (state.ATTR_P, "present"), (state.ATTR_AVL, "avl"), (state.ATTR_L, "l"),
        (state.ATTR_DB, "db"), (state.ATTR_G, "g"),
    ):  # fmt: skip
        attr |= bit * getattr(segment, name)
    cpu.seg_attr[n] = attr & ~state.ATTR_P if segment.unusable else attr
