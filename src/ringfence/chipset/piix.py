"""What firmware finds on an i440FX board with a PIIX south bridge, beside what every machine has.

Firmware goes by PCI identities. The host bridge (see `pci.host`) has PAM registers for shadow RAM;
the PIIX3 is the ISA bridge, its PIRQ routing is stored and means nothing, as interrupt pins have
lines of their own; of the PIIX4 there is the power management function, which says by PMBASE where
`pm.PowerManagement` is. SMIs don't exist, and APMC_EN says that whoever needed them has been there.

Sources: Intel 82371AB (PIIX4) data sheet, 7.1 and 7.2; 82371FB/SB (PIIX, PIIX3) data sheet.
"""

from __future__ import annotations

from ringfence.chipset import pm
from ringfence.chipset.bus import PortBus, Window
from ringfence.chipset.pci.config import Identity, Register
from ringfence.chipset.pci.device import PciDevice, Socket

ISA_BRIDGE = Identity(vendor=0x8086, device=0x7000, class_code=0x060100)
POWER_MANAGEMENT = Identity(vendor=0x8086, device=0x7113, class_code=0x068000, revision=3)
SLOT, ISA_FUNCTION, POWER_FUNCTION = 1, 0, 3
PIRQ_ROUTE = Register(0x60, 4)
X_BUS_CHIP_SELECT = Register(0x4E, 2)
PMBASE, DEVACTB, PMREGMISC = Register(0x40, 4), Register(0x58, 4), Register(0x80, 1)
SOFT_OFF = 0
"""SLP_TYP for power-off (7.2.3), as firmware knows it that reads no tables."""
PMBASE_MASK, PMIOSE, APMC_EN = 0xFFC0, 0x01, 1 << 25


class IsaBridge(PciDevice):
    """PIIX3, function 0."""

    def __init__(self) -> None:
        super().__init__(ISA_BRIDGE, pin=0)
        self.config.allow(PIRQ_ROUTE, 0xFFFF_FFFF)
        self.config.allow(X_BUS_CHIP_SELECT, 0xFFFF)


class PowerFunction(PciDevice):
    """PIIX4, function 3: where the power management registers are.

    Parameters
    ----------
    power : PowerManagement
        The registers; not attached elsewhere.
    """

    def __init__(self, power: pm.PowerManagement) -> None:
        super().__init__(POWER_MANAGEMENT, pin=0)
        self._power = power
        power.off_types.add(SOFT_OFF)
        self._window: Window | None = None
        self._slot: Socket | None = None
        self.config.set(PMBASE, 1)
        self.config.set(DEVACTB, APMC_EN)
        self.config.allow(PMBASE, PMBASE_MASK)
        self.config.allow(DEVACTB, 0xFFFF_FFFF)
        self.config.allow(PMREGMISC, PMIOSE)

    @property
    def base(self) -> int:
        """The ports' base; 0 while they are nowhere."""
        if not self.config.get(PMREGMISC) & PMIOSE:
            return 0
        return self.config.get(PMBASE) & PMBASE_MASK

    def plug(self, socket: Socket) -> None:
        """See `PciDevice.plug`."""
        self._slot = socket
        super().plug(socket)

    def _settle(self) -> None:
        """Ports follow PMBASE, too."""
        super()._settle()
        self._follow()

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See `PciDevice.config_write`."""
        super().config_write(offset, size, value)
        if PMBASE.touched(offset, size) or PMREGMISC.touched(offset, size):
            self._follow()

    def _follow(self) -> None:
        if self._slot is None:
            return
        present = self._window.base if self._window else 0
        if present == self.base:
            return
        if self._window is not None:
            self._slot.ports.remove(self._window)
            self._window = None
        if self.base:
            self._window = Window(self.base, pm.LENGTH, self._power, self._slot.rank)
            self._slot.ports.add(self._window)


def detach_power(ports: PortBus) -> None:
    """Free the ports that the power management registers have on a board without PIIX."""
    ports.unregister(pm.BASE, pm.LENGTH)
