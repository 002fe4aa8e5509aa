"""The statistics registers, 0x4000 to 0x40FC (13.7): 32 bits each, cleared by reading them.

Counters stop at their largest value. Octet counters are pairs; reading the upper half clears both.
"""

from __future__ import annotations

from bisect import bisect_left

from ringfence.chipset.state import Saved
from ringfence.devices.e1000.registers import ALL, STATISTICS, STATISTICS_END

COUNT = (STATISTICS_END - STATISTICS) // 4
_SIZES = (64, 127, 255, 511, 1023)
"""Largest frame, with its FCS, of each size counter but the last."""


def _index(offset: int) -> int:
    return offset - STATISTICS >> 2


MPC = _index(0x4010)
RLEC = _index(0x4040)
PRC64 = _index(0x405C)
GPRC, BPRC, MPRC, GPTC = (_index(offset) for offset in (0x4074, 0x4078, 0x407C, 0x4080))
GORCL, GOTCL = _index(0x4088), _index(0x4090)
RNBC, ROC = _index(0x40A0), _index(0x40AC)
TORL, TOTL, TPR, TPT = (_index(offset) for offset in (0x40C0, 0x40C8, 0x40D0, 0x40D4))
PTC64, MPTC, BPTC = _index(0x40D8), _index(0x40F0), _index(0x40F4)
TSCTC, TSCTFC = _index(0x40F8), _index(0x40FC)
_PAIRS = (GORCL, GOTCL, TORL, TOTL)


class Statistics(Saved):
    """All counters, by their index from 0x4000; of pairs the lower one holds the whole value."""

    FIELDS = ("counters",)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all to 0."""
        self.counters = [0] * COUNT

    def read(self, index: int) -> int:
        """Read the register of that index, and clear it."""
        counters = self.counters
        if index in _PAIRS:
            return counters[index] & ALL
        if index - 1 in _PAIRS:
            value, counters[index - 1] = counters[index - 1], 0
            return min(value >> 32, ALL)
        value, counters[index] = counters[index], 0
        return min(value, ALL)

    def sent(self, frame: bytes | bytearray, length: int, count: int = 1) -> None:
        """Count frames like this one, of ``length`` bytes each, FCS included."""
        counters = self.counters
        counters[TPT] += count
        counters[GPTC] += count
        counters[TOTL] += count * length
        counters[GOTCL] += count * length
        counters[PTC64 + bisect_left(_SIZES, length)] += count
        if frame[0] & 1:
            counters[BPTC if frame[:6] == b"\xff\xff\xff\xff\xff\xff" else MPTC] += count

    def arrived(self, length: int, count: int = 1) -> None:
        """Count frames of a length on the wire, whether they are for us or not."""
        self.counters[TPR] += count
        self.counters[TORL] += count * length

    def received(self, frame: bytes, length: int, count: int = 1) -> None:
        """Count frames like this one, of ``length`` bytes each, that were stored."""
        counters = self.counters
        counters[GPRC] += count
        counters[GORCL] += count * length
        counters[PRC64 + bisect_left(_SIZES, length)] += count
        if frame[0] & 1:
            counters[BPRC if frame[:6] == b"\xff\xff\xff\xff\xff\xff" else MPRC] += count
