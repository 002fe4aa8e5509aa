"""Hostile drivers of virtio devices: either ring layout, through each type of device.

Chains are mostly nearly right: buffers in RAM, a body that the type could understand. Beside them
the ring's own memory, the transport's registers and the type's host side are given no peace.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from devices.virtio.backends import Filedisk, Inline, Note, Ramdisk, Wire
from devices.virtio.driver import BAR, BUFFERS, MSIX, QUEUE_AREA, RAM, Driver, Segment
from fuzzing.harness import FAR, Fuzzer
from ringfence.devices.virtio import beside, blk, net, vsock
from ringfence.devices.virtio.balloon import VirtioBalloon
from ringfence.devices.virtio.blk import VirtioBlk
from ringfence.devices.virtio.console import CONTROL, INPUT_LIMIT, Port, VirtioConsole
from ringfence.devices.virtio.device import VirtioDevice
from ringfence.devices.virtio.net import VirtioNet
from ringfence.devices.virtio.pci import DEFAULT_PACING
from ringfence.devices.virtio.rng import VirtioRng
from ringfence.devices.virtio.vsock import HEADER, Key, Shut, VirtioVsock
from ringfence.pacing import Pacing

BODIES = 1 << 21
"""Bytes at BUFFERS that chains point to."""
AREA = 0x10000
"""Bytes of each queue's structures."""


class VirtioFuzzer(Fuzzer):
    """A driver of one type of device.

    Parameters
    ----------
    packed : bool
        The layout of its rings.
    pacing : Pacing
        How often driver and device tell each other of work.
    """

    queues: tuple[int, ...] = (0,)
    """Those that chains are put into."""

    def __init__(self, seed: int, *, packed: bool, pacing: Pacing = DEFAULT_PACING) -> None:
        super().__init__(seed)
        self.packed = packed
        self.event_idx = pacing.event_idx
        self.driver = Driver(self.device(), packed=packed, pacing=pacing)
        self.offered = self.driver.offered() & 0xFFFFFF
        self.steps = (
            *(self.chain,) * 10,
            *(self.host,) * 3,
            *(self.register, self.notify, self.notify, self.ring, self.ring, self.time, self.take),
        )

    def device(self) -> VirtioDevice:
        """The device, on backends in memory."""
        raise NotImplementedError

    def body(self, queue: int) -> bytes:
        """What a driver could say in a queue."""
        raise NotImplementedError

    def host(self) -> None:
        """Something happens on the host's side."""

    def works(self) -> None:
        """Do one thing properly."""
        raise NotImplementedError

    def calm(self) -> None:
        """Let the host's side finish."""

    def close(self) -> None:
        self.calm()
        self.driver.close()

    # ---- runs

    def start(self, *, honest: bool = False) -> None:
        """Reset and set up; not always with everything that is offered."""
        driver = self.driver
        driver.function.config_write(4, 2, 6)
        driver.config(0x14, MSIX)
        driver.config(0x20, BAR)
        driver.put(0x14, 1, 0)
        self.calm()
        features = self.offered
        if not honest and self.chance(0.3):
            features &= self.source.getrandbits(24)
        event_idx = self.event_idx and (honest or self.chance(0.5))
        size = 64 if honest else self.pick(64, 64, 16, 2)
        driver.start(features, size=size, packed=self.packed, event_idx=event_idx)

    def begin(self) -> None:
        self.start()

    def after(self) -> None:
        if self.driver.function.status != 15 and self.chance(0.3):
            self.start()

    def check(self) -> None:
        function = self.driver.function
        self.calm()
        assert function.device.busy == 0
        function.restore(function.save())
        self.start(honest=True)
        assert function.status == 15
        self.works()

    # ---- steps

    def segments(self, body: bytes) -> list[Segment]:
        """Buffers for a body to be read, then some to be written."""
        source, memory = self.source, self.driver.memory
        found: list[Segment] = []
        at = BUFFERS + source.randrange(BODIES)
        memory.write(at, body)
        while body and len(found) < 6:
            part = len(body) if self.chance(0.6) else source.randrange(1, len(body) + 1)
            found.append((at, part, False))
            at, body = at + part, body[part:]
        for _ in range(source.randrange(4)):
            length = self.pick(1, 1, 44, 512, 512, 2048, 4096, 70000)
            found.append((BUFFERS + source.randrange(BODIES), length, True))
        if self.chance(0.05) and found:
            where = source.randrange(len(found))
            address = self.pick(*FAR, RAM - 1, RAM, 0, found[where][0], QUEUE_AREA, BAR)
            found[where] = (address, self.value(), self.chance(0.5))
        return found or [(BUFFERS, 16, True)]

    def chain(self) -> None:
        """A chain, and perhaps a notification."""
        number = self.pick(*self.queues)
        ring = self.driver.rings[number]
        segments = self.segments(self.body(number))
        if len(segments) > (len(ring.free) if hasattr(ring, "free") else ring.room):
            if not self.take() or len(segments) > 16:
                self.start()
            return
        if self.packed and not ring.identifiers:
            return
        ring.add(segments, indirect=self.chance(0.3))
        if self.chance(0.8):
            self.driver.notify(number)

    def take(self) -> bool:
        """Take what the device has given back; False if it makes no sense by now."""
        for ring in self.driver.rings:
            try:
                ring.used()
            except (KeyError, IndexError):
                self.start()
                return False
        return True

    def ring(self) -> None:
        """A blow at the ring's own memory."""
        base = QUEUE_AREA + AREA * self.pick(*self.queues)
        memory, source = self.driver.memory, self.source
        kind = source.randrange(5)
        if kind == 0:  # a descriptor
            address = self.pick(BUFFERS, BUFFERS, *FAR, base, RAM - 8, source.getrandbits(64))
            entry = struct.pack(
                "<QIHH", address, self.value(), source.getrandbits(self.pick(3, 16)), self.value(16)
            )
            memory.write(base + 16 * source.randrange(64), entry)
        elif kind == 1:  # the driver's area: available ring or event suppression
            memory.write(
                base + 0x8000 + 2 * source.randrange(70), struct.pack("<H", self.value(16))
            )
        elif kind == 2:  # its index, or flags
            step = self.pick(1, 1, 2, 64, 65, 0x8000, 0xFFFF)
            (index,) = struct.unpack("<H", memory.read(base + 0x8002, 2))
            memory.write(base + 0x8002, struct.pack("<H", index + step & 0xFFFF))
        elif kind == 3:  # the device's area
            at = base + 0xA000 + 2 * source.randrange(270)
            memory.write(at, struct.pack("<H", self.value(16)))
        else:  # an indirect table
            at = base + 0xC000 + 16 * source.randrange(256)
            entry = struct.pack("<QIHH", self.pick(BUFFERS, base), self.value(), self.value(3), 1)
            memory.write(at, entry)

    def notify(self) -> None:
        """A notification of a queue that may not exist."""
        self.driver.notify(self.pick(*self.queues, self.source.randrange(1024)))

    def register(self) -> None:
        """Any register of any structure, in any size; or configuration space."""
        driver, source = self.driver, self.source
        size = self.pick(1, 2, 4)
        if self.chance(0.15):
            at = source.randrange(256) & ~(size - 1)
            driver.config(at & ~3, size=4)
            driver.config(at, self.value(8 * size), size)
            return
        page = self.pick(0, 0, 0, 0x1000, 0x2000, 0x2000, 0x3000)
        offset = source.randrange(64) & ~(size - 1)
        if page == 0x2000 and self.chance(0.3):
            offset = self.pick(0xFF8, 0xFFC)
        if self.chance(0.4):
            driver.get(offset, size, page)
            return
        value = self.value(8 * size)
        if page == 0 and offset == 0x14 and self.chance(0.8):
            value |= 15
        driver.put(offset, size, value, page)

    def time(self) -> None:
        """Time passes, or the vCPU sleeps; what was put off is done."""
        if self.chance(0.3):
            self.driver.board.idle()
        else:
            self.driver.clock.advance(self.pick(1, 1000, 100_000))


class RngFuzzer(VirtioFuzzer):
    """Entropy."""

    def device(self) -> VirtioDevice:
        return VirtioRng()

    def body(self, queue: int) -> bytes:
        return self.source.randbytes(self.pick(0, 0, 0, 16))

    def works(self) -> None:
        assert [length for _, length in self.driver.request(0, [(BUFFERS, 64, True)])] == [64]


class BlkFuzzer(VirtioFuzzer):
    """A disk whose requests are done at once, or later, or fail."""

    def device(self) -> VirtioDevice:
        self.disk, self.pool = Ramdisk(), Inline()
        return VirtioBlk(self.disk, self.pool, serial="fuzz")

    def body(self, queue: int) -> bytes:
        source = self.source
        kind = self.pick(0, 0, 1, 1, 4, 8, 11, 13, self.value())
        end = self.disk.size // 512
        sector = self.pick(0, 1, end - 1, end, 1 << 54, (1 << 55) - 1, (1 << 64) - 1)
        if self.chance(0.5):
            sector = source.randrange(end)
        data = b""
        if kind == 1:
            data = source.randbytes(self.pick(0, 511, 512, 512, 1024, 4096))
        elif kind in (11, 13):
            rows = [
                struct.pack("<QII", self.pick(sector, 0), self.value(), self.value(2))
                for _ in range(self.pick(1, 1, 2, 300))
            ]
            data = b"".join(rows)
        return blk.HEADER.pack(kind, 0, sector) + data[: 1 << 14]

    def host(self) -> None:
        kind = self.source.randrange(4)
        if kind == 0:
            self.disk.fails = self.chance(0.2)
        elif kind == 1:
            self.disk.quick = self.chance(0.5)
        elif kind == 2:
            self.pool.held = [] if self.pool.held is None else self.pool.held
        else:
            self.calm()

    def calm(self) -> None:
        held, self.pool.held = self.pool.held or [], None
        for job in held:
            job()
        self.disk.log.clear()
        assert len(self.disk.data) == self.disk.size

    def works(self) -> None:
        self.disk.fails = False
        self.driver.memory.write(BUFFERS, blk.HEADER.pack(0, 0, 3))
        segments = [(BUFFERS, 16, False), (BUFFERS + 0x1000, 512, True), (BUFFERS + 0x800, 1, True)]
        assert [length for _, length in self.driver.request(0, segments)] == [513]
        data = self.disk.data[3 * 512 : 4 * 512]
        assert self.driver.memory.read(BUFFERS + 0x1000, 512) == bytes(data)


class FileBlkFuzzer(BlkFuzzer):
    """A disk that is a file, whose requests are native code's affair as far as may be."""

    def device(self) -> VirtioDevice:
        self.disk, self.pool = Filedisk(), Inline()
        self.waits = beside.PATIENCE, beside.LINGER
        beside.PATIENCE = beside.LINGER = 0  # no worker waits for more
        self.files = [os.open(f"/dev/{name}", os.O_RDWR) for name in ("zero", "full", "null")]
        return VirtioBlk(self.disk, self.pool, serial="fuzz")

    def host(self) -> None:
        super().host()
        self.disk.file = self.pick(self.disk.own, self.disk.own, *self.files, -1)

    def works(self) -> None:
        self.disk.file = self.disk.own
        super().works()

    def close(self) -> None:
        super().close()
        beside.PATIENCE, beside.LINGER = self.waits
        for file in self.files:
            os.close(file)


class NetFuzzer(VirtioFuzzer):
    """A card with two pairs of queues on a wire that may be full."""

    queues = (0, 1, 1, 1, 2, 3, 4)

    def device(self) -> VirtioDevice:
        self.wire = Wire()
        return VirtioNet(self.wire, bytes.fromhex("020000000001"), pairs=2)

    def body(self, queue: int) -> bytes:
        source = self.source
        if queue % 2 == 0:
            if queue != 4 and self.chance(0.9):
                return b""
            command = (self.pick(0, 4, self.value(8)), self.pick(0, self.value(8)))
            return bytes(command) + source.randbytes(self.pick(0, 1, 2)) + b"\1\0"
        header = net.HEADER.pack(
            self.pick(0, 1, 1, self.value(8)),
            self.pick(0, 0, 1, 4, 0x81, self.value(8)),
            *(self.pick(54, self.value(16)), self.pick(1460, 1, 0, self.value(16))),
            *(self.pick(34, 54, self.value(16)), self.pick(16, 6, self.value(16)), 0),
        )
        frame = bytearray(source.randbytes(self.pick(0, 13, 14, 60, 60, 1514, 9000, 65549)))
        if len(frame) > 60:
            version = self.pick((b"\x08\0", 0x45), (b"\x86\xdd", 0x60))
            frame[12:14], frame[14] = version[0], version[1]
            frame[23], frame[46] = 6, self.pick(0x50, 0xF0, 0)
        return header + frame

    def host(self) -> None:
        length = self.pick(0, 13, 14, 60, 1514, 1514, 9000, 65549, 65550)
        frame = bytearray(self.source.randbytes(length))
        if length > 60 and self.chance(0.5):
            frame[12:15], frame[23] = b"\x08\0" + bytes([self.pick(0x45, 0x4F, 0x44)]), 6
            frame[20:22], frame[46] = bytes(2), self.pick(0x50, 0xF0, 0)
        self.wire.takes_large = self.chance(0.5)
        if self.wire.card is not None:
            self.wire.card.receive([bytes(frame)] * self.pick(1, 1, 2, 64))
            self.wire.limit = self.pick(0, 1, 5, 1 << 20)
            if self.chance(0.3):
                self.wire.card.more()

    def after(self) -> None:
        assert all(14 <= len(frame) <= net.MAX_FRAME for frame in self.wire.frames)
        self.wire.frames.clear()
        super().after()

    def works(self) -> None:
        frame = bytes(range(60))
        self.wire.limit = 1 << 20
        self.driver.memory.write(BUFFERS, bytes(net.HEADER.size) + frame)
        assert len(self.driver.request(1, [(BUFFERS, net.HEADER.size + 60, False)])) == 1
        assert self.wire.frames == [frame]
        self.driver.request(0, [(BUFFERS, 2048, True)])
        assert self.wire.receive(frame)
        assert [length for _, length in self.driver.rings[0].used()] == [72]
        self.wire.frames.clear()


class ConsoleFuzzer(VirtioFuzzer):
    """A console and a named port."""

    queues = (0, 1, 2, 3, 3, 3, 4, 5)

    def device(self) -> VirtioDevice:
        self.out = bytearray()
        return VirtioConsole([Port("", self.out.extend), Port("agent", self.out.extend)])

    @property
    def console(self) -> VirtioConsole:
        device = self.driver.device
        assert isinstance(device, VirtioConsole)
        return device

    def body(self, queue: int) -> bytes:
        if queue == 3:
            number, event = self.pick(0, 1, 2, self.value()), self.pick(*range(8), self.value(16))
            message = CONTROL.pack(number, event, self.pick(0, 1, self.value(16)))
            return message[: self.pick(8, 8, 8, 7, 1)]
        return b"" if queue % 2 == 0 else self.source.randbytes(self.pick(1, 100, 5000))

    def host(self) -> None:
        self.console.send(self.pick(0, 1), self.source.randbytes(self.pick(1, 100, 70000)))
        assert all(len(port.waiting) <= INPUT_LIMIT for port in self.console.ports)
        assert len(self.console._messages) <= 8

    def after(self) -> None:
        self.out.clear()
        super().after()

    def works(self) -> None:
        self.out.clear()
        self.driver.memory.write(BUFFERS, b"hello")
        assert len(self.driver.request(1, [(BUFFERS, 5, False)])) == 1
        assert self.out == b"hello"


class BalloonFuzzer(VirtioFuzzer):
    """A balloon that is given pages of all kinds, those of its own rings, too."""

    queues = (0, 0, 1, 2, 4)

    def device(self) -> VirtioDevice:
        return VirtioBalloon()

    def body(self, queue: int) -> bytes:
        if queue > 1:
            return b""
        last = RAM // 4096 - 1
        numbers = [
            self.pick(last, last + 1, BUFFERS // 4096, self.source.randrange(last), self.value())
            for _ in range(self.pick(1, 2, 64, 1000))
        ]
        return struct.pack(f"<{len(numbers)}I", *numbers)[: self.pick(3, 4096, 4096)]

    def host(self) -> None:
        device = self.driver.device
        assert isinstance(device, VirtioBalloon)
        device.set_target(self.pick(0, RAM, 1 << 40 - 1) & 0xFFFFFFFF)

    def works(self) -> None:
        self.driver.memory.write(BUFFERS, struct.pack("<I", 0x500) + bytes(4092))
        self.driver.memory.write(0x500000, b"gone")
        assert len(self.driver.request(0, [(BUFFERS, 4, False)])) == 1
        assert self.driver.memory.read(0x500000, 4) == bytes(4)


class VsockFuzzer(VirtioFuzzer):
    """Sockets whose host's end accepts, talks, lags and hangs up at will."""

    queues = (0, 1, 1, 1, 1, 2)

    def device(self) -> VirtioDevice:
        self.end = Note()
        return VirtioVsock(3, self.end)

    @property
    def sockets(self) -> VirtioVsock:
        device = self.driver.device
        assert isinstance(device, VirtioVsock)
        return device

    def key(self) -> Key:
        return self.source.randrange(12), self.source.randrange(1000, 1004)

    def body(self, queue: int) -> bytes:
        if queue != 1:
            return b""
        data = self.source.randbytes(self.pick(0, 0, 1, 100, 4000, 65536, 70000))
        guest, host = self.key()
        header = HEADER.pack(
            *(self.pick(3, 3, 3, 3, 2, self.value()), self.pick(2, 2, 2, 2, self.value())),
            *(guest, host, self.pick(len(data), len(data), len(data), self.value())),
            *(self.pick(1, 1, 1, 1, 1, self.value(16)), self.pick(1, 1, 5, 5, *range(9))),
            *(self.value(2), self.pick(65536, 65536, self.value()), self.value()),
        )
        return (header + data)[: self.pick(1 << 20, 1 << 20, 1 << 20, 43)]

    def host(self) -> None:
        device, key = self.sockets, self.key()
        kind = self.source.randrange(8)
        if kind == 0:
            device.accept(key)
        elif kind == 1:
            device.request(key)
        elif kind in (2, 3):
            device.send(key, self.source.randbytes(device.room(key)))
        elif kind == 4:
            self.pick(lambda: device.end(key), lambda: device.shutdown(key, Shut.SEND))()
        elif kind == 5:
            device.taken(key, self.value(16))
        elif kind == 6:
            self.end.behind = self.chance(0.3)
        else:
            device.resume()

    def after(self) -> None:
        self.end.log.clear()
        assert len(self.sockets._connections) <= vsock.MAX_CONNECTIONS
        assert len(self.sockets._pending) <= vsock.MAX_PENDING + vsock.MAX_CONNECTIONS * 2
        super().after()

    def works(self) -> None:
        self.end.behind = False
        packet = HEADER.pack(3, 2, 77, 1000, 0, 1, vsock.REQUEST, 0, 65536, 0)
        self.driver.memory.write(BUFFERS, packet)
        self.end.log.clear()
        assert len(self.driver.request(1, [(BUFFERS, len(packet), False)])) == 1
        assert ("connect", (77, 1000)) in self.end.log


TYPES: dict[str, Callable[..., VirtioFuzzer]] = {
    "rng": RngFuzzer,
    "blk": BlkFuzzer,
    "net": NetFuzzer,
    "console": ConsoleFuzzer,
    "balloon": BalloonFuzzer,
    "vsock": VsockFuzzer,
}
