"""What is soldered to the board: interrupt controllers, timers, RTC, serial port, PCI, ACPI.

`ringfence.chipset.board.Board` composes the parts; each part is one file named after its chip.
"""
