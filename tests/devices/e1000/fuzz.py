"""What a hostile driver does to the card, replayable from a seed (see `fuzzing.harness`).

An input is one access of a register, one descriptor or packet of descriptors, one frame from the
wire, or some time that passes. Every other seed accesses registers as an engine does that answers
some of them in native code. Values are drawn from those that hurt: ends of ranges, ring sizes,
addresses at RAM's ends and outside it, descriptors of all kinds. After each run the card is reset
and has to pass a frame either way.
"""

from __future__ import annotations

import struct

from devices.e1000.driver import MEMORY, RX_RING, TX_RING, Driver, frame_of
from fuzzing.harness import EDGES, FAR, Fuzzer
from ringfence.devices.e1000 import receive, transmit
from ringfence.devices.e1000.card import IO_BAR
from ringfence.devices.e1000.registers import CTRL, RCTL, TCTL, Ring, TxDescriptor

ADDRESSES = (
    *(0, 1, 0x1000, MEMORY - 1, MEMORY - 16, MEMORY - 2048, MEMORY, TX_RING, RX_RING, 0x300000),
    *FAR,
)


class CardFuzzer(Fuzzer):
    """A hostile driver of the card."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.driver = Driver()
        if seed & 1:
            self.driver.go_native()
        self.registers = sorted({*self.driver.card._readers, *self.driver.card._writers})
        self.steps = (self.register, self.ring, self.descriptor, self.descriptor, self.packet,
                      self.packet, self.frame, self.frame, self.time, self.odd)  # fmt: skip

    def begin(self) -> None:
        driver, source = self.driver, self.source
        if source.random() < 0.8:
            driver.tx_tail = driver.rx_head = 0
            driver.start(rctl=source.getrandbits(27), tctl=source.getrandbits(26))

    def after(self) -> None:
        self.driver.wire.frames.clear()

    def check(self) -> None:
        """What holds whatever was done, and that the card works after a reset."""
        driver = self.driver
        assert len(driver.card.transmitter.packet) <= transmit.LIMIT
        assert driver.card.restore(driver.card.save()) is None
        driver.card.config_write(4, 2, 7)
        driver.card.set_link(True)
        driver.wire.limit = 1 << 30
        if driver.native is not None:
            driver.native.places.settle()
        interrupts = driver.card.interrupts
        wanted = bool(interrupts.icr & interrupts.ims)
        throttled = driver.clock.now() < interrupts.earliest
        assert interrupts.asserted == wanted or (wanted and throttled)
        driver.write(CTRL.OFFSET, CTRL.RST | CTRL.PHY_RST)
        driver.clock.advance(1_000_000_000)
        assert driver.queue.next_deadline() is None
        driver.wire.frames.clear()
        driver.tx_tail = driver.rx_head = 0
        driver.start()
        driver.send(frame_of(64))
        assert driver.wire.frames == [frame_of(64)]
        assert driver.card.receive([frame_of(64)])
        assert [data[:-4] for data in driver.take()] == [frame_of(64)]
        driver.wire.frames.clear()

    def register(self) -> None:
        offset = self.source.choice(self.registers)
        if self.source.random() < 0.3:
            self.driver.read(offset)
        else:
            value = self.value()
            if offset in (0, 4) and self.source.random() < 0.9:
                value &= ~CTRL.RST
            self.driver.write(offset, value)

    def ring(self) -> None:
        source = self.source
        base = source.choice((Ring.TRANSMIT, Ring.RECEIVE))
        register = source.choice((Ring.HEAD, Ring.TAIL, Ring.TAIL, Ring.TAIL, Ring.LEN, Ring.BAL))
        value = source.choice((self.value(), source.randrange(64)))
        if register == Ring.LEN:
            value = source.choice((1024, 1024, 128, value))
        if register == Ring.BAL:
            value = source.choice((TX_RING, RX_RING, value))
            self.driver.write(base + Ring.BAH, source.choice((0, 0, 0, value)))
        self.driver.write(base + register, value)
        if source.random() < 0.2:
            self.driver.write(TCTL.OFFSET, self.value() | TCTL.EN)
            self.driver.write(RCTL.OFFSET, self.value() | RCTL.EN)

    def descriptor(self) -> None:
        source = self.source
        base = source.choice((TX_RING, TX_RING, RX_RING))
        good = 0x100000 + source.randrange(1 << 16)
        address = source.choice((good, good, good, source.choice(ADDRESSES)))
        length = source.choice((source.choice(EDGES), source.randrange(2000)))
        lower = source.getrandbits(12) << 20 | length
        upper = self.value()
        if source.random() < 0.3:
            address, upper = source.getrandbits(64), source.getrandbits(32)
        at = base + 16 * source.randrange(64)
        self.driver.memory.write(at, struct.pack("<QII", address, lower & 0xFFFFFFFF, upper))

    def packet(self) -> None:
        """A ring in order, and in it a packet of several descriptors that could almost be meant."""
        driver, source = self.driver, self.source
        driver.card.config_write(4, 2, 7)
        driver.tx_tail = 0
        driver.write(TCTL.OFFSET, 0)
        driver.ring(Ring.TRANSMIT, TX_RING)
        driver.write(TCTL.OFFSET, TCTL.EN | source.getrandbits(26))
        pick = source.choice
        if source.random() < 0.8:
            driver.context(
                ipcss=pick((14, 18, 0, 255)),
                ipcso=pick((24, 28, 0, 255)),
                ipcse=pick((33, 37, 0, 0xFFFF)),
                tucss=pick((34, 54, 0, 255)),
                tucso=pick((50, 40, 0, 255)),
                tucse=pick((0, 0, 100, 0xFFFF)),
                tucmd=source.getrandbits(8) << 24 & ~TxDescriptor.DEXT,
                paylen=source.getrandbits(20),
                mss=pick((0, 1, 7, 100, 536, 1460, 0xFFFF)),
                hdrlen=pick((0, 14, 54, 66, 255)),
            )
        kind = pick((0, TxDescriptor.DEXT | 1 << TxDescriptor.DTYP_SHIFT))
        options = pick((0, 1, 2, 3, 0xFF)) << TxDescriptor.POPTS_SHIFT
        command = source.getrandbits(8) << 24 & ~(TxDescriptor.EOP | TxDescriptor.DEXT) | kind
        for left in reversed(range(source.randrange(1, 5))):
            length = pick((0, 1, 54, 100, 1460, 9000, 0xFFFF))
            address = 0x100000 + source.randrange(1 << 16)
            if source.random() < 0.02:
                address = pick(ADDRESSES)
            end = TxDescriptor.EOP if not left and source.random() < 0.9 else 0
            driver.put(address, command | end | length, options | source.getrandbits(16) << 16)
        driver.ring_tail()

    def frame(self) -> None:
        source = self.source
        length = source.choice((source.randrange(2000), 14, 60, 1514, 1518, 9000, 16380, 65535))
        frame = bytearray(frame_of(length, seed=source.randrange(8)))
        if source.random() < 0.5 and len(frame) > 16:
            frame[12:14] = source.choice((b"\x08\0", b"\x86\xdd", b"\x81\0"))
            frame[14] = source.choice((0x45, 0x4F, 0x60, 0x00))
        if source.random() < 0.3 and len(frame) > 60:  # TCP, as large segments are
            frame[20:24] = b"\0\0\x40\x06"
            frame[46] = source.choice((0x50, 0x80, 0xF0, 0x10))
        if source.random() < 0.3 and frame:
            frame[0] |= 1
        assert len(frame) <= receive.LONGEST * 5
        if source.random() < 0.3:
            self.driver.card.config_write(4, 2, 7)
            self.driver.ring(Ring.RECEIVE, RX_RING)
            self.driver.write(RCTL.OFFSET, 0)
            self.driver.write(RCTL.OFFSET, source.getrandbits(27) | RCTL.EN | RCTL.UPE)
            self.driver.write(Ring.RECEIVE + Ring.TAIL, source.randrange(64))
        self.driver.card.receive([bytes(frame)] * source.choice((1, 1, 2, 64)))

    def time(self) -> None:
        self.driver.wire.limit = self.source.choice((0, 1, 5, 1 << 20))
        if self.source.random() < 0.5:
            self.driver.card.more()
        self.driver.clock.advance(self.source.choice((1, 1000, 100_000)))

    def odd(self) -> None:
        """Accesses of wrong sizes and places, ports, the cable, bus mastering."""
        source, card = self.source, self.driver.card
        kind = source.randrange(5)
        if kind == 0:
            size = source.choice((1, 2, 4))
            offset = source.randrange(0x20000) & ~(size - 1)
            self.driver.write(offset, self.value() & ~CTRL.RST, size)
            self.driver.read(offset, size)
        elif kind == 1:
            card.bar_write(
                IO_BAR, 0, 4, source.choice((source.choice(self.registers), self.value()))
            )
        elif kind == 2:
            card.bar_write(IO_BAR, 4, 4, self.value())
            card.bar_read(IO_BAR, source.randrange(64), 1)
        elif kind == 3:
            card.set_link(source.random() < 0.8)
        else:
            card.config_write(4, 2, source.choice((7, 7, 7, 3, source.getrandbits(16))))
