"""The block device (5.2): a disk whose work is done by the threads of an `IoPool`.

A notification turns chains into requests; data move between the host's file and guest RAM without a
copy. A small request that the host's page cache can serve is done on the spot: waking a thread
would take longer. If the disk is a plain file, that is native code from taking the descriptors to
giving them back (`transfer`). All others go to the pool (`deferred`).

Where the driver has not accepted FLUSH, or has switched the write cache off, a write is on stable
storage before it is given back (5.2.6.2).
"""

from __future__ import annotations

import ctypes
import struct
import time
from typing import Protocol

from ringfence.devices.virtio import transfer
from ringfence.devices.virtio.beside import (
    FAILED,
    LEFT,
    LONGEST_TURN,
    NOTHING,
    TOLD,
    TURN,
    Beside,
)
from ringfence.devices.virtio.deferred import DeferringDevice, Workers
from ringfence.devices.virtio.ring import PART, Chain, Ring
from ringfence.devices.virtio.transfer import AT_ONCE, BlockQueue
from ringfence.memory.buffers import Buffers, scatter, split, total

SECTOR = 512
QUEUE_SIZE = 256
SEGMENTS = 254
"""Data buffers in a request; the header and the status take one each."""
MAX_REQUEST = 64 << 20
"""Bytes that one request may move."""
MAX_DISCARD = MAX_REQUEST // SECTOR
MAX_RANGES = 16
"""Ranges in one DISCARD or WRITE_ZEROES request."""
SERIAL_LENGTH = 20

# Feature bits (5.2.3)
SEG_MAX, RO, BLK_SIZE, FLUSH, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES = (
    1 << bit for bit in (2, 5, 6, 9, 11, 12, 13, 14)
)
# Request types (5.2.6)
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
UNMAP = 1 << 0
"""Flag of a WRITE_ZEROES range."""
# Status (5.2.6)
OK, IOERR, UNSUPPORTED = 0, 1, 2

HEADER = struct.Struct("<IIQ")
"""type, reserved, sector (struct virtio_blk_req)."""
RANGE = struct.Struct("<QII")
"""sector, num_sectors, flags (struct virtio_blk_discard_write_zeroes)."""
CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
"""struct virtio_blk_config up to write_zeroes_may_unmap, in the order of 5.2.4."""
WRITEBACK_OFFSET = 32


class BlockBackend(Protocol):
    """What holds the data; see ``storage.disk.Disk``, whose methods these are."""

    size: int
    read_only: bool

    @property
    def file(self) -> int:
        """The descriptor of a file that has the disk's bytes at the same offsets; -1: none."""

    def read(self, offset: int, buffers: Buffers) -> None:
        """Fill ``buffers``."""

    def write(self, offset: int, buffers: Buffers) -> None:
        """Store ``buffers``."""

    def transfer(self, offset: int, vector: bytes, *, write: bool) -> int:
        """Read into, or write from, places of this process; bytes that were moved."""

    def read_now(self, offset: int, buffers: Buffers) -> bool:
        """Fill ``buffers`` if that needs no waiting."""

    def write_now(self, offset: int, buffers: Buffers) -> bool:
        """Store ``buffers`` if that needs no waiting."""

    def flush(self) -> None:
        """Return when everything is on stable storage."""

    def discard(self, offset: int, length: int) -> None:
        """Forget a range."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Clear a range."""


class _Refused(Exception):
    """A request that ends with a status other than OK."""

    def __init__(self, status: int) -> None:
        self.status = status


class VirtioBlk(DeferringDevice):
    """A disk.

    Parameters
    ----------
    disk : BlockBackend
        The data. It is not closed with the device: it outlives a reset of the machine.
    pool : Workers
        Who waits for it.
    serial : str
        What the guest sees as the disk's serial number, 20 ASCII characters at most.
    queues : int
        Number of request queues.
    """

    TYPE = 2
    CLASS_CODE = 0x010000
    QUEUE = BlockQueue
    FIELDS = ("writeback",)

    def __init__(
        self, disk: BlockBackend, pool: Workers, *, serial: str = "", queues: int = 1
    ) -> None:
        features = SEG_MAX | BLK_SIZE | FLUSH | CONFIG_WCE
        features |= RO if disk.read_only else DISCARD | WRITE_ZEROES
        if queues > 1:
            features |= MQ
        super().__init__(features, (QUEUE_SIZE,) * queues, pool)
        self._disk = disk
        self._serial = serial.encode("ascii", "replace")[:SERIAL_LENGTH]
        self.writeback = 1
        self._lanes: dict[int, Beside] = {}

    def insert(self, disk: BlockBackend) -> None:
        """Put a disk in place of the one that stood for it; no request has been made yet."""
        self._disk = disk

    def config(self) -> bytes:
        """See `VirtioDevice.config` (5.2.4)."""
        return CONFIG.pack(
            self._disk.size // SECTOR,
            0,  # size_max
            SEGMENTS,
            0, 0, 0,  # geometry
            SECTOR,
            0, 0, 0, 0,  # topology
            self.writeback,
            len(self.queue_sizes),
            MAX_DISCARD, MAX_RANGES, 1,  # discard: sectors, ranges, alignment
            MAX_DISCARD, MAX_RANGES, 1,  # write zeroes: sectors, ranges, may unmap
        )  # fmt: skip

    def config_write(self, offset: int, data: bytes) -> None:
        """See `VirtioDevice.config_write`: only writeback may be written."""
        if offset <= WRITEBACK_OFFSET < offset + len(data) and self.transport.features & CONFIG_WCE:
            self.writeback = data[WRITEBACK_OFFSET - offset] & 1

    def notified(self, number: int) -> None:
        """See `VirtioDevice.notified`."""
        ring = self.transport.ring(number)
        if ring is None:
            return
        if self._disk.file >= 0 and not ring.memory.incomplete:
            self._serve(number, ring)
        else:
            self.drain(number, lambda chain: self._begin(number, ring, chain))

    def _serve(self, number: int, ring: Ring) -> None:
        """As `drain`, where small requests are native code's affair (see `transfer`)."""
        queue = ring.queue
        queue.fd, queue.disk_size = self._disk.file, self._disk.size
        queue.write_back = not self._disk.read_only and not self._writes_through()
        queue.budget, queue.bytes_left, queue.found = ring.size + 1, transfer.TURN, 0
        beside = self._lane(number)
        queue.lane = beside.at
        serve = self.transport.natives("serve")
        ring.want_kicks(False)
        try:
            while (end := serve(ring.at)) != transfer.SPENT:
                if end in (transfer.NOTHING, transfer.BRISK):
                    quiet = self.transport.polls(number, queue.found, queue.first_bytes)
                    beside.unasked = end == transfer.BRISK
                    if quiet or beside.unasked or not ring.want_kicks(True):
                        return
                elif end == transfer.OTHER:
                    self._hand_over(number, ring, queue.length, queue.offset)
                elif end == transfer.BROKEN:
                    raise ring.error()
                else:
                    ring.settle()
            self.transport.again(number)
        finally:
            ring.settle()
            self.transport.publish(number)
            if queue.beside:
                self.begun(queue.beside)
                queue.beside = 0
                if self.transport.natives("lacks_worker")(beside.at):
                    self._send_worker(beside)

    def _lane(self, number: int) -> Beside:
        """A queue's lane, from its first use on."""
        if number not in self._lanes:
            if not self._lanes:
                self.transport.summons.add_device(self)
            self._lanes[number] = Beside(self.transport.summons.at)
        return self._lanes[number]

    def _send_worker(self, beside: Beside) -> None:
        """Have a thread of the pool work in a lane, which counts it already."""
        self._workers.submit(lambda: self._work_beside(beside))

    def _work_beside(self, beside: Beside) -> None:
        """Do what waits in a lane (a worker's thread); see `beside`."""
        work = self.transport.natives("work", True)
        until = time.monotonic_ns() + LONGEST_TURN
        while (end := work(beside.at, until)) != LEFT:
            if end == TOLD:
                with self.transport.lock:
                    self.bring_back()
            else:
                self._send_worker(beside)
                if end == TURN:
                    return

    def bring_back(self) -> None:
        """See `Collected.bring_back`: what workers have done."""
        if not self.busy:
            return
        for number, beside in self._lanes.items():
            ring = self.transport.ring(number)
            if ring is None:
                self.transport.natives("bring_back")(beside.at, 0, False)
            else:
                self._give_back_from(number, beside, ring)
            self.ended(beside.take_returned())

    def await_done(self, door: int) -> bool:
        """See `Collected.await_done`."""
        if not self.busy:
            return False
        wait = self.transport.natives("await_done", True)
        return any(wait(beside.at, door) for beside in tuple(self._lanes.values()))

    def _give_back_from(self, number: int, beside: Beside, ring: Ring) -> None:
        """Give back what is done in a lane, and take what was asked for without a notification."""
        bring_back = self.transport.natives("bring_back")
        while (end := bring_back(beside.at, ring.at, True)) != NOTHING:
            if end == FAILED:
                self._hand_over(number, ring, 0, 0)
            else:
                ring.settle()
        ring.settle()
        if beside.unasked:
            self.transport.look(number)
            if ring.queue.found:
                beside.lane.alone = 0  # asked for while others were under way
        elif beside.lane.returned:
            self.transport.publish(number)

    def _hand_over(self, number: int, ring: Ring, length: int, offset: int) -> None:
        """Have the pool do the request taken last; of a plain one it is known what to move."""
        chain = ring.taken()
        ring.settle()
        if not chain.runs:
            ring.push(chain, 0)
        elif length:
            self.defer(number, ring, chain, lambda each: self._transfer(chain, length, offset))
        else:
            self.defer(number, ring, chain, self._work)

    def _transfer(self, chain: Chain, length: int, offset: int) -> int:
        """Do a plain read or write (a worker's thread); what goes wrong is done by `_work`."""
        data = slice(PART.size * chain.boundary, -PART.size)
        write = data.start + PART.size == len(chain.parts)
        if write:
            data = slice(PART.size, data.start)
        try:
            if self._disk.transfer(offset, chain.parts[data], write=write) != length:
                return self._work(chain)
        except OSError:
            return self._work(chain)
        status, _ = PART.unpack(chain.parts[-PART.size :])
        ctypes.memset(status, OK, 1)
        return 1 if write else length + 1

    def gathers(self, number: int) -> bool:
        """See `VirtioDevice.gathers`."""
        del number
        return True

    def reset(self) -> None:
        """See `VirtioDevice.reset`."""
        self.writeback = 1

    def quiesce(self) -> None:
        """See `VirtioDevice.quiesce`."""
        with self.transport.lock:
            self.bring_back()
        super().quiesce()

    def close(self) -> None:
        """See `VirtioDevice.close`."""
        if self._lanes:
            self.transport.summons.remove_device(self)
        lanes, self._lanes = self._lanes, {}
        for beside in lanes.values():
            beside.close()

    # ---- requests

    def _begin(self, number: int, ring: Ring, chain: Chain) -> int | None:
        """Take a request; one without room for a status can't even be refused (5.2.6.1)."""
        written = self._at_once(chain) if chain.writable else 0
        if written is None:
            self.defer(number, ring, chain, self._work)
        return written

    def _at_once(self, chain: Chain) -> int | None:
        """Do a small request that needs no waiting; None if this is not one."""
        if len(chain.readable) == 0 or len(chain.readable[0]) != HEADER.size:
            return None
        if len(chain.writable[-1]) != 1:
            return None
        kind, _, sector = HEADER.unpack(chain.readable[0])
        if kind == T_IN:
            buffers, transfer = chain.writable[:-1], self._disk.read_now
        elif kind == T_OUT and not self._disk.read_only and not self._writes_through():
            buffers, transfer = chain.readable[1:], self._disk.write_now
        else:
            return None
        length = total(buffers)
        if length > AT_ONCE or not self._inside(sector, length):
            return None
        try:
            if not transfer(sector * SECTOR, buffers):
                return None
        except Exception:
            return None  # the pool will meet the same trouble, and report it
        chain.writable[-1][0] = OK
        return length + 1 if kind == T_IN else 1

    def _work(self, chain: Chain) -> int:
        """Do a request (a worker's thread)."""
        try:
            written = self._perform(chain)
            status = OK
        except _Refused as refusal:
            written, status = 0, refusal.status
        except Exception:
            # Whatever the host or an image does wrong is the guest's I/O error and no more.
            written, status = 0, IOERR
        chain.writable[-1][-1] = status
        if status != OK or written == chain.writable_length - 1:
            return chain.writable_length
        return min(written + 1, chain.writable_length)

    def _perform(self, chain: Chain) -> int:
        """Do a request and return how much it has written for the driver, the status aside."""
        header, outward = split(chain.readable, HEADER.size)
        raw = b"".join(header)
        if len(raw) < HEADER.size:
            raise _Refused(IOERR)
        kind, _, sector = HEADER.unpack(raw)
        inward, _ = split(chain.writable, chain.writable_length - 1)
        if kind == T_IN:
            length = total(inward)
            self._check(sector, length)
            self._disk.read(sector * SECTOR, inward)
            return length
        if kind == T_OUT:
            self._refuse_if_read_only()
            self._check(sector, total(outward))
            self._disk.write(sector * SECTOR, outward)
            self._write_through()
        elif kind == T_FLUSH:
            self._disk.flush()
        elif kind == T_GET_ID:
            return scatter(self._serial.ljust(SERIAL_LENGTH, b"\0"), inward)
        elif kind in (T_DISCARD, T_WRITE_ZEROES):
            self._refuse_if_read_only()
            self._clear(kind, b"".join(split(outward, MAX_RANGES * RANGE.size + 1)[0]))
            self._write_through()
        else:
            raise _Refused(UNSUPPORTED)
        return 0

    def _refuse_if_read_only(self) -> None:
        if self._disk.read_only:
            raise _Refused(IOERR)

    def _check(self, sector: int, length: int) -> None:
        """Refuse what is no run of whole sectors inside the disk."""
        if not self._inside(sector, length):
            raise _Refused(IOERR)

    def _inside(self, sector: int, length: int) -> bool:
        end = sector * SECTOR + length
        return length % SECTOR == 0 and length <= MAX_REQUEST and end <= self._disk.size

    def _clear(self, kind: int, data: bytes) -> None:
        """Discard ranges, or fill them with zeroes (5.2.6.2)."""
        if not data or len(data) % RANGE.size or len(data) > MAX_RANGES * RANGE.size:
            raise _Refused(IOERR)
        ranges = list(RANGE.iter_unpack(data))
        for sector, count, flags in ranges:
            if flags & ~(UNMAP if kind == T_WRITE_ZEROES else 0):
                raise _Refused(UNSUPPORTED)
            self._check(sector, count * SECTOR)
        for sector, count, flags in ranges:
            if not count:
                continue
            if kind == T_DISCARD:
                self._disk.discard(sector * SECTOR, count * SECTOR)
            else:
                self._disk.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags & UNMAP))

    def _writes_through(self) -> bool:
        """Tell whether a write has to be on stable storage when it is given back."""
        features = self.transport.features
        if features & CONFIG_WCE:
            return not self.writeback
        return not features & FLUSH

    def _write_through(self) -> None:
        if self._writes_through():
            self._disk.flush()
