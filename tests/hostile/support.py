"""A guest that does its worst: the engine tests' tiny machine, run on code of any kind anywhere."""

from __future__ import annotations

import ctypes
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.harness import (
    DATA_AT,
    END_PORT,
    ERROR_CODES,
    FAULT_PORT,
    HANDLERS,
    HIGH,
    STACK_TOP,
    TABLES,
    Guest,
    Stuck,
)
from ringfence.cpu import state
from ringfence.engine import StopReason
from ringfence.images.builtin import assemble
from ringfence.memory.linear import read_linear

PAGE = 4096
M64 = (1 << 64) - 1
FREE = 0x800000
"""Guest-physical: from here on nobody uses RAM."""
MMIO = 0xFED0_0000
DONE = f"out {END_PORT}, al\n"
NAMES = {name: n for n, name in enumerate(state.GPR_NAMES)}
TIMEOUT = 8.0


def code(source: str) -> bytes:
    """Machine code of Intel-syntax assembly."""
    return assemble(f".intel_syntax noprefix\n.text\n{source}\n")


@dataclass
class End:
    """How a run came to its end: ``trap`` -1 for the snippet's own."""

    trap: int
    gpr: dict[str, int]
    error: int = 0
    rip: int = 0
    cr2: int = 0
    reason: StopReason = StopReason.PAUSED

    def __getattr__(self, name: str) -> int:
        return self.gpr[name]


class HostileGuest(Guest):
    """Adds to the tiny machine: any code, any entry point, whatever ends it."""

    def __init__(self, cache: Path | None = None) -> None:
        super().__init__(cache)
        self.next_free = FREE
        self.tables = self.next_table, self.memory.read(TABLES, DATA_AT - TABLES)

    def page(self, count: int = 1) -> int:
        """Fresh pages of guest-physical memory."""
        at = self.next_free
        self.next_free += count * PAGE
        assert self.next_free <= self.memory.size
        return at

    def reset(self) -> None:
        """Drop all translations, forget which pages are taken, put the page tables back."""
        self.next_table, tables = self.tables
        self.memory.write(TABLES, tables)
        self.forget()
        self.flush()
        self.next_free = FREE
        self.board.mmio.clear()
        self.board.mmio_writes.clear()

    def put(self, physical: int, source: str | bytes) -> int:
        """Code into physical memory, before it was ever run; its length."""
        data = code(source) if isinstance(source, str) else source
        self.memory.write(physical, data)
        return len(data)

    def begin(self, rip: int, cpl: int = 0, **registers: int) -> None:
        """Set everything up for a run; registers by name, ``cr3``, ``idt``, ``tss`` and ``gdt``."""
        view = self.view
        ctypes.memmove(self.block, self.templates[cpl], len(self.templates[cpl]))
        view.exc_vector = view.delivering = state.NO_EXCEPTION
        view.gpr[state.RSP] = HIGH + STACK_TOP - 0x800
        for name, value in registers.items():
            if name in NAMES:
                view.gpr[NAMES[name]] = value & M64
            elif name == "cr3":
                view.cr3 = value
            elif name == "flags":
                view.flag_if = value >> 9 & 1
                view.other_flags = value & state.OTHER_FLAGS
            elif name == "idt":
                view.idtr_base = value
            elif name == "gdt":
                view.gdtr_base = value
            elif name == "tss":
                view.seg_base[state.TR] = value
            else:
                raise KeyError(name)
        self.flush()
        self.engine._mode_changed(self.block)
        self.engine.set_registers({"rip": rip})
        self.engine._crash = ""

    def finish(self) -> End:
        """Run to the end."""
        self.board.last = -1
        self.deadline = time.monotonic() + TIMEOUT
        reason = self.engine.run()
        self.deadline = 0.0
        view = self.view
        gpr = dict(zip(state.GPR_NAMES, list(view.gpr), strict=True))
        if self.board.last == END_PORT:
            return End(-1, gpr)
        if self.board.last == FAULT_PORT:
            trap = (view.rip - HIGH - HANDLERS) >> 4
            rsp = view.gpr[state.RSP]
            size = 48 if trap in ERROR_CODES else 40
            frame = struct.unpack(
                f"<{size // 8}Q", read_linear(self.memory, self.engine.translate, rsp, size)
            )
            error = frame[0] if size == 48 else 0
            return End(trap, gpr, error, frame[-5], view.cr2)
        if reason is StopReason.PAUSED:
            raise Stuck(f"no end, rip={view.rip:#x}")
        return End(-2, gpr, rip=view.rip, reason=reason)

    def limited(self, seconds: float) -> StopReason:
        """Run what may never end; it ends by itself or is paused, and never with an exception."""
        self.board.last = -1
        timer = threading.Timer(seconds, self.engine.request_pause)
        watchdog = threading.Timer(10, give_up)
        timer.start()
        watchdog.start()
        try:
            return self.engine.run()
        finally:
            timer.cancel()
            watchdog.cancel()
            timer.join()
            self.engine._pause = False
            self.view.stop_request = 0

    def go(self, rip: int, cpl: int = 0, **registers: int) -> End:
        """Run from an address until something ends it."""
        self.begin(rip, cpl, **registers)
        return self.finish()

    def kernel(self, source: str | bytes, **registers: int) -> End:
        """Run code at CPL 0 in a fresh page, by its address in the top 2 GiB."""
        data = code(source) if isinstance(source, str) else source
        at = self.page(len(data) // PAGE + 1)
        self.put(at, data)
        return self.go(HIGH + at, **registers)

    def endless(self, rip: int, cpl: int = 0, patience: float = 1.0, **registers: int) -> float:
        """Run something that never ends; seconds until a request to pause was honoured."""
        self.begin(rip, cpl, **registers)
        return self.interrupted(patience)

    def interrupted(self, patience: float = 1.0) -> float:
        """Run, ask for a pause after a while; how long that took. Fails rather than hangs."""
        asked = 0.0

        def ask() -> None:
            nonlocal asked
            asked = time.monotonic()
            self.engine.request_pause()

        timer = threading.Timer(0.25, ask)
        watchdog = threading.Timer(10, give_up)
        timer.start()
        watchdog.start()
        try:
            reason = self.engine.run()
        finally:
            timer.cancel()
            watchdog.cancel()
        took = time.monotonic() - asked
        assert reason is StopReason.PAUSED, (reason, self.engine.crash_dump())
        assert took < patience, f"a pause took {took:.1f} s"
        return took


def give_up() -> None:
    """The vCPU's thread is lost in native code: end the process with the stacks of its threads."""
    import faulthandler
    import os

    faulthandler.dump_traceback(all_threads=True)
    os._exit(70)


@contextmanager
def canaries(count: int = 8) -> Iterator[list[int]]:
    """Pages of host memory that nobody may change; yields their addresses."""
    import mmap

    held: list[tuple[mmap.mmap, int, bytes]] = []
    source = random.Random("canary")
    for _ in range(count):
        pages = mmap.mmap(-1, 4 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        data = source.randbytes(4 * PAGE)
        ctypes.memmove(address, data, len(data))
        held.append((pages, address, data))
    yield [address for _, address, _ in held]
    for _, address, data in held:
        assert ctypes.string_at(address, len(data)) == data, "host memory was changed"


def guards(guest: Guest) -> list[str]:
    """Protections of the host mappings right below and above guest RAM."""
    base, size = guest.memory.host_base, guest.memory.size
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, protection = line.split()[:2]
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= base - 1 < high or low <= base + size < high:
            found.append(protection)
    return found


def host_addresses(guest: Guest) -> dict[str, int]:
    """Places in the host's address space that a guest would like to reach."""
    libc: Any = ctypes.CDLL(None)
    return {
        "ram": guest.memory.host_base,
        "below ram": guest.memory.host_base - 8,
        "above ram": guest.memory.host_base + guest.memory.size,
        "block": guest.block,
        "code": guest.engine.translator.cache.base,
        "code alias": guest.engine.translator.cache.alias,
        "traces": guest.view.trace_table,
        "libc": ctypes.cast(libc.printf, ctypes.c_void_p).value or 0,
        "enter": guest.engine.library.address("rf_enter"),
        "stack": ctypes.addressof(ctypes.c_int()),
    }
