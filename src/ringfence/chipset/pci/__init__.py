"""PCI: how devices are found, placed and heard.

`config` is a function's configuration header, `msi` its message-signalled interrupts, `device` the
base of every PCI device, `host` the host bridge with both ways to reach configuration space.
Section numbers are those of the PCI Local Bus Specification, revision 3.0.
"""
