"""A card with a driver."""

from __future__ import annotations

import pytest

from devices.e1000.driver import Driver


@pytest.fixture
def driver() -> Driver:
    """Both rings set up."""
    return Driver().start()
