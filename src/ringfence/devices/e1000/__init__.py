"""The Intel 82540EM gigabit network card, which most guests have a driver for.

References are to the *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual*
(Intel, 8254x). A file is a part of the chip: `registers` (names and bits), `eeprom`, `phy`,
`interrupts`, `statistics`, `filters`, `offload` (checksums and segmentation, as functions of
bytes), `transmit` and `receive` (the descriptor rings), and `card`, which is the PCI function
around them.
"""
