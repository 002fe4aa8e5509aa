"""PAUSE: a guest that waits for another vCPU must not keep that vCPU from running.

The host may have fewer CPUs than the guest. A vCPU that spins on a lock then uses up its share of
time while the lock's owner waits for its own. PAUSE marks such loops; where there are several
vCPUs, every so often it gives the host's CPU away. Processors do it alike for hypervisors (AMD APM
vol. 2, 15.14.4, pause filter).
"""

from __future__ import annotations

from ringfence.cpu.state import OK
from ringfence.engine.translate.block import Vcpu
from ringfence.native.dialect import native, sched_yield

PAUSES = 512
"""PAUSEs of one vCPU between two offers: some ten or twenty microseconds, far more than
a lock is held whose owner runs."""


@native
def fx_pause(vcpu: Vcpu) -> int:
    """PAUSE, when the vCPU has spun for long enough."""
    vcpu.pauses_left = PAUSES
    vcpu.yields += 1
    sched_yield()
    vcpu.rip = vcpu.next_rip
    return OK
