"""Paravirtual devices: virtio 1.2 over PCI, modern interface only.

`ring` says what a ring is, `split` and `packed` are its two layouts in native code (on `queue`,
behind `layouts`), `pci` is the transport, `device` the base of the device types, which are one file
each. Section numbers in this folder are
those of the OASIS Virtual I/O Device specification, version 1.2.
"""
