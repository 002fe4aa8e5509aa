"""What is on the host's side of a shared folder?

A guest that is given a folder of the host's speaks 9P2000.L with it, file by file: the protocol is
that of Linux's client (Documentation/filesystems/9p.rst) and is described in diod's protocol.md,
the parts that it has from 9P2000 in section 5 of the Plan 9 manual. The device in front of it is
`devices.virtio.ninep`.

``messages`` reads and writes what is said, ``tree`` reaches files beneath the folder and nowhere
else, ``files`` is the guest's handles of them, ``attributes`` what is told of them, ``session``
what each message does.
"""

from __future__ import annotations
