"""Descriptors that hypothesis makes up; hostile drivers by seed are in ``fuzzing``."""

from __future__ import annotations

import os
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from devices.e1000.driver import ENTRIES, RX_RING, TX_RING, Driver, frame_of
from devices.e1000.fuzz import ADDRESSES
from fuzzing.harness import EDGES
from ringfence.devices.e1000.registers import Ring

LONG = os.environ.get("RINGFENCE_TEST_LONG") == "1"


words = st.one_of(
    st.sampled_from(EDGES),
    st.integers(0, 31).map(lambda at: 1 << at),
    st.integers(0, 2**32 - 1),
)
addresses = st.one_of(
    st.sampled_from(ADDRESSES), st.integers(0x100000, 0x110000), st.integers(0, 2**64 - 1)
)
descriptors = st.lists(st.tuples(addresses, words, words), min_size=1, max_size=ENTRIES - 1)


@given(descriptors)
@settings(max_examples=2000 if LONG else 100, deadline=None)
def test_any_transmit_descriptors(made) -> None:
    driver = Driver().start()
    for at, (address, lower, upper) in enumerate(made):
        driver.memory.write(TX_RING + 16 * at, struct.pack("<QII", address, lower, upper))
    driver.write(Ring.TRANSMIT + Ring.TAIL, len(made))
    driver.clock.advance(10_000_000_000)
    ring = driver.card.transmitter.ring
    assert ring.failed or ring.head == len(made)
    assert driver.queue.next_deadline() is None
    assert all(14 <= len(frame) <= 16288 + 4 for frame in driver.wire.frames)


@given(descriptors, st.lists(st.integers(0, 20000), max_size=20), words)
@settings(max_examples=2000 if LONG else 100, deadline=None)
def test_any_receive_descriptors(made, lengths, rctl) -> None:
    driver = Driver().start(rctl=rctl)
    for at, (address, lower, upper) in enumerate(made):
        driver.memory.write(RX_RING + 16 * at, struct.pack("<QII", address, lower, upper))
    for length in lengths:
        driver.card.receive([frame_of(length)])
