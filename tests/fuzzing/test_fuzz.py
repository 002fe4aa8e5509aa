"""Hostile drivers of each device, a few thousand inputs each; all there are with more patience."""

from __future__ import annotations

import os

import pytest

from fuzzing.harness import INPUTS, fuzz
from fuzzing.targets import TARGETS

LONG = os.environ.get("RINGFENCE_TEST_LONG") == "1"


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_drivers(name: str) -> None:
    runs = 2500 if LONG else 5
    assert fuzz(TARGETS[name], 1, runs) == runs * INPUTS
