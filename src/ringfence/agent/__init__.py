"""What runs inside a guest for its owner, and how he talks to it: ``exec`` and ``cp``.

The agent (`guest`) is a static program of a few kilobytes that listens on a vsock port. It is
written in the native dialect, so it is Python source like all else; `program` makes an ELF file of
it, which images carry. `wire` says what goes over a connection, `client` is the host's end.
"""
