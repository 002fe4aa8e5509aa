"""The MC146818 real-time clock with its CMOS RAM, at ports 0x70 and 0x71.

The time is computed from the host's wall clock (UTC) plus ``offset``, which changes when the guest
sets the clock. Nothing ticks by itself: update and alarm flags are worked out when the guest
looks, and a deadline is armed only while one of the three interrupts is enabled. Register names
are the MC146818 data sheet's; the CMOS bytes beyond it are the PC's.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ringfence.chipset.clock import NS_PER_SECOND, Deadline, TimerQueue
from ringfence.chipset.state import Saved

BASE, LENGTH = 0x70, 2
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY, MONTH, YEAR = range(6, 10)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
_TIME_REGISTERS = frozenset({SECONDS, MINUTES, HOURS, *range(DAY_OF_WEEK, YEAR + 1), CENTURY})

A_UIP = 0x80
B_SET, B_PIE, B_AIE, B_UIE, B_DM, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VRT = 0x80
_ENABLES = B_PIE | B_AIE | B_UIE
UIP_NS = 244_000
"""UIP is set this long before each update (data sheet, table 6)."""
PM = 0x80
"""Bit 7 of the hours in 12-hour mode."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def memory_bytes(size: int) -> dict[int, int]:
    """Return the CMOS bytes by which firmware told the size of memory, in bytes."""
    low = min(size, 3 << 30)
    extended = min(0xFFFF, max(0, low - (1 << 20)) >> 10)
    above_16m = min(0xFFFF, max(0, low - (16 << 20)) >> 16)
    above_4g = min(0xFF_FFFF, (size - low) >> 16)
    words = {0x15: 640, 0x17: extended, 0x30: extended, 0x34: above_16m}
    cmos = {0x14: 0x02}
    for index, word in words.items():
        cmos |= {index: word & 0xFF, index + 1: word >> 8}
    for byte in range(3):
        cmos[0x5B + byte] = above_4g >> 8 * byte & 0xFF
    return cmos


class Rtc(Saved):
    """Clock, calendar, alarm and 128 bytes of CMOS RAM.

    Parameters
    ----------
    queue : TimerQueue
        The board's timers; its clock gives the time of day.
    irq : Callable[[bool], None]
        Drives IRQ 8.
    memory_size : int
        Guest RAM in bytes, told in the CMOS.
    """

    FIELDS = ("index", "ram", "offset", "frozen", "staged", "checked", "periods_from")

    def __init__(self, queue: TimerQueue, irq: Callable[[bool], None], memory_size: int) -> None:
        self._clock = queue.clock
        self._irq = irq
        self._timer = Deadline(queue, self._tick)
        self.index = 0
        self.ram = [0] * 128
        for index, value in memory_bytes(memory_size).items():
            self.ram[index] = value
        self.ram[REGISTER_A] = 0x26
        self.ram[REGISTER_B] = B_24H
        self.offset = 0
        """Seconds that the guest's time of day is ahead of the host's."""
        self.frozen = 0
        """Guest seconds when B.SET stopped the clock; counts only while it is set."""
        self.staged: dict[int, int] = {}
        """Time registers written while B.SET is set; they take effect when it is cleared."""
        self.checked = self._seconds()
        """Guest seconds up to which update and alarm flags are worked out."""
        self.periods_from = 0
        """Clock ns up to which the periodic flag is worked out."""

    def read(self, offset: int, size: int) -> int:
        """Read the chosen register at port 0x71; 0x70 is write-only."""
        if not offset:
            return 0xFF
        index = self.index
        if index in _TIME_REGISTERS:
            return self.staged.get(index, self._time_fields()[index])
        if index == REGISTER_A:
            updating = self._wall() % NS_PER_SECOND >= NS_PER_SECOND - UIP_NS
            return self.ram[index] | (A_UIP if updating and not self._set else 0)
        if index == REGISTER_C:
            self._work_out_flags()
            value = self.ram[index]
            self.ram[index] = 0
            self._irq(False)
            self._arm()
            return value
        if index == REGISTER_D:
            return D_VRT
        return self.ram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a register at port 0x70 (bit 7, the NMI mask, is ignored) or write it."""
        if not offset:
            self.index = value & 0x7F
            return
        index = self.index
        if index in _TIME_REGISTERS:
            self.staged[index] = value
            if not self._set:
                self._take_staged()
        elif index == REGISTER_A:
            self._work_out_flags()
            self.ram[index] = value & 0x7F
            self.periods_from = self._clock.now()
            self._arm()
        elif index == REGISTER_B:
            self._write_b(value)
        elif index not in (REGISTER_C, REGISTER_D):
            self._work_out_flags()
            self.ram[index] = value
            self._arm()

    def restored(self) -> None:
        """Arm again."""
        self._arm()

    # ---- time of day

    @property
    def _set(self) -> bool:
        return bool(self.ram[REGISTER_B] & B_SET)

    def _wall(self) -> int:
        """Guest wall clock in ns since the epoch."""
        return self._clock.wall() + self.offset * NS_PER_SECOND

    def _seconds(self) -> int:
        return self.frozen if self._set else self._wall() // NS_PER_SECOND

    def _encode(self, value: int) -> int:
        return value if self.ram[REGISTER_B] & B_DM else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.ram[REGISTER_B] & B_DM else (value >> 4) * 10 + (value & 0xF)

    def _encode_hours(self, hours: int) -> int:
        if self.ram[REGISTER_B] & B_24H:
            return self._encode(hours)
        return self._encode(hours % 12 or 12) | (PM if hours >= 12 else 0)

    def _decode_hours(self, value: int) -> int:
        if self.ram[REGISTER_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & PM else 0)

    def _time_fields(self) -> dict[int, int]:
        """Return the time registers as the guest reads them."""
        now = _EPOCH + timedelta(seconds=self._seconds())
        encode = self._encode
        return {
            SECONDS: encode(now.second),
            MINUTES: encode(now.minute),
            HOURS: self._encode_hours(now.hour),
            DAY_OF_WEEK: encode(now.isoweekday() % 7 + 1),
            DAY: encode(now.day),
            MONTH: encode(now.month),
            YEAR: encode(now.year % 100),
            CENTURY: encode(now.year // 100),
        }

    def _take_staged(self) -> None:
        """Set the time from the registers written; what makes no date is clamped to one."""
        fields = self._time_fields() | self.staged
        self.staged = {}
        decode = self._decode
        year = min(9998, max(1, decode(fields[CENTURY]) * 100 + decode(fields[YEAR])))
        month = min(12, max(1, decode(fields[MONTH])))
        first = datetime(year, month, 1, tzinfo=UTC)
        length = ((first + timedelta(days=31)).replace(day=1) - first).days
        moment = first.replace(
            day=min(length, max(1, decode(fields[DAY]))),
            hour=min(23, self._decode_hours(fields[HOURS])),
            minute=min(59, decode(fields[MINUTES])),
            second=min(59, decode(fields[SECONDS])),
        )
        seconds = int((moment - _EPOCH).total_seconds())
        self.offset += seconds - self._wall() // NS_PER_SECOND
        self.checked = seconds
        self._arm()

    # ---- interrupts

    def _write_b(self, value: int) -> None:
        self._work_out_flags()
        if value & B_SET and not self._set:
            self.frozen = self._seconds()
            value &= ~B_UIE
        elif self._set and not value & B_SET:
            self.offset = self.frozen - self._clock.wall() // NS_PER_SECOND
            self._take_staged()
        if value & B_PIE and not self.ram[REGISTER_B] & B_PIE:
            self.periods_from = self._clock.now()
        self.ram[REGISTER_B] = value
        self.checked = self._seconds()
        self._raise()
        self._arm()

    def _period(self) -> int:
        """Return the periodic interrupt's period in ns, 0 for none (data sheet, table 5)."""
        rate = self.ram[REGISTER_A] & 0xF
        if rate and rate < 3:
            rate += 7
        return NS_PER_SECOND * (1 << rate - 1) // 32768 if rate else 0

    def _next_alarm(self) -> int | None:
        """Return the guest second of the next alarm after ``checked``, or None if there's none.

        A field from 0xc0 up matches anything (data sheet, "alarm"). Skips ahead field by field:
        at most one day's hours, one hour's minutes and one minute's seconds are looked at.
        """
        second, minute, hour = (
            None if self.ram[index] >= 0xC0 else decode(self.ram[index])
            for index, decode in (
                (SECONDS_ALARM, self._decode),
                (MINUTES_ALARM, self._decode),
                (HOURS_ALARM, self._decode_hours),
            )
        )
        if (hour or 0) > 23 or (minute or 0) > 59 or (second or 0) > 59:
            return None
        at = self.checked + 1
        while True:
            if hour is not None and at // 3600 % 24 != hour:
                at += 3600 - at % 3600
            elif minute is not None and at // 60 % 60 != minute:
                at += 60 - at % 60
            elif second is not None and at % 60 != second:
                at += 1
            else:
                return at

    def _work_out_flags(self) -> None:
        """Set the flags in register C for all that happened since the last time."""
        flags = 0
        now = self._seconds()
        if now > self.checked:
            flags |= C_UF
            alarm = self._next_alarm()
            if alarm is not None and alarm <= now:
                flags |= C_AF
        self.checked = now
        period = self._period()
        elapsed = self._clock.now() - self.periods_from
        if period and elapsed >= period:
            flags |= C_PF
            self.periods_from += elapsed // period * period
        self.ram[REGISTER_C] |= flags
        self._raise()

    def _raise(self) -> None:
        if self.ram[REGISTER_C] & self.ram[REGISTER_B] & _ENABLES:
            self.ram[REGISTER_C] |= C_IRQF
            self._irq(True)
        else:
            self.ram[REGISTER_C] &= ~C_IRQF
            self._irq(False)

    def _tick(self) -> None:
        self._work_out_flags()
        self._arm()

    def _arm(self) -> None:
        """Set the deadline of the next interrupt that is enabled and not yet flagged."""
        enabled = self.ram[REGISTER_B] & _ENABLES & ~self.ram[REGISTER_C]
        now = self._clock.now()
        deadlines = []
        if enabled & B_PIE and self._period():
            deadlines.append(self.periods_from + self._period())
        if not self._set:
            wall = self._wall()
            if enabled & B_UIE:
                deadlines.append(now + NS_PER_SECOND - wall % NS_PER_SECOND)
            alarm = self._next_alarm() if enabled & B_AIE else None
            if alarm is not None:
                deadlines.append(now + max(0, alarm * NS_PER_SECOND - wall))
        self._timer.set(min(deadlines) if deadlines else None)
