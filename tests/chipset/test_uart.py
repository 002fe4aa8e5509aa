"""The 16550A: what Linux's 8250 driver probes, the FIFO, interrupts, output batching."""

from __future__ import annotations

import pytest

from chipset.conftest import Rig
from ringfence.chipset.uart import POLLING

BASE = 0x3F8
RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(BASE, BASE + 8)


@pytest.fixture
def uart(rig):
    rig.start_pic()
    return rig


def drain(rig) -> bytes:
    data = bytearray()
    while rig.inb(LSR) & 1:
        data.append(rig.inb(RBR))
    return bytes(data)


def test_probe_as_16550a(uart) -> None:
    uart.out(IER, 0)
    assert uart.inb(IER) == 0
    uart.out(IER, 0xFF)
    assert uart.inb(IER) == 0x0F
    uart.out(IER, 0)
    uart.out(MCR, 0x1A)
    assert uart.inb(MSR) & 0xF0 == 0x90
    uart.out(MCR, 0x08)
    assert uart.inb(MSR) & 0xF0 == 0xB0
    uart.out(IIR, 0x01)
    assert uart.inb(IIR) >> 6 == 3
    uart.out(IIR, 0x21)
    assert uart.inb(IIR) >> 5 == 6  # no 64-byte FIFO
    uart.out(IIR, 0x00)
    assert uart.inb(IIR) == 0x01
    uart.out(SCR, 0x5A)
    assert uart.inb(SCR) == 0x5A


def test_fifo_holds_16_in_loopback(uart) -> None:
    uart.out(IIR, 0x07)
    uart.out(MCR, 0x10)
    for value in range(256):
        uart.out(RBR, value)
    assert uart.inb(LSR) == 0x63
    assert drain(uart) == bytes(range(16))
    assert uart.console == b""


def test_divisor_latch(uart) -> None:
    uart.out(LCR, 0x83)
    uart.out(RBR, 0x34)
    uart.out(IER, 0x12)
    assert (uart.inb(RBR), uart.inb(IER)) == (0x34, 0x12)
    uart.out(LCR, 0x03)
    assert uart.inb(IER) == 0
    assert uart.console == b""


def test_output_goes_out_at_newline_or_after_a_while(uart) -> None:
    uart.out(RBR, *b"hello\n")
    assert uart.console == b"hello\n"
    uart.out(RBR, *b"login: ")
    assert uart.console == b"hello\n"
    uart.clock.advance(2_000_000)
    assert uart.console == b"hello\nlogin: "
    uart.out(RBR, *b"x" * 2000)
    assert len(uart.console) > 1500
    uart.board.flush()
    assert len(uart.console) == 2013


@pytest.mark.parametrize("setup", [(), ((MCR, 0x10),), ((LCR, 0x83),), ((IER, 0x02),)])
def test_gathered_bytes_are_bytes_written(setup) -> None:
    """What an engine has gathered does the same as one write after the other."""
    for data in (b"one\ntwo", b"x" * 5000, b""):
        one, other = Rig(), Rig()
        for rig in (one, other):
            for port, value in setup:
                rig.out(port, value)
        one.board.write_gathered(data)
        for value in data:
            other.out(RBR, value)
        for rig in (one, other):
            rig.board.flush()
        assert one.console == other.console
        assert one.board.uart.save() == other.board.uart.save()


def test_the_transmit_interrupt(uart) -> None:
    uart.out(IER, 0x02)
    assert uart.take() == 0x34
    assert uart.inb(IIR) == 0x02
    assert uart.inb(IIR) == 0x01
    uart.out(IER, 0x00)
    uart.out(IER, 0x02)  # enabling it again raises it again
    assert uart.inb(IIR) == 0x02
    uart.out(0x20, 0x20)
    uart.out(RBR, 0x41)
    assert uart.take() == 0x34
    assert uart.inb(IIR) == 0x02


@pytest.mark.parametrize(
    ("fcr", "count", "iir"),
    [(0x00, 1, 0x04), (0x01, 1, 0xC4), (0x41, 3, 0xCC), (0x41, 4, 0xC4), (0xC1, 13, 0xCC)],
)
def test_receive_interrupts(uart, fcr, count, iir) -> None:
    uart.out(IIR, fcr)
    uart.out(IER, 0x01)
    uart.board.receive(bytes(range(count)))
    assert uart.take() == 0x34
    assert uart.inb(IIR) == iir
    assert drain(uart) == bytes(range(count))
    assert uart.inb(IIR) & 0x0F == 0x01


def test_host_queue_refills_the_fifo(uart) -> None:
    data = bytes(range(256)) * 4
    uart.out(IIR, 0x01)
    uart.board.receive(data)
    assert len(uart.board.uart.fifo) == 16
    assert drain(uart) == data
    assert uart.inb(LSR) == 0x60
    assert uart.board.uart.pending_input() == 0


def test_input_typed_before_the_driver_is_up_survives_it(uart) -> None:
    uart.board.receive(b"early")
    uart.out(MCR, 0x08)
    uart.out(IIR, 0x01)
    uart.out(IIR, 0x07)
    uart.out(IIR, 0x00)
    uart.inb(LSR)
    uart.inb(RBR)
    uart.out(IIR, 0x01)
    uart.out(MCR, 0x0B)
    assert drain(uart) == b"early"


def test_restore_keeps_input(uart) -> None:
    uart.out(IIR, 0x01)
    uart.out(RBR, 0x41)
    uart.board.receive(bytes(range(40)))
    state = uart.board.uart.save()
    assert uart.console == b"A"
    drain(uart)
    uart.board.uart.restore(state)
    assert drain(uart) == bytes(range(40))


def test_a_guest_that_polls_without_rts_gets_input(uart) -> None:
    """As UEFI's driver does; one that only writes looks at LSR once for each byte."""
    uart.out(MCR, 0)
    uart.board.receive(b"x")
    for _ in range(100):
        assert not uart.inb(LSR) & 1
        uart.out(RBR, ord("."))
    for _ in range(POLLING - 1):
        assert not uart.inb(LSR) & 1
    assert uart.inb(LSR) & 1
    assert uart.inb(RBR) == ord("x")
