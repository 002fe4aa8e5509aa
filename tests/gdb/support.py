"""A client that speaks GDB's protocol, and breaks it on request; a small guest to look at."""

from __future__ import annotations

import socket

from ringfence.gdb.packets import frame
from ringfence.images.builtin import LOAD_ADDRESS, assemble, elf_kernel

SOURCE = """
.intel_syntax noprefix
.text
start:  mov ecx, 3
again:  mov [rip + counter], rcx
        mov rax, [rip + counter]
        dec ecx
        jnz again
spin:   inc rbx
        jmp spin
.balign 4096
counter: .quad 0
"""
START, AGAIN, LOADED, DEC, SPIN = (LOAD_ADDRESS + at for at in (0, 5, 12, 19, 23))
COUNTER = LOAD_ADDRESS + 4096
PATIENCE = 30.0


def kernel() -> bytes:
    """The guest."""
    return elf_kernel(assemble(SOURCE), LOAD_ADDRESS)


class Client:
    """One connection; `ask` sends a packet and gives the reply."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(PATIENCE)
        self._data = b""

    def without_acknowledgements(self) -> None:
        """What GDB does first."""
        assert self.ask(b"QStartNoAckMode") == b"OK"
        self.socket.sendall(b"+")

    def ask(self, payload: bytes) -> bytes:
        self.socket.sendall(frame(payload))
        return self.reply()

    def reply(self) -> bytes:
        """The next packet."""
        while b"#" not in self._data or len(self._data) < self._data.index(b"#") + 3:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._data += data
        packet, _, self._data = self._data.partition(b"#")
        self._data = self._data[2:]
        return packet.partition(b"$")[2]

    def close(self) -> None:
        self.socket.close()
