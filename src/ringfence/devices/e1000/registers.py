"""Registers of the 82540EM by the manual's names (chapter 13): offsets, fields, what is writable.

A class per register, with its fields as masks (``EN``) or, where a field is a number, as a shift
(``..._SHIFT``) beside the mask. Plain integers, as they are used for every frame. What a register
*does* is in the part of the chip that it belongs to.
"""

from __future__ import annotations

ALL = 0xFFFF_FFFF


class CTRL:
    """Device control (13.4.1)."""

    OFFSET = 0x0000
    DUPLICATE = 0x0004
    FD = 1 << 0
    SLU = 1 << 6
    SPEED_1000 = 2 << 8
    RST = 1 << 26
    VME = 1 << 30
    PHY_RST = 1 << 31
    DEFAULT = FD | SLU | SPEED_1000


class STATUS:
    """Device status (13.4.2)."""

    OFFSET = 0x0008
    FD = 1 << 0
    LU = 1 << 1
    SPEED_1000 = 2 << 6
    ASDV_1000 = 2 << 8


class EECD:
    """EEPROM control, data, presence (13.4.3)."""

    OFFSET = 0x0010
    SK = 1 << 0
    CS = 1 << 1
    DI = 1 << 2
    DO = 1 << 3
    FWE_DISABLED = 1 << 4
    REQ = 1 << 6
    GNT = 1 << 7
    PRES = 1 << 8


class EERD:
    """EEPROM read (13.4.4)."""

    OFFSET = 0x0014
    START = 1 << 0
    DONE = 1 << 4
    ADDR_SHIFT = 8
    DATA_SHIFT = 16


class MDIC:
    """MDI control (13.4.7)."""

    OFFSET = 0x0020
    DATA = 0xFFFF
    REGADD_SHIFT = 16
    PHYADD_SHIFT = 21
    OP_SHIFT = 26
    OP_WRITE, OP_READ = 1, 2
    R = 1 << 28
    I = 1 << 29  # noqa: E741 - the manual's name
    E = 1 << 30


class ICR:
    """Interrupt causes (13.4.17); ICS, IMS and IMC have the same bits (13.4.19 to 13.4.21)."""

    OFFSET = 0x00C0
    ICS = 0x00C8
    IMS = 0x00D0
    IMC = 0x00D8
    TXDW = 1 << 0
    TXQE = 1 << 1
    LSC = 1 << 2
    RXDMT0 = 1 << 4
    RXO = 1 << 6
    RXT0 = 1 << 7
    MDAC = 1 << 9
    IMPLEMENTED = 0x0001_FFFF


class ITR:
    """Interrupt throttling (13.4.18): the least time between two interrupts, in 256 ns."""

    OFFSET = 0x00C4
    INTERVAL = 0xFFFF
    UNIT_NS = 256


class RCTL:
    """Receive control (13.4.22)."""

    OFFSET = 0x0100
    EN = 1 << 1
    UPE = 1 << 3
    MPE = 1 << 4
    LPE = 1 << 5
    LBM = 3 << 6
    RDMTS_SHIFT = 8
    MO_SHIFT = 12
    BAM = 1 << 15
    BSIZE_SHIFT = 16
    VFE = 1 << 18
    CFIEN = 1 << 19
    CFI = 1 << 20
    BSEX = 1 << 25
    SECRC = 1 << 26
    WRITABLE = 0x07FF_F3FE


class TCTL:
    """Transmit control (13.4.33)."""

    OFFSET = 0x0400
    EN = 1 << 1
    PSP = 1 << 3
    WRITABLE = 0x03FF_FFFA


class RXCSUM:
    """Receive checksum control (13.4.32)."""

    OFFSET = 0x5000
    PCSS = 0xFF
    IPOFL = 1 << 8
    TUOFL = 1 << 9
    WRITABLE = 0x0000_03FF


class Ring:
    """Registers of a descriptor ring, from the ring's own base (13.4.25 to .29, .35 to .39)."""

    RECEIVE, TRANSMIT = 0x2800, 0x3800
    BAL, BAH, LEN, HEAD, TAIL = 0x00, 0x04, 0x08, 0x10, 0x18
    BAL_WRITABLE = 0xFFFF_FFF0
    LEN_WRITABLE = 0x000F_FF80
    INDEX = 0xFFFF


class Delay:
    """Interrupt delay timers (13.4.30, .31, .44, .45), in 1.024 microseconds."""

    RDTR, RADV = 0x2820, 0x282C
    TIDV, TADV = 0x3820, 0x382C
    FPD = 1 << 31
    VALUE = 0xFFFF
    UNIT_NS = 1024


class TxDescriptor:
    """Transmit descriptors (3.3.3, 3.3.6, 3.3.7): the words behind the buffer's address."""

    SIZE = 16
    LENGTH_LEGACY = 0xFFFF
    LENGTH = 0xF_FFFF
    CSO_SHIFT = 16
    DTYP_SHIFT = 20
    DTYP_CONTEXT, DTYP_DATA = 0, 1
    EOP = 1 << 24
    IC = 1 << 26
    TSE = 1 << 26
    RS = 1 << 27
    RPS = 1 << 28
    DEXT = 1 << 29
    VLE = 1 << 30
    IDE = 1 << 31
    DD = 1 << 0
    CSS_SHIFT = 8
    POPTS_SHIFT = 8
    IXSM = 1 << 0
    TXSM = 1 << 1
    SPECIAL_SHIFT = 16
    TUCMD_TCP = 1 << 24
    TUCMD_IP = 1 << 25
    HDRLEN_SHIFT = 8
    MSS_SHIFT = 16


class RxDescriptor:
    """Receive descriptors (3.2.3): status and error bits."""

    SIZE = 16
    DD = 1 << 0
    EOP = 1 << 1
    IXSM = 1 << 2
    VP = 1 << 3
    TCPCS = 1 << 5
    IPCS = 1 << 6
    PIF = 1 << 7
    TCPE = 1 << 5
    IPE = 1 << 6


class RAH:
    """The upper half of a receive address (13.5.3)."""

    AV = 1 << 31
    AS = 3 << 16
    WRITABLE = 0x8003_FFFF


FCAL, FCAH, FCT = 0x0028, 0x002C, 0x0030
VET = 0x0038
CTRL_EXT = 0x0018
FCTTV, TXCW = 0x0170, 0x0178
TIPG, AIT, LEDCTL, PBA = 0x0410, 0x0458, 0x0E00, 0x1000
FCRTL, FCRTH = 0x2160, 0x2168
RXDCTL, TXDCTL, TXDMAC, TSPMT = 0x2828, 0x3828, 0x3000, 0x3830
STATISTICS, STATISTICS_END = 0x4000, 0x4100
MTA, RA, VFTA = 0x5200, 0x5400, 0x5600
MTA_WORDS, RA_WORDS, VFTA_WORDS = 128, 32, 128
WUC, WUFC, WUS, MANC, IPAV = 0x5800, 0x5808, 0x5810, 0x5820, 0x5838
SWSM = 0x5B50
"""Software semaphore of the chip's successors; some drivers (U-Boot's) take it on this one, too."""

PLAIN = {
    CTRL_EXT: (0, 0x07FF_FFFF),
    FCAL: (0x00C2_8001, ALL),
    FCAH: (0x0100, 0xFFFF),
    FCT: (0x8808, 0xFFFF),
    VET: (0x8100, 0xFFFF),
    FCTTV: (0, 0xFFFF),
    TXCW: (0, 0xC000_FFFF),
    TIPG: (0x0060_200A, 0x3FFF_FFFF),
    AIT: (0, 0xFFFF),
    LEDCTL: (0x0706_8302, 0x8F8F_8F8F),
    PBA: (0x0010_0030, 0x0000_FFFF),
    FCRTL: (0, 0x8000_FFF8),
    FCRTH: (0, 0x8000_FFF8),
    RXDCTL: (0x0101_0000, 0x0F3F_3F3F),
    TXDCTL: (0, 0xFF3F_3F3F),
    TXDMAC: (0, 1),
    TSPMT: (0x0400_0100, ALL),
    WUC: (0, 0x0F),
    WUFC: (0, 0x000F_00FF),
    MANC: (0, ALL),
    IPAV: (0, 0x0001_000F),
    SWSM: (0, 0x3),
}
"""Registers that only keep what is written: offset to (value after reset, writable bits)."""
