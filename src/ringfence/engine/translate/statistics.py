"""What a vCPU's block has counted, under the names that owners see."""

from __future__ import annotations

from typing import Any

from ringfence.cpu import state
from ringfence.cpu.tsc import host_hz
from ringfence.engine.exits import Reason


def events(view: Any) -> dict[str, dict[str, int]]:
    """Interrupts by vector, and exceptions by name."""
    vectors = {f"{n:#04x}": count for n, count in enumerate(list(view.interrupts)) if count}
    exceptions = {
        state.EXCEPTION_NAMES.get(n, str(n)): count
        for n, count in enumerate(list(view.exceptions))
        if count
    }
    return {"interrupts": vectors, "exceptions": exceptions}


def answered(view: Any) -> dict[Reason, int]:
    """Accesses to devices that native code has done."""
    return {
        Reason.MMIO_READ: view.answered_reads,
        Reason.MMIO_WRITE: view.answered_writes,
    }


def dispatch(view: Any) -> dict[str, int]:
    """How control went from trace to trace."""
    return {
        "lookups": view.lookups,
        "misses": view.lookup_misses,
        "links": view.links,
        "attentions": view.attentions,
        "effects": view.effect_calls,
        "yields": view.yields,
        "slow_accesses": view.slow_accesses,
    }


def tlb(view: Any) -> dict[str, int]:
    """What the TLBs missed, and lost."""
    return {
        "misses": view.tlb_misses,
        "walks": view.walks,
        "walk_references": view.walk_references,
        "flushes": view.tlb_flushes,
        "page_flushes": view.tlb_page_flushes,
    }


def times(spent: dict[str, int], ticks: int, direct: int) -> dict[str, int]:
    """Nanoseconds by what they were spent on.

    Traces are made inside guest code's time (``ticks`` of the host's counter), and so does user
    code run directly (``direct`` nanoseconds); Python's answers about opcodes are given outside.
    """
    building = ticks * 1_000_000_000 // host_hz()
    return {
        "guest": max(0, spent["guest"] - building - direct),
        "direct": direct,
        "vmm": spent["vmm"],
        "translation": spent["asking"] + building,
        "idle": spent["idle"],
    }
