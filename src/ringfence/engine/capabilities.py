"""What an engine can and can't do, said in a form that tests and the command line can ask."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """Modes of an x86-64 CPU that guest code may run in (AMD APM vol. 2, 1.3)."""

    LONG = "64-bit"
    COMPATIBILITY = "compatibility"
    PROTECTED = "protected"
    VIRTUAL_8086 = "virtual-8086"
    REAL = "real"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What differs between engines by design; anything else that differs is a bug.

    The defaults are the least that an engine offers.

    Attributes
    ----------
    modes : frozenset[Mode]
        Modes in which guest code runs; a guest that enters another ends with status 4.
    vcpus : int
        The most vCPUs that a machine can have.
    breakpoints : bool
        Whether the guest's DR0-DR3 fire.
    alignment_checks : bool
        Whether RFLAGS.AC with CR0.AM makes misaligned accesses of user code trap.
    dirty_log : bool
        Whether the engine can say which pages of RAM the guest has written.
    scaled_tsc : bool
        Whether the guest's time-stamp counter may have another rate than the host's.
    hypercalls : bool
        Whether the guest's hypercalls reach us.
    """

    modes: frozenset[Mode] = frozenset({Mode.LONG})
    vcpus: int = 1
    breakpoints: bool = False
    alignment_checks: bool = False
    dirty_log: bool = False
    scaled_tsc: bool = False
    hypercalls: bool = False


TRANSLATE = Capabilities(
    modes=frozenset(Mode),
    vcpus=32,
    breakpoints=True,
    dirty_log=True,
    scaled_tsc=True,
    hypercalls=True,
)
KVM = Capabilities(
    modes=frozenset(Mode), vcpus=32, breakpoints=True, alignment_checks=True, dirty_log=True
)
