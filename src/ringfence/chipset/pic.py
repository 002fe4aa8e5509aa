"""The pair of 8259A interrupt controllers, with the edge/level control registers.

Each chip is its own `Chip`, whose ``out`` says whether it asks for service. The slave's output is
the master's IR2, followed as a level. `PicPair` wires the two and drives the CPU's INTR.
Register and command names are the 8259A data sheet's; ELCR is the PIIX3's (4.1.4.2).
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.chipset.bus import PortBus
from ringfence.chipset.state import Saved, State, check_version

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
CASCADE = 2
ICW1, ICW1_SINGLE, ICW1_IC4 = 0x10, 0x02, 0x01
OCW3 = 0x08
ICW4_SFNM, ICW4_AEOI = 0x10, 0x02


class Chip(Saved):
    """One 8259A, two ports wide.

    Parameters
    ----------
    changed : Callable[[], None]
        Called after each access that may have changed ``out``.
    cascade : int
        Bits of ``irr`` that follow another chip's output.
    """

    FIELDS = (
        "irr", "isr", "imr", "lines", "elcr", "base", "lowest", "read_isr", "poll",
        "special_mask", "auto_eoi", "rotate_auto", "nested", "step", "icw1",
    )  # fmt: skip

    def __init__(self, changed: Callable[[], None], cascade: int = 0) -> None:
        self._changed = changed
        self._cascade = cascade
        self.irr = self.isr = 0
        self.imr = 0xFF
        self.lines = 0
        self.elcr = 0
        self.base = 0
        self.lowest = 7
        """The level of lowest priority; the one after it is the highest."""
        self.read_isr = self.poll = self.special_mask = False
        self.auto_eoi = self.rotate_auto = self.nested = False
        self.step = 0
        """Which ICW comes next at port 1: 2, 3, 4, or 0 for OCW1."""
        self.icw1 = 0

    def set_line(self, level: int, asserted: bool) -> None:
        """Drive IR ``level``: latch an edge, or follow where ELCR or a cascade says so."""
        bit = 1 << level
        if asserted:
            if not self.lines & bit or (self.elcr | self._cascade) & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            if (self.elcr | self._cascade) & bit:
                self.irr &= ~bit

    def pending(self) -> int | None:
        """Return the level that would be acknowledged now, or None."""
        wanted = self._first(self.irr & ~self.imr)
        if wanted is None:
            return None
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        if self.nested:
            serving &= ~self._cascade
        current = self._first(serving)
        if current is None or self._rank(wanted) < self._rank(current):
            return wanted
        return None

    def acknowledge(self) -> int:
        """Do an INTA cycle and return the level: 7 if nothing asks (spurious)."""
        level = self.pending()
        if level is None:
            return 7
        bit = 1 << level
        if not (self.elcr & bit and self.lines & bit):
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_auto:
            self.lowest = level
        return level

    def read(self, offset: int, size: int) -> int:
        """Read IMR (port 1), or IRR, ISR or the poll byte (port 0)."""
        if self.poll:
            self.poll = False
            level = self.pending()
            value = 0 if level is None else 0x80 | self.acknowledge()
            self._changed()
            return value
        if offset:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, size: int, value: int) -> None:
        """Write an initialization or operation command word."""
        if offset:
            self._write_port1(value)
        elif value & ICW1:
            self._initialize(value)
        elif value & OCW3:
            self.poll = bool(value & 0x04)
            if value & 0x02:
                self.read_isr = bool(value & 0x01)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._write_ocw2(value)
        self._changed()

    def _first(self, levels: int) -> int | None:
        """Return the level of highest priority in a bit mask."""
        for rank in range(8):
            level = self.lowest + 1 + rank & 7
            if levels >> level & 1:
                return level
        return None

    def _rank(self, level: int) -> int:
        return level - self.lowest - 1 & 7

    def _initialize(self, value: int) -> None:
        self.icw1 = value
        self.step = 2
        self.irr &= self.lines & (self.elcr | self._cascade)
        self.isr = self.imr = 0
        self.lowest = 7
        self.read_isr = self.poll = self.special_mask = False
        self.auto_eoi = self.rotate_auto = self.nested = False

    def _write_port1(self, value: int) -> None:
        step = self.step
        if step == 0:
            self.imr = value
            return
        if step == 2:
            self.base = value & 0xF8
            self.step = 3
            if self.icw1 & ICW1_SINGLE:
                self.step = 4
        elif step == 3:
            self.step = 4
        else:
            self.nested = bool(value & ICW4_SFNM)
            self.auto_eoi = bool(value & ICW4_AEOI)
            self.step = 0
        if self.step == 4 and not self.icw1 & ICW1_IC4:
            self.step = 0

    def _write_ocw2(self, value: int) -> None:
        """OCW2: R, SL, EOI in bits 7:5, level in bits 2:0."""
        rotate, specific, eoi = bool(value & 0x80), value & 0x40, value & 0x20
        level: int | None = value & 7
        if not eoi:
            if specific and rotate:
                self.lowest = value & 7
            elif not specific:
                self.rotate_auto = rotate
            return
        if not specific:
            serving = self.isr & ~self.imr if self.special_mask else self.isr
            level = self._first(serving)
        if level is not None:
            self.isr &= ~(1 << level)
            if rotate:
                self.lowest = level


class PicPair:
    """Both 8259As: 16 interrupt lines, one INTR output.

    Parameters
    ----------
    intr : Callable[[bool], None]
        Called with the output's level when it changes.
    """

    VERSION = 1

    def __init__(self, intr: Callable[[bool], None]) -> None:
        self._intr = intr
        self.master = Chip(self._update, cascade=1 << CASCADE)
        self.slave = Chip(self._update)
        self.output = False

    def attach(self, ports: PortBus) -> None:
        """Take the ports 0x20-21, 0xa0-a1, 0x4d0-4d1."""
        ports.register(MASTER, 2, self.master, widths=(1,))
        ports.register(SLAVE, 2, self.slave, widths=(1,))
        ports.register(ELCR, 2, self, widths=(1,))

    def set_irq(self, irq: int, asserted: bool) -> None:
        """Drive interrupt line 0-15; line 2 is taken by the cascade and ignored."""
        if irq != CASCADE:
            (self.slave if irq & 8 else self.master).set_line(irq & 7, asserted)
            self._update()

    def acknowledge(self) -> int:
        """Do the INTA cycles and return the vector."""
        level = self.master.acknowledge()
        if level == CASCADE:
            vector = self.slave.base + self.slave.acknowledge()
        else:
            vector = self.master.base + level
        self._update()
        return vector

    def read(self, offset: int, size: int) -> int:
        """Read ELCR1 or ELCR2: a set bit makes the line level-triggered."""
        return self.slave.elcr if offset else self.master.elcr

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ELCR1 or ELCR2; IRQ 0, 1, 2, 8 and 13 are always edge-triggered."""
        if offset:
            self.slave.elcr = value & 0xDE
        else:
            self.master.elcr = value & 0xF8
        self._update()

    def _update(self) -> None:
        self.master.set_line(CASCADE, self.slave.pending() is not None)
        output = self.master.pending() is not None
        if output != self.output:
            self.output = output
            self._intr(output)

    def save(self) -> State:
        """Return the state of both chips."""
        return {
            "version": self.VERSION,
            "master": self.master.save(),
            "slave": self.slave.save(),
            "output": self.output,
        }

    def restore(self, state: State) -> None:
        """Take over what `save` returned; the output is not driven anew."""
        check_version("PicPair", state, self.VERSION)
        self.master.restore(state["master"])
        self.slave.restore(state["slave"])
        self.output = bool(state["output"])
