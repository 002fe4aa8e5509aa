"""One guest and one oracle serve all tests here: making them costs more than thousands of cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.harness import Guest
from engine.native import Oracle


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """The machine under test."""
    made = Guest()
    yield made
    made.close()


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    """The host's CPU."""
    made = Oracle()
    yield made
    made.close()
