"""The oracle: runs snippets on the host's CPU, in a child that maps memory as the guest does.

Parent and child share this module: the layout of the snippet's address space, what a case is
(``Case``) and what comes out (``Outcome``). The child is a plain interpreter that maps the buffers
at their fixed addresses, installs signal handlers written in machine code, and runs one batch of
cases after the other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

PAGE = 4096
DATA = 0x6000_0000
"""Linear address of the data buffer: pages in this order, see ``PAGES``."""
ALIAS = 0x3456_6000_0000
"""The same pages again, where addresses need 47 bits."""
RW, RO, HOLE = "rw", "ro", "hole"
PAGES = (RW, RW, RW, RW, HOLE, RO, HOLE, RW)
DATA_BYTES = len(PAGES) * PAGE
CODE = 0x6100_0000
CODE_PAGES = 1024
CODE_BYTES = CODE_PAGES * PAGE
CONTROL = 0x6200_0000
"""The child's own pages: values going in and out, then its machine code."""
LDT = ((CODE, 0xFFFF, 0xFA), (DATA, DATA_BYTES - 1, 0xF2))
"""Segments of 16-bit code: base, limit, and what is in a descriptor's sixth byte."""
CODE16, DATA16 = 0x07, 0x0F
STATUS_FLAGS = 0x8D5
DIRECTION = 0x400

XSAVE_BYTES = 2432
"""An XSAVE area compacted with all components up to AVX-512's."""
OPMASK, ZMM_HI256, HI16_ZMM = 832, 896, 1408


def _has_avx512() -> bool:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return {"avx512f", "avx512dq", "avx512bw", "avx512vl", "xsavec"} <= set(flags)


WIDE = _has_avx512()
"""Whether the host has AVX-512: its state is then part of each case."""
COMPONENTS = 0xE7 if WIDE else 7
END_BYTES = 7
"""Room that a snippet leaves behind itself for the code that ends it."""
NO_TRAP = -1
GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip


def _pattern() -> bytes:
    """What the data buffer holds before every case."""
    import random

    source = random.Random("data")
    return source.randbytes(DATA_BYTES)


PATTERN = _pattern()


@dataclass
class Case:
    """A snippet with everything that it starts from.

    ``end`` is the offset of the place where it is over (there ``END_BYTES`` are free).
    """

    address: int
    code: bytes
    end: int
    gpr: list[int]
    flags: int = 0x202
    vector: bytes = b""
    fs_base: int = 0
    gs_base: int = 0
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset in the data buffer, bytes) on top of ``PATTERN``."""
    text: str = ""


@dataclass
class Outcome:
    """State at the end of a snippet."""

    gpr: tuple[int, ...]
    flags: int
    vector: bytes
    data: bytes
    """The data buffer; empty if it is as it was."""
    trap: int = NO_TRAP
    error: int = 0
    address: int = 0
    """CR2 of a page fault."""
    rip: int = 0


def initial_vector() -> bytearray:
    """An XSAVE area with all components present and zero."""
    area = bytearray(XSAVE_BYTES)
    struct.pack_into("<HHB", area, 0, 0x37F, 0, 0)
    struct.pack_into("<II", area, 24, 0x1F80, 0xFFFF)
    struct.pack_into("<Q", area, 512, COMPONENTS)
    return area


def put_vector(area: bytearray, n: int, data: bytes) -> None:
    """Set vector register ``n`` of an area, from its low end."""
    places = [(160 + 16 * n, 16), (576 + 16 * n, 16), (ZMM_HI256 + 32 * n, 32)]
    for at, size in places if n < 16 else [(HI16_ZMM + 64 * (n - 16), 64)]:
        piece, data = data[:size], data[size:]
        area[at : at + len(piece)] = piece


def normal_vector(area: bytes) -> bytes:
    """The architectural content of an XSAVE area: no instruction pointers, no unused bytes."""
    present = area[512]
    legacy = area[0:5] if present & 1 else b"\x7f\x03\0\0\0"
    registers = (
        b"".join(area[32 + 16 * n : 42 + 16 * n] for n in range(8)) if present & 1 else bytes(80)
    )
    xmm = area[160:416] if present & 2 else bytes(256)
    ymm = area[576:832] if present & 4 else bytes(256)
    opmask = area[OPMASK:ZMM_HI256] if present & 0x20 else bytes(64)
    high = area[ZMM_HI256:HI16_ZMM] if present & 0x40 else bytes(512)
    more = area[HI16_ZMM:XSAVE_BYTES] if present & 0x80 else bytes(1024)
    return legacy + area[24:28] + registers + xmm + ymm + opmask + high + more


# --- the child -------------------------------------------------------------------------------

_GPR_IN, _FLAGS_IN, _TARGET, _HOST_RSP = 0x000, 0x080, 0x088, 0x090
_FS, _GS, _HOST_FS = 0x098, 0x0A0, 0x0A8
_CAPTURE = 0x0B0
_GPR_OUT, _FLAGS_OUT, _TRAP, _ERROR, _CR2, _RIP = 0x100, 0x180, 0x188, 0x190, 0x198, 0x1A0
_STACK = 0x3F0
_PROGRAM = 0x1000
_XSAVE_IN, _XSAVE_OUT, _XSAVE_HOST = 0x2000, 0x3000, 0x4000
_CONTROL_BYTES = 0x5000
# Positions of registers in ucontext_t's gregs on x86-64 Linux.
_GREGS = (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)
_GREG_RIP, _GREG_FLAGS, _GREG_ERR, _GREG_TRAP, _GREG_CR2 = 16, 17, 19, 20, 22
_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)

END_NATIVE = b"\xff\x24\x25" + struct.pack("<I", CONTROL + _CAPTURE)
"""``jmp [CAPTURE]``."""


def _store(register: int, offset: int) -> bytes:
    rex = 0x48 | (register >> 3) << 2
    return bytes((rex, 0x89, 0x04 | (register & 7) << 3, 0x25)) + _at(offset)


def _load(register: int, offset: int) -> bytes:
    rex = 0x48 | (register >> 3) << 2
    return bytes((rex, 0x8B, 0x04 | (register & 7) << 3, 0x25)) + _at(offset)


def _at(offset: int) -> bytes:
    return struct.pack("<I", CONTROL + offset)


def _arch_prctl(code: int, offset: int, *, address: bool = False) -> bytes:
    load = b"\x48\xc7\xc6" + _at(offset) if address else _load(6, offset)
    return b"\xbf" + struct.pack("<I", code) + load + b"\xb8\x9e\0\0\0\x0f\x05"


_ALL_STATE = b"\xb8" + struct.pack("<I", COMPONENTS) + b"\x31\xd2"  # mov eax, …; xor edx, edx
_XRSTOR = b"\x48\x0f\xae\x2c\x25"
_XSAVE = b"\x48\x0f\xc7\x24\x25" if WIDE else b"\x48\x0f\xae\x24\x25"  # XSAVEC or XSAVE
_STMXCSR = b"\x0f\xae\x1c\x25"
_SAVED = bytes.fromhex("53 55 4154 4155 4156 4157")
_RESTORED = bytes.fromhex("415f 415e 415d 415c 5d 5b")


def program() -> tuple[bytes, int, int]:
    """The child's machine code and the offsets of its capture and signal routines."""
    enter = _SAVED + _store(4, _HOST_RSP)
    enter += _arch_prctl(0x1003, _HOST_FS, address=True)  # ARCH_GET_FS
    enter += _arch_prctl(0x1001, _GS) + _arch_prctl(0x1002, _FS)
    enter += _ALL_STATE + _XSAVE + _at(_XSAVE_HOST) + _XRSTOR + _at(_XSAVE_IN)
    enter += b"\x48\xc7\xc4" + _at(_STACK)
    enter += b"\xff\x34\x25" + _at(_FLAGS_IN) + b"\x9d"
    enter += b"".join(_load(n, _GPR_IN + 8 * n) for n in range(16))
    enter += b"\xff\x24\x25" + _at(_TARGET)
    capture = b"".join(_store(n, _GPR_OUT + 8 * n) for n in range(16))
    capture += b"\x48\xc7\xc4" + _at(_STACK) + b"\x9c\x8f\x04\x25" + _at(_FLAGS_OUT)
    finish = b"\x48\xc7\xc4" + _at(_STACK) + b"\x6a\x02\x9d"  # push 2; popfq
    finish += _ALL_STATE + _XSAVE + _at(_XSAVE_OUT) + _STMXCSR + _at(_XSAVE_OUT + 24)
    finish += _XRSTOR + _at(_XSAVE_HOST)
    finish += _arch_prctl(0x1002, _HOST_FS)
    finish += _load(4, _HOST_RSP) + _RESTORED + b"\xc3"
    handler = b""
    places = [(n, _GPR_OUT + 8 * i) for i, n in enumerate(_GREGS)]
    places += [(_GREG_RIP, _RIP), (_GREG_FLAGS, _FLAGS_OUT), (_GREG_ERR, _ERROR)]
    places += [(_GREG_TRAP, _TRAP), (_GREG_CR2, _CR2)]
    for greg, offset in places:
        handler += b"\x48\x8b\x82" + struct.pack("<I", 40 + 8 * greg) + _store(0, offset)
    handler += b"\x48\x8b\x8a" + struct.pack("<I", 40 + 8 * 23)  # mov rcx, [rdx + fpstate]
    handler += _ALL_STATE + b"\x48\x0f\xae\x29"  # xrstor64 [rcx]
    code = enter + capture + finish
    at = len(code)
    back = len(enter) + len(capture)
    handler += b"\xe9" + struct.pack("<i", back - (at + len(handler) + 5))
    return code + handler, len(enter), at


class _Sigaction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Stack(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class Runner:
    """Inside the child: the mapped memory and the way in."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        ]  # fmt: skip
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc = libc
        data = os.memfd_create("data")
        os.ftruncate(data, DATA_BYTES)
        code = os.memfd_create("code")
        os.ftruncate(code, CODE_BYTES)
        everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        both = mmap.PROT_READ | mmap.PROT_WRITE
        self.map(DATA, DATA_BYTES, both, data)
        self.map(ALIAS, DATA_BYTES, both, data)
        self.map(CODE, CODE_BYTES, everything, code)
        self.map(CONTROL, _CONTROL_BYTES, everything, -1)
        self.open = libc.mmap(None, DATA_BYTES, both, mmap.MAP_SHARED, data, 0)
        for n, kind in enumerate(PAGES):
            protection = {RW: both, RO: mmap.PROT_READ, HOLE: 0}[kind]
            for base in (DATA, ALIAS):
                if libc.mprotect(base + n * PAGE, PAGE, protection):
                    raise OSError("mprotect")
                if kind != HOLE:
                    ctypes.string_at(base + n * PAGE, 1)  # so that the host has it present, too
        for number, (base, limit, access) in enumerate(LDT):
            contents = 2 if access & 8 else 0
            entry = struct.pack("<4I", number, base, limit, contents << 1 | 0x40)
            if libc.syscall(154, 0x11, entry, len(entry)):  # modify_ldt
                raise OSError("modify_ldt")
        text, capture, handler = program()
        ctypes.memmove(CONTROL + _PROGRAM, text, len(text))
        self.poke(_CAPTURE, CONTROL + _PROGRAM + capture)
        stack = ctypes.create_string_buffer(1 << 16)
        self.stack = stack
        described = _Stack(ctypes.addressof(stack), 0, len(stack))
        if libc.sigaltstack(ctypes.byref(described), None):
            raise OSError("sigaltstack")
        onstack_nodefer_siginfo = 0x08000000 | 0x40000000 | 4
        action = _Sigaction(handler=CONTROL + _PROGRAM + handler, flags=onstack_nodefer_siginfo)
        for number in _SIGNALS:
            libc.sigaction(int(number), ctypes.byref(action), None)
        self.enter = ctypes.PYFUNCTYPE(None)(CONTROL + _PROGRAM)

    def map(self, address: int, size: int, protection: int, fd: int) -> None:
        """Map memory at a fixed address that must be free."""
        fixed_noreplace = 0x100000
        kind = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        found = self.libc.mmap(address, size, protection, kind | fixed_noreplace, fd, 0)
        if found != address:
            raise OSError(f"{address:#x} is not free in this process")

    @staticmethod
    def poke(offset: int, value: int) -> None:
        """Set one of the control page's words."""
        ctypes.c_uint64.from_address(CONTROL + offset).value = value

    @staticmethod
    def peek(offset: int) -> int:
        """Read one of the control page's words."""
        return ctypes.c_uint64.from_address(CONTROL + offset).value

    def run(self, case: Case) -> Outcome:
        """Run one case."""
        ctypes.memmove(self.open, PATTERN, DATA_BYTES)
        for offset, data in case.patches:
            ctypes.memmove(self.open + offset, data, len(data))
        start = ctypes.string_at(self.open, DATA_BYTES)
        ctypes.memmove(case.address, case.code, len(case.code))
        ctypes.memmove(case.address + case.end, END_NATIVE, END_BYTES)
        vector = bytearray(case.vector or initial_vector())
        if WIDE:
            struct.pack_into("<Q", vector, 520, 1 << 63 | COMPONENTS)
        vector = bytes(vector)
        ctypes.memmove(CONTROL + _XSAVE_IN, vector, XSAVE_BYTES)
        ctypes.memset(CONTROL + _XSAVE_OUT, 0, XSAVE_BYTES)
        ctypes.memset(CONTROL + _XSAVE_HOST, 0, XSAVE_BYTES)
        ctypes.memmove(CONTROL + _GPR_IN, struct.pack("<16Q", *case.gpr), 128)
        self.poke(_FLAGS_IN, case.flags & (STATUS_FLAGS | DIRECTION) | 2)
        self.poke(_TARGET, case.address)
        self.poke(_FS, case.fs_base)
        self.poke(_GS, case.gs_base)
        self.poke(_TRAP, NO_TRAP & 0xFFFFFFFFFFFFFFFF)
        self.poke(_RIP, 0)
        self.enter()
        end = ctypes.string_at(self.open, DATA_BYTES)
        trap = self.peek(_TRAP)
        gpr = struct.unpack("<16Q", ctypes.string_at(CONTROL + _GPR_OUT, 128))
        return Outcome(
            gpr,
            self.peek(_FLAGS_OUT) & (STATUS_FLAGS | DIRECTION),
            normal_vector(ctypes.string_at(CONTROL + _XSAVE_OUT, XSAVE_BYTES)),
            b"" if end == start else end,
            NO_TRAP if trap > 64 else trap,
            self.peek(_ERROR) if trap <= 64 else 0,
            self.peek(_CR2) if trap == 14 else 0,
            self.peek(_RIP),
        )


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer batches of cases until the input ends."""
    runner = Runner()
    while True:
        try:
            cases = pickle.load(source)
        except EOFError:
            return
        for case in cases:
            signal.alarm(5)
            pickle.dump(runner.run(Case(*case)), sink)
        sink.flush()


class Oracle:
    """The parent's side: starts the child, and again should a snippet have killed it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """The child, started if there is none."""
        if self.child is None or self.child.poll() is not None:
            here = Path(__file__).resolve()
            program = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import native;"
            program += "native._serve(sys.stdin.buffer, sys.stdout.buffer)"
            self.child = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self.child

    def run(self, cases: list[Case]) -> list[Outcome | None]:
        """Outcomes of some cases; None for one that killed the child."""
        done: list[Outcome | None] = []
        while len(done) < len(cases):
            child = self.start()
            assert child.stdin and child.stdout
            plain = [tuple(vars(case).values()) for case in cases[len(done) : len(done) + 64]]
            pickle.dump(plain, child.stdin)
            child.stdin.flush()
            try:
                for _ in plain:
                    done.append(_Unpickler(child.stdout).load())
            except (EOFError, pickle.UnpicklingError):
                child.wait()
                done.append(None)
        return done

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            assert self.child.stdin and self.child.stdout
            self.child.stdin.close()
            self.child.wait()
            self.child.stdout.close()
            self.child = None


class _Unpickler(pickle.Unpickler):
    """The child knows this module by another name."""

    def find_class(self, module: str, name: str) -> Any:
        return Outcome if name == "Outcome" else super().find_class(module, name)
