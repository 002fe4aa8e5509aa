"""Is this host's KVM real: hardware that runs guest code as fast as the host runs its own?

Some hosts that are virtual machines themselves offer a /dev/kvm without virtualization extensions
behind it: it works, but a guest that doesn't know of it has its kernel code interpreted, at about a
millionth of a second for each instruction, and binary translation is far faster. No capability says
so. What can be seen is time: a loop that takes the host microseconds takes such a KVM milliseconds.

Source: Linux, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from collections.abc import Callable

from ringfence.cpu import cpuid, reset, state
from ringfence.engine.kvm import model, transfer
from ringfence.engine.kvm.abi import Exit
from ringfence.engine.kvm.device import PATH, HostKernel, Kernel, System, VcpuFile
from ringfence.engine.kvm.verdict import Kind, Verdict
from ringfence.errors import HostError
from ringfence.memory.ram import MINIMUM_SIZE, GuestMemory
from ringfence.native.routine import routine

ITERATIONS = 4000
INSTRUCTIONS = 2 * ITERATIONS
LOOP = b"\xb9" + struct.pack("<I", ITERATIONS) + bytes.fromhex("ffc9 75fc")
"""mov ecx, ITERATIONS; 1: dec ecx; jnz 1b"""
RET, HLT = b"\xc3", b"\xf4"
CODE, PML4 = 0x8000, 0x1000
TRIES = 3
ENTRY_NS = 500_000
"""What entering and leaving a guest may cost; on hardware, nested too, it is a tenth or less."""
SLOWER = 20
"""How much slower than on the host the loop itself may be."""


def probe_host() -> Verdict:
    """Try this host's /dev/kvm out."""
    return examine(HostKernel())


def examine(kernel: Kernel, clock: Callable[[], int] = time.perf_counter_ns) -> Verdict:
    """Try a KVM out, in a few milliseconds."""
    try:
        system = System(kernel)
        try:
            guest_ns, host_ns = _measure(system, clock)
        finally:
            system.close()
    except HostError as error:
        return Verdict(Kind.NONE, str(error))
    if guest_ns <= ENTRY_NS + SLOWER * host_ns:
        return Verdict(Kind.HARDWARE, f"{PATH} works, on hardware", guest_ns, host_ns)
    speed = INSTRUCTIONS * 1e3 / guest_ns
    return Verdict(
        Kind.SOFTWARE,
        f"{PATH} is a software KVM: it ran {speed:.1f} million instructions a second, binary"
        " translation is faster",
        guest_ns,
        host_ns,
    )


def _measure(system: System, clock: Callable[[], int]) -> tuple[int, int]:
    """Nanoseconds in the guest and on the host, each the best of a few tries."""
    native = routine(LOOP + RET)
    host: list[int] = []
    for _ in range(TRIES):
        began = clock()
        native()
        host.append(clock() - began)
    memory = GuestMemory(MINIMUM_SIZE)
    try:
        vm = system.create_vm()
        try:
            rows = model.offered(cpuid.build_cpuid(cpuid.host_cpuid), system.supported_cpuid())
            vm.prepare(model.msr_filter())
            vm.set_memory(0, 0, memory.size, memory.host_base, log=False)
            vcpu = vm.create_vcpu(0)
            try:
                vcpu.set_cpuid(model.cpuid_entries(rows))
                return _measure_guest(vcpu, memory, clock, min(host)), min(host)
            finally:
                vcpu.close()
        finally:
            vm.close()
    finally:
        memory.close()


def _measure_guest(
    vcpu: VcpuFile, memory: GuestMemory, clock: Callable[[], int], host_ns: int
) -> int:
    """The same for the guest; it stops as soon as the answer is plain."""
    for level, entry in enumerate((PML4 + 0x1000 | 3, PML4 + 0x2000 | 3, 0x83)):  # one 2 MiB page
        memory.write(PML4 + level * 0x1000, struct.pack("<Q", entry))
    memory.write(CODE, LOOP + HLT)
    room = ctypes.create_string_buffer(state.Cpu.size + 64)
    view = state.Cpu.at(ctypes.addressof(room) + 63 & ~63)
    boot = reset.EntryState(
        rip=CODE, rsp=CODE, rsi=0, cr3=PML4, cr0=0x80000011, cr4=0x20, efer=0x500,
        gdt_base=0, gdt_limit=0, cs=0x10, ds=0x18,
    )  # fmt: skip
    reset.set_boot_state(view, boot)
    best = 0
    for _ in range(TRIES):
        transfer.load(vcpu, view)
        began = clock()
        error = vcpu.enter()
        took = clock() - began
        if error == errno.EINTR:
            continue
        if error or vcpu.run.exit_reason != Exit.HLT:
            raise HostError(
                f"{PATH} can't run a loop (error {error}, exit {vcpu.run.exit_reason}):"
                " use --engine translate"
            )
        best = min(best or took, took)
        if best <= ENTRY_NS + SLOWER * host_ns:
            break
    if not best:
        raise HostError(f"{PATH} was interrupted in each of {TRIES} tries: try again")
    return best
