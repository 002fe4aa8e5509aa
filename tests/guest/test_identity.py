"""Guests that go on from one snapshot, and are to be different ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

RANDOM = "head -c 16 /dev/urandom | xxd -p"
RESEEDED = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true"


@pytest.fixture(scope="module")
def saved(generic: Image, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A snapshot of a kernel that knows of generation IDs."""
    folder = tmp_path_factory.mktemp("identity") / "saved"
    with Machine(
        kernel=generic.kernel,
        initrd=generic.initrd,
        append=APPEND,
        engine="translate",
        cache_dir=cache,
        memory="256M",
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        machine.snapshot(folder)
        assert shell.run(RESEEDED) == "0\n"
    yield folder


def test_random_numbers_differ(saved: Path, cache: Path) -> None:
    numbers = set()
    for _ in range(2):
        with Machine.restore(saved, engine="translate", cache_dir=cache) as machine:
            machine.start()
            shell = Shell(machine)
            # The interrupt comes before the first command; the kernel handles it in a work item.
            shell.run(f"until {RESEEDED.split(' ||')[0]} > /dev/null; do sleep 0.02; done")
            numbers.add(shell.run(RANDOM))
            assert shell.run(RESEEDED) == "1\n"
    assert len(numbers) == 2
