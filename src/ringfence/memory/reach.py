"""RAM as native code of devices sees it: where it is in the host, and which parts were changed.

A device's native code gets a structure that begins with `Reach`. What it writes to RAM it notes as
*runs*, pairs of an offset into RAM's mapping and a length, for `GuestMemory.dma_written_runs`: one
call tells the observers of a whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from ringfence.native.dialect import native_inline
from ringfence.native.layout import Struct, u64

if TYPE_CHECKING:
    from ringfence.memory.ram import GuestMemory

HIGH = 1 << 32
"""Where RAM goes on behind the hole for devices."""


class Reach(Struct):
    """Where guest RAM is; see `memory.ram` for its two parts."""

    ram_host: Annotated[int, u64]
    """Host address of its first byte."""
    ram_low: Annotated[int, u64]
    """Bytes from 0 on."""
    ram_high: Annotated[int, u64]
    """Bytes from 4 GiB on, which follow in the host."""


def set_reach(view: Any, memory: GuestMemory) -> None:
    """Fill in these fields of a structure's view."""
    view.ram_host = memory.host_base
    view.ram_low = memory.regions[0].size
    view.ram_high = memory.regions[1].size if len(memory.regions) > 1 else 0


@native_inline
def reached(reach: Reach, address: int, length: int) -> int:
    """Host address of ``length`` bytes at a guest-physical address; 0 where not all is RAM."""
    if address < reach.ram_low:
        return reach.ram_host + address if length <= reach.ram_low - address else 0
    high = address - HIGH
    if address >= HIGH and high < reach.ram_high and length <= reach.ram_high - high:
        return reach.ram_host + reach.ram_low + high
    return 0
