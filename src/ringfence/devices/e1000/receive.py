"""The receive ring: frames from the wire become descriptors (3.2).

A frame is stored whole or not at all. Where the ring lacks descriptors for it, it stays with the
backend, which is told when the tail moves: what would be the chip's packet buffer is the backend's
queue, and nobody drops what can wait. A frame that no ring state could ever take is dropped and
counted as missed. Large TCP segments, which backends may bring, are cut here: on the way into the
ring that costs half of what it would in front of the card. The raw packet checksum of the
descriptor, which no driver of this chip reads, stays 0.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from ringfence.chipset.state import Saved, State
from ringfence.devices.e1000 import statistics as counter
from ringfence.devices.e1000.filters import Filters
from ringfence.devices.e1000.interrupts import Interrupts
from ringfence.devices.e1000.offload import verify
from ringfence.devices.e1000.registers import ICR, RCTL, RXCSUM, Ring, RxDescriptor
from ringfence.devices.e1000.ring import DescriptorRing
from ringfence.devices.e1000.statistics import Statistics
from ringfence.memory.ram import GuestMemory
from ringfence.network.offload import WIRE_MSS, Malformed, segments, tcp_over_ipv4

MINIMUM, FCS, TAG = 60, 4, 4
LONGEST_STANDARD = 1518
"""Bytes of a frame, FCS included and VLAN tag excluded, that RCTL.LPE is not needed for."""
LONGEST = 16384
LARGE_COUNT = 64
"""Descriptors of a ring that is given large segments: it has room for several."""
_ADDRESS = struct.Struct("<Q")
_WRITE_BACK = struct.Struct("<HHBBH")


class Receiver(Saved):
    """The ring at RDBAL.

    Parameters
    ----------
    resume : Callable[[], None]
        Called when a frame that was refused may be offered again.
    vlan : Callable[[], int]
        The Ethernet type of VLAN tags to take off, or 0.
    """

    FIELDS = ("rctl", "rxcsum", "refused")

    def __init__(
        self,
        memory: GuestMemory,
        interrupts: Interrupts,
        statistics: Statistics,
        filters: Filters,
        resume: Callable[[], None],
        vlan: Callable[[], int],
    ) -> None:
        self._memory = memory
        self._interrupts = interrupts
        self._statistics = statistics
        self._filters = filters
        self._resume = resume
        self._vlan = vlan
        self.ring = DescriptorRing(memory, Ring.RECEIVE)
        self.refused = False
        """A frame waits for descriptors."""
        self.reset()

    def reset(self) -> None:
        """Be as after power-on."""
        self.ring.reset()
        self.rctl = self.rxcsum = 0
        self._wake()

    def read_rctl(self) -> int:
        """Read RCTL."""
        return self.rctl

    def write_rctl(self, value: int) -> None:
        """Write RCTL; EN rising sets the engine going, whatever has stopped it."""
        if value & ~self.rctl & RCTL.EN:
            self.ring.failed = False
        self.rctl = value & RCTL.WRITABLE
        self._wake()

    def read_rxcsum(self) -> int:
        """Read RXCSUM."""
        return self.rxcsum

    def write_rxcsum(self, value: int) -> None:
        """Write RXCSUM."""
        self.rxcsum = value & RXCSUM.WRITABLE

    @property
    def takes_large(self) -> bool:
        """Whether TCP segments that are larger than the wire's may come: cut, they find room."""
        return self.ring.count >= LARGE_COUNT

    def write_tail(self, value: int) -> None:
        """Write RDT: there are descriptors."""
        self.ring.tail = value & Ring.INDEX
        self._wake()

    def _wake(self) -> None:
        if self.refused:
            self.refused = False
            self._resume()

    @property
    def buffer(self) -> int:
        """Bytes that a descriptor's buffer holds (13.4.22, BSIZE and BSEX)."""
        size = 2048 >> (self.rctl >> RCTL.BSIZE_SHIFT & 3)
        return size * 16 if self.rctl & RCTL.BSEX and size < 2048 else size

    def receive(self, frame: bytes) -> bool:
        """Take a frame from the wire: store it or drop it; False if it has to wait."""
        if not self.rctl & RCTL.EN or self.ring.failed:
            return True
        if len(frame) < MINIMUM:
            frame = frame.ljust(MINIMUM, b"\0")
        length = len(frame) + FCS
        counters = self._statistics.counters
        vlan = self._vlan()
        tagged = bool(vlan) and frame[12] << 8 | frame[13] == vlan
        longest = LONGEST if self.rctl & RCTL.LPE else LONGEST_STANDARD + TAG * tagged
        pieces = [frame]
        if length > longest:
            pieces = self._cut(frame)
            if not pieces:
                counters[counter.ROC] += 1
                return True
        if not self._wanted(frame, tagged):
            self._statistics.arrived(length)
            return True
        data, tag = pieces, 0
        if tagged:
            data, tag = [frame[:12] + frame[16:]], frame[14] << 8 | frame[15]
        if not self.rctl & RCTL.SECRC:
            sums = [zlib.crc32(piece).to_bytes(FCS, "little") for piece in pieces]
            data = [each + fcs for each, fcs in zip(data, sums, strict=True)]
        size = self.buffer
        needed = sum(-(-len(each) // size) for each in data)
        if needed > self.ring.available:
            if needed >= self.ring.count > 0:
                counters[counter.MPC] += 1
                return True
            if not self.refused:
                counters[counter.RNBC] += 1
                self.refused = True
            return False
        # What is true of the first segment's checksums is true of all.
        judgement = self._judge(pieces[0], RxDescriptor.VP if tagged else 0)
        for piece, each in zip(pieces, data, strict=True):
            self._statistics.arrived(len(piece) + FCS)
            if not self._store(each, *judgement, tag):
                return True
            self._statistics.received(piece, len(piece) + FCS)
        self._report()
        return True

    def _cut(self, frame: bytes) -> list[bytes]:
        """Cut a TCP segment into what the wire takes; other frames into nothing."""
        tcp = tcp_over_ipv4(frame) if self.takes_large else None
        if tcp is None:
            return []
        try:
            return list(segments(frame, tcp, WIRE_MSS, version=4))
        except Malformed:
            return []

    def _wanted(self, frame: bytes, tagged: bool) -> bool:
        if not self._filters.accepts(frame, self.rctl):
            return False
        if tagged and self.rctl & RCTL.VFE:
            return self._filters.accepts_vlan(frame[14] << 8 | frame[15], self.rctl)
        return True

    def _judge(self, frame: bytes, status: int) -> tuple[int, int]:
        """Return status and error bits of the checksums that are to be checked."""
        if frame[0] & 1:
            status |= RxDescriptor.PIF
        if not self.rxcsum & (RXCSUM.IPOFL | RXCSUM.TUOFL) or status & RxDescriptor.VP:
            return status | RxDescriptor.IXSM, 0
        errors = 0
        network, transport = verify(frame)
        if network is None and transport is None:
            return status | RxDescriptor.IXSM, 0
        if network is not None and self.rxcsum & RXCSUM.IPOFL:
            status |= RxDescriptor.IPCS
            errors |= 0 if network else RxDescriptor.IPE
        if transport is not None and self.rxcsum & RXCSUM.TUOFL:
            status |= RxDescriptor.TCPCS
            errors |= 0 if transport else RxDescriptor.TCPE
        return status, errors

    def _store(self, data: bytes, status: int, errors: int, tag: int) -> bool:
        """Fill buffers and descriptors; False for a master abort."""
        ring, memory, size = self.ring, self._memory, self.buffer
        try:
            for at in range(0, len(data), size):
                part = data[at : at + size]
                descriptor = ring.address
                (address,) = _ADDRESS.unpack(memory.slice(descriptor, _ADDRESS.size))
                if address:
                    memory.dma_write(address, part)
                last = at + size >= len(data)
                flags = status | RxDescriptor.DD | (RxDescriptor.EOP if last else 0)
                memory.dma_write(
                    descriptor + _ADDRESS.size,
                    _WRITE_BACK.pack(len(part), 0, flags, errors, tag),
                )
                ring.advance(1)
        except IndexError:
            ring.failed = True
            return False
        return True

    def _report(self) -> None:
        """Interrupt, at once or later, and warn of a ring that runs empty."""
        ring = self.ring
        threshold = ring.count >> 1 + (self.rctl >> RCTL.RDMTS_SHIFT & 3)
        if ring.available <= threshold:
            self._interrupts.cause(ICR.RXDMT0)
        self._interrupts.received.event()

    def save(self) -> State:
        """See `Saved.save`."""
        return super().save() | {"ring": self.ring.save()}

    def restore(self, state: State) -> None:
        """See `Saved.restore`."""
        super().restore(state)
        self.ring.restore(state["ring"])
        self._wake()
