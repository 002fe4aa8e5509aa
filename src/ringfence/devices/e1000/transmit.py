"""The transmit ring: descriptors become frames (3.3 to 3.6).

A *turn* takes a bounded amount of work: so many descriptors, so many bytes and so many frames. What
is left is done in the next turn, which a timer starts, so that neither a doorbell nor the board's
lock is held up by a long ring or by a packet that falls into 65,000 segments. While the backend has
no room for frames there are no turns: the ring keeps them.

Nothing the guest writes is trusted: a head or tail outside the ring stops the engine, descriptors
are copied once and then worked on, a packet that never ends is cut off, and an address outside RAM
is a master abort, after which the engine stands still until it is enabled anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ringfence.chipset.clock import Deadline, TimerQueue
from ringfence.chipset.state import Saved, State
from ringfence.devices.e1000 import statistics as counter
from ringfence.devices.e1000.interrupts import Interrupts
from ringfence.devices.e1000.offload import Context, insert, insert_tag
from ringfence.devices.e1000.registers import ICR, TCTL, Ring, TxDescriptor
from ringfence.devices.e1000.ring import DescriptorRing
from ringfence.devices.e1000.statistics import Statistics
from ringfence.devices.gathering import Gatherer, PutOff
from ringfence.memory.ram import GuestMemory
from ringfence.memory.registers import RegisterBank
from ringfence.network.backend import FEW, MINIMUM_FRAME

DESCRIPTORS, FRAMES, BYTES = 256, 128, 1 << 18
"""What one turn does at most."""
GATHER_NS = 200_000
"""How long small packets wait for others, at most."""
PAUSE_NS = 10_000
"""From one turn to the next."""
LIMIT = 1 << 18
"""Bytes of a packet to be segmented; what is longer is dropped (PAYLEN has room for more)."""
LONGEST = 16288
"""Bytes of a frame (3.3.1)."""
MINIMUM = 60
"""Bytes of a frame without its FCS."""
FCS = 4
_WORDS = struct.Struct("<QII")


class Transmitter(Saved):
    """The ring at TDBAL and what it is in the middle of.

    Parameters
    ----------
    send : Callable[[bytes], None]
        Takes finished frames.
    room : Callable[[], int]
        How many of them there is room for; if there is none, `run` is called when there is.
    carry : Callable[[], None]
        Hears that there are no more for now.
    vlan : Callable[[], int]
        The Ethernet type of VLAN tags, or 0 if tags are not the card's affair.
    master : Callable[[], bool]
        Whether the card may access memory.
    takes_large : Callable[[], bool]
        Whether ``send`` takes TCP segments of any size.
    put_off : PutOff
        Has something done in a moment; see `devices.gathering`.
    tail : view of `memory.registers.Register`
        TDT, which is open to writes that nobody hears of while the ring will be looked at anyway.
    """

    FIELDS = ("tctl", "options", "special", "flags", "segment", "overrun")

    def __init__(
        self,
        memory: GuestMemory,
        queue: TimerQueue,
        interrupts: Interrupts,
        statistics: Statistics,
        send: Callable[[bytes], None],
        room: Callable[[], int],
        carry: Callable[[], None],
        vlan: Callable[[], int],
        master: Callable[[], bool],
        takes_large: Callable[[], bool],
        put_off: PutOff,
        tail: Any,
    ) -> None:
        self._memory = memory
        self._clock = queue.clock
        self._next = Deadline(queue, self.run)
        self._interrupts = interrupts
        self._statistics = statistics
        self._send = send
        self._room = room
        self._carry = carry
        self._vlan = vlan
        self._master = master
        self._takes_large = takes_large
        self._gatherer = Gatherer(GATHER_NS, put_off, self.run, few=FEW)
        self._tail = tail
        self.ring = DescriptorRing(memory, Ring.TRANSMIT, tail)
        self.reset()

    def reset(self) -> None:
        """Be as after power-on."""
        self._gatherer.forget()
        RegisterBank.close(self._tail)
        self.ring.reset()
        self._next.set(None)
        self.tctl = 0
        self.context = Context()
        self.packet = bytearray()
        """What came of the packet so far."""
        self.options = self.special = 0
        """POPTS and VLAN tag, from the packet's first data descriptor."""
        self.flags = 0
        """The command bits of the descriptor that ended the packet."""
        self.segment = -1
        """The next segment to send, while a packet is being segmented."""
        self.overrun = False
        """The packet is longer than any may be."""
        self._frames = self._bytes = 0
        self._packets = 0
        """Packets of this turn that are done with."""

    def read_tctl(self) -> int:
        """Read TCTL."""
        return self.tctl

    def write_tctl(self, value: int) -> None:
        """Write TCTL; EN rising sets the engine going, whatever has stopped it."""
        if value & ~self.tctl & TCTL.EN:
            self.ring.failed = False
        self.tctl = value & TCTL.WRITABLE
        self.run()

    def write_tail(self, value: int) -> None:
        """Write TDT: there is something to do, at once or together with what comes soon."""
        self.ring.tail = value
        if self.ring.ready and self._gatherer.notified():
            self._tail.open = 1
        else:
            self.run()

    # ---- one turn

    def run(self) -> None:
        """Do a turn; arm the next one if something is left."""
        self._next.set(None)
        RegisterBank.close(self._tail)
        if not self.tctl & TCTL.EN or not self._master():
            return
        ring = self.ring
        self._frames, self._bytes = min(FRAMES, self._room() if self._busy else 0), BYTES
        descriptors, causes = DESCRIPTORS, 0
        self._packets = 0
        while self._frames > 0 and self._bytes > 0 and descriptors > 0:
            if self.segment >= 0:
                self._segment()
                continue
            batch = ring.pending(descriptors)
            if not batch:
                break
            done, reported = self._batch(batch)
            descriptors -= done
            causes |= reported
            if ring.tail == ring.head:
                causes |= ICR.TXQE
        self._gatherer.found(self._packets, (BYTES - self._bytes) // max(self._packets, 1))
        if causes:
            self._interrupts.cause(causes)
        self._carry()
        if self._busy:
            if self._room():
                self._next.set(self._clock.now() + PAUSE_NS)
            else:
                self._tail.open = 1

    @property
    def _busy(self) -> bool:
        """Whether something is left to do."""
        return self.segment >= 0 or self.ring.ready

    def _batch(self, count: int) -> tuple[int, int]:
        """Work on up to ``count`` descriptors that lie in a row.

        Returns how many are done, and the causes to report.
        """
        ring = self.ring
        try:
            view = self._memory.slice(ring.address, count * TxDescriptor.SIZE)
        except IndexError:
            ring.failed = True
            return 0, 0
        raw = bytes(view)
        done = written = causes = 0
        delayed = False
        for address, lower, upper in _WORDS.iter_unpack(raw):
            at = done * TxDescriptor.SIZE
            if not self._descriptor(address, lower, upper, raw[at : at + TxDescriptor.SIZE]):
                ring.failed = True
                break
            done += 1
            if lower & (TxDescriptor.RS | TxDescriptor.RPS):
                view[at + 12] = raw[at + 12] | TxDescriptor.DD
                written = done
                if lower & TxDescriptor.IDE:
                    delayed = True
                else:
                    causes |= ICR.TXDW
            if self.segment >= 0 or self._frames <= 0 or self._bytes <= 0:
                break
        if written:
            self._memory.dma_written(ring.address, written * TxDescriptor.SIZE)
        ring.advance(done)
        if delayed:
            self._interrupts.transmitted.event()
        return done, causes

    def _descriptor(self, address: int, lower: int, upper: int, raw: bytes) -> bool:
        """Do one descriptor; False for a master abort."""
        if not lower & TxDescriptor.DEXT:
            if not self._gather(address, lower & TxDescriptor.LENGTH_LEGACY):
                return False
            if lower & TxDescriptor.EOP:
                self._end_legacy(lower, upper)
            return True
        if lower >> TxDescriptor.DTYP_SHIFT & 0xF == TxDescriptor.DTYP_CONTEXT:
            self.context = Context.unpack(raw)
            return True
        if not self.packet and not self.overrun:
            self.options = upper >> TxDescriptor.POPTS_SHIFT & 0xFF
        if not self._gather(address, lower & TxDescriptor.LENGTH):
            return False
        if lower & TxDescriptor.EOP:
            self._end(lower, upper)
        return True

    def _gather(self, address: int, length: int) -> bool:
        """Append a buffer to the packet; False for a master abort."""
        self._bytes -= length
        if not address or not length:
            return True  # no data: only there to be reported (3.3.3)
        if len(self.packet) + length > LIMIT:
            self.packet.clear()
            self.overrun = True
        if self.overrun:
            return True
        try:
            self.packet += self._memory.slice(address, length)
        except IndexError:
            return False
        return True

    # ---- a packet's end

    def _end_legacy(self, lower: int, upper: int) -> None:
        if lower & TxDescriptor.IC:
            start = upper >> TxDescriptor.CSS_SHIFT & 0xFF
            insert(self.packet, start, lower >> TxDescriptor.CSO_SHIFT & 0xFF, 0)
        self._finish(lower, upper)

    def _end(self, lower: int, upper: int) -> None:
        if not lower & TxDescriptor.TSE:
            self.context.finish(self.packet, self.options)
            self._finish(lower, upper)
            return
        counters = self._statistics.counters
        header, mss = self.context.header, self.context.mss
        if self.overrun or not mss or not 0 < header <= len(self.packet):
            counters[counter.TSCTFC] += 1
            self._drop()
            return
        counters[counter.TSCTC] += 1
        if self._takes_large() and not lower & TxDescriptor.VLE:
            frame = self.context.uncut(self.packet, self.options)
            if frame is not None:
                self._out_uncut(frame, header, mss)
                self._drop()
                return
        self.flags, self.special = lower, upper >> TxDescriptor.SPECIAL_SHIFT
        self.segment = 0

    def _segment(self) -> None:
        """Send the next segment of the packet."""
        frame = self.context.segment(self.packet, self.segment, self.options)
        self._out(frame, self.flags, self.special)
        self.segment += 1
        if self.context.header + self.segment * self.context.mss >= len(self.packet):
            self._drop()

    def _out_uncut(self, frame: bytes, header: int, mss: int) -> None:
        """Send what the chip would cut, whole; the statistics have the segments."""
        self._frames -= 1
        self._bytes -= len(frame)
        full, rest = divmod(len(frame) - header, mss)
        self._statistics.sent(frame, header + mss + FCS, full)
        self._statistics.sent(frame, header + rest + FCS, int(rest > 0 or not full))
        self._send(frame)

    def _finish(self, lower: int, upper: int) -> None:
        """Send the packet as it is."""
        if not self.overrun:
            self._out(self.packet, lower, upper >> TxDescriptor.SPECIAL_SHIFT)
        self._drop()

    def _drop(self) -> None:
        self._packets += 1
        self.packet = bytearray()
        self.segment = -1
        self.overrun = False

    def _out(self, frame: bytearray, flags: int, special: int) -> None:
        """Send one frame, tagged and padded as asked for."""
        self._frames -= 1
        self._bytes -= len(frame)
        if not MINIMUM_FRAME <= len(frame) <= LONGEST:
            return
        out = bytes(frame)
        if flags & TxDescriptor.VLE and (ethertype := self._vlan()):
            out = insert_tag(out, ethertype, special)
        if len(out) < MINIMUM and self.tctl & TCTL.PSP:
            out = out.ljust(MINIMUM, b"\0")
        self._statistics.sent(out, len(out) + FCS)
        self._send(out)

    # ---- state

    def save(self) -> State:
        """See `Saved.save`."""
        return super().save() | {
            "packet": bytes(self.packet),
            "context": asdict(self.context),
            "ring": self.ring.save(),
        }

    def restore(self, state: State) -> None:
        """See `Saved.restore`; what was left to do is done soon."""
        super().restore(state)
        self.packet = bytearray(state["packet"])
        self.context = Context(**state["context"])
        self.ring.restore(state["ring"])
        self._next.set(self._clock.now() + PAUSE_NS)
