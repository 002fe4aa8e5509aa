"""The switches of virtio devices as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.errors import UsageError
from ringfence.network.config import parse_nic
from ringfence.pacing import Pacing
from ringfence.storage.options import parse_disk


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("virtio", Pacing()),
        ("virtio,event-idx=off", Pacing(event_idx=False)),
        ("virtio,event-idx=off,event-idx=on", Pacing()),
        ("virtio,coalesce=16:50", Pacing(packets=16, microseconds=50)),
        ("virtio,gather=off", Pacing(gather=0)),
        ("virtio,gather=50", Pacing(gather=50)),
        ("virtio,poll=200,coalesce=1024:100000", Pacing(True, 1024, 100_000, 200)),
    ],
)
def test_switches(text: str, expected: Pacing) -> None:
    assert parse_nic(text) == ("virtio", expected)
    options = text.removeprefix("virtio")
    assert parse_disk(f"a.img,readonly{options}").pacing == expected


@pytest.mark.parametrize(
    "text",
    [
        *("ne2000", "virtio,", "virtio,fast", "virtio,event-idx=maybe", "virtio,event-idx"),
        *("virtio,gather=0", "virtio,gather=on", "virtio,gather"),
        *("virtio,coalesce", "virtio,coalesce=16", "virtio,coalesce=0:5", "virtio,coalesce=5:0"),
        *("virtio,coalesce=2000:5", "virtio,poll=1", "virtio,poll=1000000", "virtio,poll=²00"),
        *("virtio,poll=-20", "virtio,poll=99999999999999999999", "e1000,poll=200"),
    ],
)
def test_no_switches(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_nic(text)


def test_disks_refuse_them_too() -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_disk("a.img,poll=1")
    assert parse_disk(Path("a,poll=1")).pacing == Pacing()
