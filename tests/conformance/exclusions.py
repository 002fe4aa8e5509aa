"""Cases in which an engine is known to differ, with reasons; one that no longer does is an error.

``translate`` are bugs. ``software KVM`` is a KVM without virtualization extensions, which
interprets the guest's kernel code and runs its user code on a CPU that shows through; what it says
that it can't emulate needs no entry here."""

from __future__ import annotations

_SELECTORS = "user code sees the host's selectors"
_FLAGS = "user code sees the host's IF, and may change it"
_INT = "user code's INT is #UD"
_SYSTEM_CALL = "SYSCALL and SYSRET load the host's selectors"
_IRET = "IRET checks selectors late, if at all, and doesn't load IOPL"
_FSGSBASE = "CR4.FSGSBASE has no effect"
_WINDOW = "a stretch of a few instructions with IF set is interpreted without a look at interrupts"
_DATA = "DR0-DR3 watch neither data nor ports, and nothing that user code does"
_MONITOR = "user code reaches the host's MONITOR and MWAIT"

_APIC = "CPUID is what KVM was told once, whatever IA32_APIC_BASE says"

KNOWN: dict[str, dict[str, str]] = {
    "kvm": {
        "an xAPIC that is disabled, and enabled again": _APIC,
    },
    "software KVM": {
        "an xAPIC that is disabled, and enabled again": _APIC,
        "every reserved bit of CR4": "SMAP and PKE are accepted, though CPUID shows neither",
        "#GP interrupt through a missing gate in user": _INT,
        "INT in user": _INT,
        "INT through a gate of the kernel's": _INT,
        "a call gate, and back": "user code's far call reaches the host's tables",
        "IOPL 3": "user code runs without I/O privilege",
        "the TSC is set, and its adjustment follows": "the guest's TSC is the host's",
        "#NP gate": "a fault in the delivery of a benign fault becomes #DF",
        "syscall and sysret": _SYSTEM_CALL,
        "SYSRET in kernel": _SYSTEM_CALL,
        "a SYSRET that sets TF traps at once": _SYSTEM_CALL,
        "RDGSBASE in kernel": _FSGSBASE,
        "RDGSBASE in user": _FSGSBASE,
        "LSL in user": _SELECTORS,
        "MOV_SREG in user": _SELECTORS,
        "PUSH_SREG in user": _SELECTORS,
        "POP_SREG in user": _SELECTORS,
        "LFS in user": _SELECTORS,
        "LGS in user": _SELECTORS,
        "PUSHF in user": _FLAGS,
        "PUSHFQ in user": _FLAGS,
        "POPF in user": _FLAGS,
        "POPFQ in user": _FLAGS,
        "IRET in kernel": _IRET,
        "IRET in user": _IRET,
        "IRETD in kernel": _IRET,
        "IRETD in user": _IRET,
        "IRETQ in kernel": _IRET,
        "RDTSC in user": "CR4.TSD has no effect on user code",
        "XGETBV in user": "user code reads the host's XCR0",
        "MONITOR in user": _MONITOR,
        "MWAIT in user": _MONITOR,
        "a write across two pages, the second missing, writes nothing": (
            "the first page is written before the second is checked"
        ),
        "upper half of CR0": "the upper half is ignored",
        "reserved memory type": "any PAT is accepted",
        "an interrupt waits for IF": _WINDOW,
        "STI's shadow": _WINDOW,
        "STI's shadow ends with CLI": _WINDOW,
        "POPF has no shadow": _WINDOW,
        "priorities": _WINDOW,
        "CR8 holds an interrupt back": _WINDOW,
        "MOV SS's shadow": "MOV SS doesn't hold back a single-step trap",
        **dict.fromkeys(
            (
                "a breakpoint on data",
                "a breakpoint in user code",
                "a write",
                "B0 to B3 are of this trap alone",
                "a read",
                "both breakpoints of one access",
                "an access that overlaps from below",
                "low bits of an address are ignored",
                "read, modify, write is one trap",
                "pushes",
                "a vector store",
                "a watched word in a block move stops it there",
                "a write of user code",
                "user code's stack",
                "a port",
                "a string from a port",
                "steps and data in one trap",
            ),
            _DATA,
        ),
        "a step of each element": "a repeated string instruction is one step",
    },
}
