"""What reaches a CPU from its local APIC besides interrupts: NMI, INIT and start-up (SIPI).

`note` is called by whoever carries the message, from any thread but one at a time (the board's lock
is held); it only takes down what came. The CPU's own thread looks at the notes between two
instructions and acts on them: `initialize` for INIT, `start` for a SIPI in the state that INIT
leaves an application processor in. A SIPI that comes while the CPU runs is lost, as on hardware;
one that comes behind an INIT that has not been seen yet is kept.

Sources: Intel SDM vol. 3, 9.4.4 (INIT-SIPI-SIPI), table 10-1 (state after INIT), 7.7.1 (NMI); 25.7
("wait-for-SIPI").
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from ringfence.cpu import reset
from ringfence.cpu.ports import interrupts_enabled
from ringfence.cpu.state import CS, Cpu
from ringfence.native.dialect import native_inline

MAX_NMIS = 2
"""NMIs that are kept: a CPU takes one at the next boundary and latches another until IRET. Further
ones merge with that (SDM vol. 3, 7.7.1)."""


class Signal(IntEnum):
    """Messages for the CPU itself, numbered as an APIC's delivery modes (SDM vol. 3, 11.6.1)."""

    SMI = 2
    NMI = 4
    INIT = 5
    SIPI = 6


def note(cpu: Any, kind: int, vector: int) -> bool:
    """Take down a message for a ``Cpu`` view; whether there is something to do now.

    SMIs go nowhere: there is no system management mode.
    """
    if kind == Signal.NMI:
        if cpu.wait_for_sipi:
            return False
        limit = 1 if cpu.nmi_blocked else MAX_NMIS
        cpu.nmi_pending = min(cpu.nmi_pending + 1, limit)
    elif kind == Signal.INIT:
        cpu.init_pending = 1
        cpu.sipi_pending = 0
    elif kind == Signal.SIPI and (cpu.wait_for_sipi or cpu.init_pending):
        cpu.sipi_vector = vector & 0xFF
        cpu.sipi_pending = 1
    else:
        return False
    return True


def initialize(cpu: Any, boot: bool) -> None:
    """Do what INIT does; the boot CPU goes on at the reset vector, others wait for a SIPI."""
    sipi = cpu.sipi_pending, cpu.sipi_vector
    reset.initialize(cpu)
    cpu.sipi_pending, cpu.sipi_vector = sipi
    cpu.wait_for_sipi = not boot


def start(cpu: Any) -> bool:
    """Begin at the page that a SIPI names, in real mode, if one has come."""
    if not cpu.sipi_pending:
        return False
    cpu.sipi_pending = cpu.wait_for_sipi = 0
    cpu.seg_selector[CS] = cpu.sipi_vector << 8
    cpu.seg_base[CS] = cpu.sipi_vector << 12
    cpu.rip = cpu.next_rip = 0
    return True


@native_inline
def unblock_nmi(cpu: Cpu) -> int:
    """IRET ends the blocking of NMIs (SDM vol. 3, 7.7.1)."""
    cpu.nmi_blocked = 0
    if cpu.nmi_pending:
        interrupts_enabled(cpu)
    return 0
