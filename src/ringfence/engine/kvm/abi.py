"""What is said to /dev/kvm: its structures, request numbers, capabilities and exit reasons.

Each structure is declared once, as a ctypes structure named after the kernel's (``KvmSregs`` is
``struct kvm_sregs``), with the kernel's field names; constants keep their C names without the
prefix that their class carries. A test compiles a C program against <linux/kvm.h> and compares
every size, offset and number, so nothing here has to be taken on trust. Arrays of variable length
are made by functions, as ctypes has no such type.

Source: Linux, Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from functools import cache
from typing import Any

API_VERSION = 12
NR_INTERRUPTS = 256
MSR_FILTER_MAX_RANGES = 16
MAX_XCRS = 16

MEM_LOG_DIRTY_PAGES = 1 << 0
MEM_READONLY = 1 << 1
EXIT_IO_OUT = 1
MSR_EXIT_REASON_INVAL, MSR_EXIT_REASON_UNKNOWN, MSR_EXIT_REASON_FILTER = 1, 2, 4
MSR_FILTER_READ, MSR_FILTER_WRITE = 1, 2
MSR_FILTER_DEFAULT_DENY = 1
CPUID_FLAG_SIGNIFCANT_INDEX = 1
VCPU_TSC_CTRL, VCPU_TSC_OFFSET = 0, 0
VCPUEVENT_VALID_SHADOW = 1 << 2
GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP = 1 << 0, 1 << 1
GUESTDBG_USE_HW_BP, GUESTDBG_BLOCKIRQ = 1 << 17, 1 << 20
INTERNAL_ERROR_EMULATION = 1
SIGSET_BYTES = 8
"""Size of the kernel's sigset_t, which is not the C library's."""


class Cap(IntEnum):
    """Capabilities (``KVM_CAP_…``) that KVM_CHECK_EXTENSION is asked about."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    SYNC_MMU = 16
    USER_NMI = 22
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    VCPU_ATTRIBUTES = 127
    IMMEDIATE_EXIT = 136
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189


class Exit(IntEnum):
    """Why KVM_RUN returned (``KVM_EXIT_…``), as far as x86 without an irqchip can see it."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_RDMSR = 29
    X86_WRMSR = 30


class KvmRegs(ctypes.Structure):
    """General registers, RIP and RFLAGS."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    ]


class KvmSegment(ctypes.Structure):
    """A segment register with its hidden part; ``limit`` is in bytes."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class KvmDtable(ctypes.Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class KvmSregs(ctypes.Structure):
    """Segments, descriptor tables, control registers, EFER."""

    _fields_ = [
        *((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", KvmDtable),
        ("idt", KvmDtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * (NR_INTERRUPTS // 64)),
    ]


class KvmGuestDebug(ctypes.Structure):
    """What the owner wants the guest to stop at; the debug registers are DR0-DR7."""

    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8)]


class KvmDebugregs(ctypes.Structure):
    """DR0-DR3, DR6, DR7."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class _EventException(ctypes.Structure):
    _fields_ = [
        *((name, c_uint8) for name in ("injected", "nr", "has_error_code", "pending")),
        ("error_code", c_uint32),
    ]


class _EventInterrupt(ctypes.Structure):
    _fields_ = [(name, c_uint8) for name in ("injected", "nr", "soft", "shadow")]


class _EventNmi(ctypes.Structure):
    _fields_ = [(name, c_uint8) for name in ("injected", "pending", "masked", "pad")]


class _EventSmi(ctypes.Structure):
    _fields_ = [(name, c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init")]


class _EventTripleFault(ctypes.Structure):
    _fields_ = [("pending", c_uint8)]


class KvmVcpuEvents(ctypes.Structure):
    """Events on their way into the guest, and what blocks them."""

    _fields_ = [
        ("exception", _EventException),
        ("interrupt", _EventInterrupt),
        ("nmi", _EventNmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _EventSmi),
        ("triple_fault", _EventTripleFault),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class KvmXsave(ctypes.Structure):
    """The XSAVE area in standard format, as the host's CPUID leaf 0xD lays it out."""

    _fields_ = [("region", c_uint32 * 1024)]


class KvmXcr(ctypes.Structure):
    """One extended control register."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class KvmXcrs(ctypes.Structure):
    """Extended control registers."""

    _fields_ = [
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", KvmXcr * MAX_XCRS),
        ("padding", c_uint64 * 16),
    ]


class KvmMsrEntry(ctypes.Structure):
    """A model-specific register and its value."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class KvmMsrs(ctypes.Structure):
    """How many entries follow."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class KvmCpuidEntry2(ctypes.Structure):
    """One leaf, or subleaf, of CPUID."""

    _fields_ = [
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    ]


class KvmCpuid2(ctypes.Structure):
    """How many entries follow."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """Guest RAM: where in guest-physical space, where in ours."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class KvmTranslation(ctypes.Structure):
    """A guest-linear address and the page walk's result."""

    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        *((name, c_uint8) for name in ("valid", "writeable", "usermode")),
        ("pad", c_uint8 * 5),
    ]


class KvmInterrupt(ctypes.Structure):
    """The vector of an external interrupt."""

    _fields_ = [("irq", c_uint32)]


class KvmDirtyLog(ctypes.Structure):
    """Where the bitmap of a slot's written pages goes."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class KvmSignalMask(ctypes.Structure):
    """Length of the signal set that follows, in bytes."""

    _fields_ = [("len", c_uint32)]


class KvmEnableCap(ctypes.Structure):
    """A capability to switch on, with its arguments."""

    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


class KvmDeviceAttr(ctypes.Structure):
    """An attribute of a device or vCPU; ``addr`` is where its value is."""

    _fields_ = [
        ("flags", c_uint32),
        ("group", c_uint32),
        ("attr", c_uint64),
        ("addr", c_uint64),
    ]


class KvmMsrFilterRange(ctypes.Structure):
    """Registers from ``base`` on; a 1 in the bitmap leaves one to KVM, a 0 to us."""

    _fields_ = [
        ("flags", c_uint32),
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("bitmap", c_uint64),
    ]


class KvmMsrFilter(ctypes.Structure):
    """Which model-specific registers KVM serves by itself."""

    _fields_ = [("flags", c_uint32), ("ranges", KvmMsrFilterRange * MSR_FILTER_MAX_RANGES)]


class _RunHw(ctypes.Structure):
    _fields_ = [("hardware_exit_reason", c_uint64)]


class _RunFailEntry(ctypes.Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _RunIo(ctypes.Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _RunDebugArch(ctypes.Structure):
    _fields_ = [
        ("exception", c_uint32),
        ("pad", c_uint32),
        *((name, c_uint64) for name in ("pc", "dr6", "dr7")),
    ]


class _RunDebug(ctypes.Structure):
    _fields_ = [("arch", _RunDebugArch)]


class _RunMmio(ctypes.Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class _RunInternal(ctypes.Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _RunEmulationFailure(ctypes.Structure):
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _RunMsr(ctypes.Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _RunDetails(ctypes.Union):
    _fields_ = [
        ("hw", _RunHw),
        ("fail_entry", _RunFailEntry),
        ("io", _RunIo),
        ("debug", _RunDebug),
        ("mmio", _RunMmio),
        ("internal", _RunInternal),
        ("emulation_failure", _RunEmulationFailure),
        ("msr", _RunMsr),
        ("padding", c_char * 256),
    ]


class KvmRun(ctypes.Structure):
    """The page that a vCPU shares with us; what an exit is about is in the union."""

    _anonymous_ = ("details",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("details", _RunDetails),
    ]


# --- requests: _IO, _IOR, _IOW and _IOWR of <asm-generic/ioctl.h> ---------------------------------
_KVMIO = 0xAE
_WRITE, _READ = 1, 2


def _request(direction: int, number: int, kind: type[Any] | None = None) -> int:
    size = ctypes.sizeof(kind) if kind else 0
    return direction << 30 | size << 16 | _KVMIO << 8 | number


class Request(IntEnum):
    """Numbers of the ioctls (``KVM_…``)."""

    GET_API_VERSION = _request(0, 0x00)
    CREATE_VM = _request(0, 0x01)
    CHECK_EXTENSION = _request(0, 0x03)
    GET_VCPU_MMAP_SIZE = _request(0, 0x04)
    GET_SUPPORTED_CPUID = _request(_READ | _WRITE, 0x05, KvmCpuid2)
    CREATE_VCPU = _request(0, 0x41)
    GET_DIRTY_LOG = _request(_WRITE, 0x42, KvmDirtyLog)
    SET_USER_MEMORY_REGION = _request(_WRITE, 0x46, KvmUserspaceMemoryRegion)
    SET_TSS_ADDR = _request(0, 0x47)
    SET_IDENTITY_MAP_ADDR = _request(_WRITE, 0x48, c_uint64)
    RUN = _request(0, 0x80)
    GET_REGS = _request(_READ, 0x81, KvmRegs)
    SET_REGS = _request(_WRITE, 0x82, KvmRegs)
    GET_SREGS = _request(_READ, 0x83, KvmSregs)
    SET_SREGS = _request(_WRITE, 0x84, KvmSregs)
    TRANSLATE = _request(_READ | _WRITE, 0x85, KvmTranslation)
    INTERRUPT = _request(_WRITE, 0x86, KvmInterrupt)
    NMI = _request(0, 0x9A)
    GET_MSRS = _request(_READ | _WRITE, 0x88, KvmMsrs)
    SET_MSRS = _request(_WRITE, 0x89, KvmMsrs)
    SET_SIGNAL_MASK = _request(_WRITE, 0x8B, KvmSignalMask)
    SET_CPUID2 = _request(_WRITE, 0x90, KvmCpuid2)
    SET_GUEST_DEBUG = _request(_WRITE, 0x9B, KvmGuestDebug)
    GET_VCPU_EVENTS = _request(_READ, 0x9F, KvmVcpuEvents)
    SET_VCPU_EVENTS = _request(_WRITE, 0xA0, KvmVcpuEvents)
    GET_DEBUGREGS = _request(_READ, 0xA1, KvmDebugregs)
    SET_DEBUGREGS = _request(_WRITE, 0xA2, KvmDebugregs)
    ENABLE_CAP = _request(_WRITE, 0xA3, KvmEnableCap)
    GET_XSAVE = _request(_READ, 0xA4, KvmXsave)
    SET_XSAVE = _request(_WRITE, 0xA5, KvmXsave)
    GET_XCRS = _request(_READ, 0xA6, KvmXcrs)
    SET_XCRS = _request(_WRITE, 0xA7, KvmXcrs)
    X86_SET_MSR_FILTER = _request(_WRITE, 0xC6, KvmMsrFilter)
    SET_DEVICE_ATTR = _request(_WRITE, 0xE1, KvmDeviceAttr)


# --- structures with an array behind them ---------------------------------------------------------
@cache
def _with_array(head: type[ctypes.Structure], element: Any, count: int) -> type[Any]:
    members = [("head", head), ("entries", element * count)]
    name = f"{head.__name__}{count}"
    return type(name, (ctypes.Structure,), {"_anonymous_": ("head",), "_fields_": members})


def cpuid2(entries: Sequence[KvmCpuidEntry2], room: int = 0) -> Any:
    """``struct kvm_cpuid2`` with these entries, or with ``room`` for as many to come."""
    table = _with_array(KvmCpuid2, KvmCpuidEntry2, max(len(entries), room))()
    table.nent = len(table.entries)
    for at, entry in enumerate(entries):
        table.entries[at] = entry
    return table


def msrs(values: Sequence[tuple[int, int]]) -> Any:
    """``struct kvm_msrs`` with pairs of index and value."""
    table = _with_array(KvmMsrs, KvmMsrEntry, len(values))()
    table.nmsrs = len(values)
    for entry, (index, value) in zip(table.entries, values, strict=True):
        entry.index, entry.data = index, value
    return table


def signal_mask(blocked: int) -> Any:
    """``struct kvm_signal_mask``; bit n-1 of ``blocked`` stands for signal n."""
    table = _with_array(KvmSignalMask, c_uint8, SIGSET_BYTES)()
    table.len = SIGSET_BYTES
    table.entries[:] = list(blocked.to_bytes(SIGSET_BYTES, "little"))
    return table
