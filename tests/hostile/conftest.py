"""One tiny machine for all tests here, emptied before each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostile.support import HostileGuest


@pytest.fixture(scope="session")
def shared() -> Iterator[HostileGuest]:
    """The machine under attack."""
    made = HostileGuest()
    yield made
    made.close()


@pytest.fixture
def guest(shared: HostileGuest) -> HostileGuest:
    """The same, without translations and with all of its page tables' entries as they were."""
    shared.reset()
    return shared
