"""What test kernels expect of a machine: a way to end it with a status, and to say something.

- `DebugExit`, QEMU's isa-debug-exit: a write of v ends the machine with status ``v << 1 | 1``.
- `DebugConsole`, Bochs' port 0xe9: each byte written goes to a sink; reading gives 0xe9.
- `TestPorts`, QEMU's pc-testdev: ports that hold what was written to them, a port for each
  interrupt line, and memory that is a device.

Source: QEMU, hw/misc/debugexit.c and hw/misc/pc-testdev.c describe by their code what they do.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.board import Board
from ringfence.chipset.state import Saved

EXIT_PORT, EXIT_PORTS = 0xF4, 4
CONSOLE_PORT = 0xE9
LATCH_PORT, FLUSH_PORT, BYTE_LATCH_PORT = 0xE0, 0xE4, 0xE8
IRQ_PORT, IRQ_LINES = 0x2000, 24
MEMORY_BASE, MEMORY_LENGTH = 0xFF00_0000, 0x1_0000


class DebugExit(Saved):
    """Ports whose writes end the machine: ``on_exit`` is given the exit status, 0 to 255."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def attach(self, board: Board, port: int = EXIT_PORT) -> None:
        """Take four ports from ``port`` on."""
        board.ports.register(port, EXIT_PORTS, self)
        board.add("debug_exit", self)

    def read(self, offset: int, size: int) -> int:
        """Read zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine."""
        self._on_exit((value << 1 | 1) & 0xFF)


class DebugConsole(Saved):
    """One port for bytes to ``sink``."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink

    def attach(self, board: Board, port: int = CONSOLE_PORT) -> None:
        """Take the port."""
        board.ports.register(port, 1, self, widths=(1,))
        board.add("debug_console", self)

    def read(self, offset: int, size: int) -> int:
        """Read what shows that it is there."""
        return CONSOLE_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        """Say a byte."""
        self._sink(bytes([value]))


class Latch(Saved):
    """Bytes that read as they were written, in any size."""

    FIELDS = ("content",)

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        """Read what was written."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it."""
        self.content[offset : offset + size] = value.to_bytes(size, "little")


class TestPorts(Saved):
    """Latches, interrupt lines and device memory of pc-testdev."""

    __test__ = False  # for pytest: this is no test

    FIELDS = ()

    def __init__(self, board: Board) -> None:
        self._set_line = board.ioapic.set_irq
        self._set_irq = board.set_irq

    def attach(self, board: Board) -> None:
        """Take ports and memory."""
        for name, base, length in (
            ("test_latch", LATCH_PORT, 4),
            ("test_flush", FLUSH_PORT, 4),
            ("test_byte_latch", BYTE_LATCH_PORT, 1),
        ):
            latch = Latch(length)
            board.ports.register(base, length, latch)
            board.add(name, latch)
        memory = Latch(MEMORY_LENGTH)
        board.mmio.register(MEMORY_BASE, MEMORY_LENGTH, memory)
        board.add("test_memory", memory)
        board.ports.register(IRQ_PORT, IRQ_LINES, self, widths=(1,))
        board.add("test_lines", self)

    def read(self, offset: int, size: int) -> int:
        """Read zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Drive an interrupt line."""
        if offset < 16:
            self._set_irq(offset, bool(value))
        else:
            self._set_line(offset, bool(value))
