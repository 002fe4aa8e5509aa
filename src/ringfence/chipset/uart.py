"""The 16550A serial port: the guest's console.

Transmission takes no time: a byte written to THR joins ``_output``, and THR is empty again at
once. The batch goes to the sink at a newline, when it is large, or two milliseconds after its
first byte; so a byte costs one append. Registers are National's PC16550D data sheet's.

Reception: the host's bytes wait in an unbounded queue that refills the 16-byte FIFO whenever the
guest makes room. Like a terminal with hardware flow control, the host obeys RTS once the guest has
written MCR, so nothing typed before the driver is up gets lost to the driver's clearing of the
FIFO; a guest that polls for input without RTS, as UEFI does, is known by its repeated looks at LSR
and gets it all the same. The character time-out passes in no time: data below the trigger level
interrupt at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ringfence.chipset.clock import Deadline, TimerQueue
from ringfence.chipset.state import Saved, State

BASE, LENGTH, IRQ = 0x3F8, 8, 4
"""COM1."""
FIFO_SIZE = 16
FLUSH_NS = 2_000_000
FLUSH_BYTES = 512
POLLING = 8
"""Looks at LSR without a byte written in between, by which the guest seems to wait for input."""

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_WRITABLE = 0x01, 0x02, 0xC9
_TRIGGERS = (1, 4, 8, 14)
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_BREAKS, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x1E, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_TERI = 0x04
_NEWLINE = 0x0A


class Uart(Saved):
    """One serial port of eight I/O ports.

    Parameters
    ----------
    queue : TimerQueue
        For flushing output that does not end in a newline.
    irq : Callable[[bool], None]
        Drives the interrupt line.
    sink : Callable[[bytes], None]
        Takes the guest's output in batches, with the board's lock held: it should not block.
    """

    FIELDS = (
        "ier", "fcr", "lcr", "mcr", "lsr", "msr", "scr", "divisor",
        "thri", "held_by_rts", "polls",
    )  # fmt: skip

    def __init__(
        self, queue: TimerQueue, irq: Callable[[bool], None], sink: Callable[[bytes], None]
    ) -> None:
        self._clock = queue.clock
        self._timer = Deadline(queue, self.flush)
        self._irq = irq
        self._line = False
        self.sink = sink
        self._output = bytearray()
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.lsr = LSR_THRE | LSR_TEMT
        self.msr = MSR_CTS | MSR_DSR | MSR_DCD
        self.divisor = 12
        self.fifo: deque[int] = deque()
        self.queue: deque[int] = deque()
        self.thri = False
        """The THR-empty interrupt is pending."""
        self.held_by_rts = False
        """True once the guest has written MCR: from then on RTS gates the host's bytes."""
        self.polls = 0
        """Looks at LSR since THR was written last, up to POLLING."""

    # ---- the host's side

    def receive(self, data: bytes) -> None:
        """Queue bytes for the guest; they reach it as fast as it reads."""
        self.queue.extend(data)
        self._refill()

    def quiet_status(self) -> int | None:
        """LSR, if reading it changes nothing and a byte written to THR does nothing but go out."""
        if self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THRI:
            return None
        return None if self.lsr & LSR_BREAKS else self.lsr

    def pending_input(self) -> int:
        """Return how many received bytes the guest has not read yet."""
        return len(self.queue) + len(self.fifo)

    def flush(self) -> None:
        """Hand the output collected so far to the sink."""
        if self._output:
            data = bytes(self._output)
            self._output.clear()
            self.sink(data)

    # ---- the guest's side

    def read(self, offset: int, size: int) -> int:
        """Read a register (PC16550D table II)."""
        if offset == LSR:
            self.polls = min(self.polls + 1, POLLING)
            if self.polls == POLLING:
                self._refill()
            value = self.lsr
            if value & LSR_BREAKS:
                self.lsr = value & ~LSR_BREAKS
                self._update()
            return value
        if offset == RBR_THR:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._read_rbr()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == MSR:
            return self._read_msr()
        return (self.lcr, self.mcr, self.scr)[{LCR: 0, MCR: 1}.get(offset, 2)]

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        if offset == RBR_THR:
            self.polls = 0
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
            elif self.mcr & MCR_LOOP:
                self._loop_back(value)
            else:
                output = self._output
                output.append(value)
                if value == _NEWLINE or len(output) >= FLUSH_BYTES:
                    self.flush()
                elif len(output) == 1 and not self._timer.armed:
                    self._timer.set(self._clock.now() + FLUSH_NS)
            if self.ier & IER_THRI and not self.thri and not self.lcr & LCR_DLAB:
                self.thri = True
                self._update()
        elif offset == IER:
            self._write_ier(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._write_mcr(value)
        elif offset == SCR:
            self.scr = value

    def transmit(self, data: bytes) -> None:
        """Write bytes to THR, one behind the other, while `quiet_status` has a value."""
        self.polls = 0
        output = self._output
        output += data
        if _NEWLINE in data or len(output) >= FLUSH_BYTES:
            self.flush()
        elif output and not self._timer.armed:
            self._timer.set(self._clock.now() + FLUSH_NS)

    def _read_rbr(self) -> int:
        if not self.fifo:
            return 0
        value = self.fifo.popleft()
        if not self.fifo:
            self.lsr &= ~LSR_DR
        if not self._refill():
            self._update()
        return value

    def _read_iir(self) -> int:
        """Report the interrupt of highest priority; reading THRI acknowledges it."""
        cause = self._cause()
        if cause == IIR_THRI:
            self.thri = False
            self._update()
        return cause | (IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    def _read_msr(self) -> int:
        if self.mcr & MCR_LOOP:
            return self._looped_msr() | self.msr & 0x0F
        value = self.msr
        if value & 0x0F:
            self.msr = value & 0xF0
            self._update()
        return value

    def _looped_msr(self) -> int:
        """In loopback RTS, DTR, OUT1, OUT2 are CTS, DSR, RI, DCD (8.6.6)."""
        mcr = self.mcr
        return (
            (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _write_ier(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF | value << 8
            return
        enabled = value & ~self.ier
        self.ier = value & 0x0F
        if enabled & IER_THRI:
            self.thri = True
        elif not value & IER_THRI:
            self.thri = False
        if not self._refill():
            self._update()

    def _write_fcr(self, value: int) -> None:
        """Write FCR; clearing the receiver FIFO puts the host's bytes back into its queue."""
        toggled = (value ^ self.fcr) & FCR_ENABLE
        self.fcr = value & FCR_WRITABLE if value & FCR_ENABLE else 0
        if toggled or (value & FCR_CLEAR_RX and value & FCR_ENABLE):
            if not self.mcr & MCR_LOOP:
                self.queue.extendleft(reversed(self.fifo))
            self.fifo.clear()
            self.lsr &= ~(LSR_DR | LSR_OE)
        if not self._refill():
            self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._looped_msr() if self.mcr & MCR_LOOP else self.msr & 0xF0
        self.mcr = value & 0x1F
        self.held_by_rts = True
        if self.mcr & MCR_LOOP:
            after = self._looped_msr()
            changed = (before ^ after) >> 4 & 0x0B
            if before & ~after & MSR_RI:
                changed |= MSR_TERI
            self.msr |= changed
        if not self._refill():
            self._update()

    def _loop_back(self, value: int) -> None:
        """Receive what was transmitted."""
        if len(self.fifo) >= self._capacity():
            self.lsr |= LSR_OE
            if not self.fcr & FCR_ENABLE:
                self.fifo[0] = value
        else:
            self.fifo.append(value)
        self.lsr |= LSR_DR
        self._update()

    # ---- inside

    def _capacity(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    def _refill(self) -> bool:
        """Move the host's bytes into the FIFO as far as there is room; True if any moved."""
        queue, fifo = self.queue, self.fifo
        if not queue or self.mcr & MCR_LOOP:
            return False
        wanted = self.mcr & MCR_RTS or self.ier & IER_RDI or self.polls == POLLING
        if self.held_by_rts and not wanted:
            return False
        room = min(self._capacity() - len(fifo), len(queue))
        if room <= 0:
            return False
        for _ in range(room):
            fifo.append(queue.popleft())
        self.lsr |= LSR_DR
        self._update()
        return True

    def _cause(self) -> int:
        """Return the IIR's interrupt identification (PC16550D table IV)."""
        ier = self.ier
        if ier & IER_RLSI and self.lsr & LSR_BREAKS:
            return IIR_RLSI
        if ier & IER_RDI and self.fifo:
            trigger = _TRIGGERS[self.fcr >> 6] if self.fcr & FCR_ENABLE else 1
            return IIR_RDI if len(self.fifo) >= trigger else IIR_TIMEOUT
        if self.thri:
            return IIR_THRI
        if ier & IER_MSI and self.msr & 0x0F:
            return IIR_MSI
        return IIR_NONE

    def _update(self) -> None:
        """Drive the interrupt line (OUT2 gates it on a PC; guests that forget it are forgiven)."""
        line = self._cause() != IIR_NONE
        if line != self._line:
            self._line = line
            self._irq(line)

    def save(self) -> State:
        """See `Saved.save`; output collected so far goes to the sink first."""
        self.flush()
        return super().save() | {"fifo": bytes(self.fifo), "queue": bytes(self.queue)}

    def restore(self, state: State) -> None:
        """See `Saved.restore`; the interrupt controllers remember the line's level themselves."""
        super().restore(state)
        self.fifo = deque(state["fifo"])
        self.queue = deque(state["queue"])
        self._line = self._cause() != IIR_NONE
