"""Devices measured against each other: network cards and disks, beside QEMU's of the same kind.

=============== ===============================================================================
`__main__`      the command line
`root`          the guest's programs: iperf3, fio, ping, and the libraries that they need
`guests`        one guest per side, card and switch, started once
`measures`      what is measured in each of them, and how its figures are read
`minimal`       packets by hypercall: what is left when there is no device at all
`results`       all figures; tables
`picture`       the same as a picture
=============== ===============================================================================
"""
