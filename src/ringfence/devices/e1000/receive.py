"""The receive ring: frames from the wire become descriptors (3.2).

A frame is stored whole or not at all. Where the ring lacks descriptors for it, it stays with the
backend, which is told when the tail moves: what would be the chip's packet buffer is the backend's
queue, and nobody drops what can wait. A frame that no ring state could ever take is dropped and
counted as missed. Large TCP segments, which backends may bring, are cut here: on the way into the
ring that costs half of what it would in front of the card. The raw packet checksum of the
descriptor, which no driver of this chip reads, stays 0.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from ringfence.chipset.state import Saved, State
from ringfence.devices.e1000 import statistics as counter
from ringfence.devices.e1000.filters import Filters
from ringfence.devices.e1000.interrupts import Interrupts
from ringfence.devices.e1000.landing import Landing, crc_table
from ringfence.devices.e1000.offload import verify
from ringfence.devices.e1000.registers import ICR, RCTL, RXCSUM, Ring, RxDescriptor
from ringfence.devices.e1000.ring import DescriptorRing
from ringfence.devices.e1000.statistics import Statistics
from ringfence.devices.natives import Natives
from ringfence.memory.ram import GuestMemory
from ringfence.memory.reach import set_reach
from ringfence.memory.registers import RegisterBank
from ringfence.network.offload import TCP_HEADER, WIRE_MSS, tcp_over_ipv4

MINIMUM, FCS, TAG = 60, 4, 4
LONGEST_STANDARD = 1518
"""Bytes of a frame, FCS included and VLAN tag excluded, that RCTL.LPE is not needed for."""
LONGEST = 16384
LARGE_COUNT = 64
"""Descriptors of a ring that is given large segments: it has room for several."""
_crc_table = crc_table()


class Receiver(Saved):
    """The ring at RDBAL.

    Parameters
    ----------
    resume : Callable[[], None]
        Called when a frame that was refused may be offered again.
    vlan : Callable[[], int]
        The Ethernet type of VLAN tags to take off, or 0.
    natives : Natives
        Where native code is found.
    tail : view of `memory.registers.Register`
        RDT, which is open to writes that nobody hears of while no frame waits for descriptors.
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
        natives: Natives,
        tail: Any,
    ) -> None:
        self._memory = memory
        self._natives = natives
        self._place = ctypes.create_string_buffer(Landing.size)
        self._at = ctypes.addressof(self._place)
        self._job = Landing.at(self._at)
        set_reach(self._job, memory)
        self._interrupts = interrupts
        self._statistics = statistics
        self._filters = filters
        self._resume = resume
        self._vlan = vlan
        self._tail = tail
        self.ring = DescriptorRing(memory, Ring.RECEIVE, tail)
        self.refused = False
        self._landed = False
        """Whether the ring has frames that the driver was not told of."""
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

    @property
    def refused(self) -> bool:
        """A frame waits for descriptors."""
        return not self._tail.open

    @refused.setter
    def refused(self, waits: bool) -> None:
        if waits:
            RegisterBank.close(self._tail)
        else:
            self._tail.open = 1

    def write_tail(self, value: int) -> None:
        """Write RDT: there are descriptors."""
        self.ring.tail = value
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

    def receive(self, frames: Sequence[bytes]) -> int:
        """Take frames from the wire: store or drop them; how many, the others have to wait.

        There is one interrupt for all of them.
        """
        taken, self._landed = 0, False
        for frame in frames:
            if not self._take(frame):
                break
            taken += 1
        if self._landed and not self.ring.failed:
            self._report()
        return taken

    def _take(self, frame: bytes) -> bool:
        """Store a frame or drop it; False if it has to wait."""
        if not self.rctl & RCTL.EN or self.ring.failed:
            return True
        if len(frame) < MINIMUM:
            frame = frame.ljust(MINIMUM, b"\0")
        length = len(frame) + FCS
        counters = self._statistics.counters
        vlan = self._vlan()
        tagged = bool(vlan) and frame[12] << 8 | frame[13] == vlan
        longest = LONGEST if self.rctl & RCTL.LPE else LONGEST_STANDARD + TAG * tagged
        header, mss = 0, WIRE_MSS
        if length > longest:
            header = self._cut(frame)
            if not header:
                counters[counter.ROC] += 1
                return True
        if not self._wanted(frame, tagged):
            self._statistics.arrived(length)
            return True
        data, tag = frame, 0
        size, fcs = self.buffer, 0 if self.rctl & RCTL.SECRC else FCS
        if tagged:
            data, tag = frame[:12] + frame[16:], frame[14] << 8 | frame[15]
            if fcs:  # it is of the frame as it came
                data, fcs = data + zlib.crc32(frame).to_bytes(FCS, "little"), 0
        full, rest = divmod(len(data) - header, mss) if header else (0, len(data))
        lengths = [(header + mss, full), (header + rest, int(rest > 0))]
        needed = sum(-(-(each + fcs) // size) * count for each, count in lengths)
        if needed > self.ring.available:
            if needed >= self.ring.count > 0:
                counters[counter.MPC] += 1
                return True
            if self.refused:
                return False
            counters[counter.RNBC] += 1
            self.refused = True
            if needed > self.ring.available:  # from here on we hear of it
                return False
            self.refused = False
        # What is true of the large segment's checksums is true of all that it is cut into.
        status, errors = self._judge(frame, RxDescriptor.VP if tagged else 0)
        stored = self._land(data, header, fcs, status | errors << 8 | tag << 16)
        if not header:
            lengths = [(len(frame), 1)]
        for each, count in lengths:
            here = min(count, stored)
            stored -= here
            if here:
                self._statistics.arrived(each + FCS, here)
                self._statistics.received(frame, each + FCS, here)
        return True

    def _cut(self, frame: bytes) -> int:
        """Bytes that the segments of a TCP segment which the wire doesn't take begin with, or 0."""
        tcp = tcp_over_ipv4(frame) if self.takes_large else None
        if tcp is None:
            return 0
        header = tcp + 4 * (frame[tcp + 12] >> 4)
        return header if tcp + TCP_HEADER <= header <= len(frame) else 0

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

    def _land(self, data: bytes, header: int, fcs: int, judgement: int) -> int:
        """Store a frame, cut if it has a ``header``; how many frames have come of it.

        A master abort stops the ring.
        """
        job, ring = self._job, self.ring
        job.frame = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
        job.length, job.header = len(data), header
        job.tcp, job.mss = tcp_over_ipv4(data) or 0 if header else 0, WIRE_MSS
        job.crc_table = ctypes.addressof(_crc_table) if fcs else 0
        job.judgement = judgement
        job.ring, job.count, job.head, job.buffer = ring.base, ring.count, ring.head, self.buffer
        ring.failed = not self._natives("land", self._memory.incomplete)(self._at)
        ring.head = job.head
        self._landed = True
        self._memory.dma_written_runs(self._at + Landing.offset_of("runs"), job.runs_used)
        return int(job.stored)

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
