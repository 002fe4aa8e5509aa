"""Port accesses that need not leave guest code one by one: the console's bytes and its status.

A kernel's console asks the UART for its status and writes a byte, thousands of times. While the
board says that nothing else can come of it, bytes are gathered in the block and the status is a
constant; the VMM takes the bytes at the next exit of any kind, or after a few milliseconds. KVM
calls the first half coalesced port I/O.
"""

from __future__ import annotations

from ringfence.cpu.portio import fx_in, fx_out
from ringfence.cpu.state import EXIT, EXIT_PORT_IN, EXIT_PORT_OUT, OK, RAX
from ringfence.engine.translate.block import GATHER_MAX, Vcpu
from ringfence.native.dialect import native


@native
def fx_out_gathered(vcpu: Vcpu) -> int:
    """OUT, as ``fx_out``, but for bytes that may wait."""
    status = fx_out(vcpu)
    if status != EXIT or vcpu.exit_reason != EXIT_PORT_OUT or not vcpu.gather:
        return status
    if vcpu.exit_data[0] != vcpu.gather_write or vcpu.exit_data[1] != 1:
        return status
    count = vcpu.gathered_count
    if count >= GATHER_MAX:
        return status
    vcpu.gathered[count] = vcpu.exit_data[2]
    vcpu.gathered_count = count + 1
    vcpu.rip = vcpu.next_rip
    return OK


@native
def fx_in_gathered(vcpu: Vcpu) -> int:
    """IN, as ``fx_in``, but for the status that does not change."""
    status = fx_in(vcpu)
    if status != EXIT or vcpu.exit_reason != EXIT_PORT_IN or not vcpu.gather:
        return status
    if vcpu.exit_data[0] != vcpu.gather_read or vcpu.exit_data[1] != 1:
        return status
    vcpu.gpr[RAX] = (vcpu.gpr[RAX] & ~0xFF) | vcpu.gather_value
    vcpu.rip = vcpu.next_rip
    return OK
