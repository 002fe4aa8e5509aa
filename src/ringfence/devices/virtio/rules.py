"""Numbers that both ring layouts go by (2.7, 2.8), in Python and in native code."""

from __future__ import annotations

# Descriptor flags (2.7.5, 2.8.1)
NEXT, WRITE, INDIRECT = 1 << 0, 1 << 1, 1 << 2

# Feature bits that concern rings (6)
INDIRECT_DESC, EVENT_IDX, RING_PACKED = 1 << 28, 1 << 29, 1 << 34

MAX_CHAIN = 1024
"""Buffers in a chain; as many as one readv takes."""
MAX_QUEUE = 1 << 15
"""Largest queue."""
DESCRIPTOR_SIZE = 16
