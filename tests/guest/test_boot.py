"""Debian's kernels, unmodified, from the first instruction to power-off."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, BOOT, MakeInitrd, Session, boot_arguments
from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.images.store import Image

pytestmark = pytest.mark.boot


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_command_line_boots_to_a_shell(
    flavour: str, cache: Path, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(flavour)
    assert image.initrd is not None
    session = Session(*boot_arguments(image.kernel, image.initrd, cache))
    try:
        session.wait_for(b"~ # ", BOOT)
        session.type(b"echo $((6*7)) $(uname -r)\n")
        session.wait_for(f"\n42 {image.kernel_version}\r\n".encode(), 20)
        session.type(b"poweroff -f\n")
        ended = session.end(30)
    finally:
        session.close()
    assert ended.status == 0, ended.errors
    assert ended.errors == ""
    assert "reboot: Power down" in ended.text


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_library_boots_to_a_shell(
    flavour: str, cache: Path, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(flavour)
    with Machine(
        kernel=image.kernel, initrd=image.initrd, append=APPEND, engine="translate", cache_dir=cache
    ) as machine:
        machine.start()
        machine.console.wait_for("~ # ", BOOT)
        machine.console.send("echo $((6*7))\n")
        machine.console.wait_for("\n42\r\n", 20)
        machine.console.send("poweroff -f\n")
        assert machine.wait(30) is StopReason.POWER_OFF
        stats = machine.stats()
    assert stats["exits"]["port_out"]["count"] > 1000
    assert stats["interrupts"]
    assert stats["tlb"]["misses"] > 0
    assert all(spent >= 0 for spent in stats["time"].values())
    covered = sum(stats["time"].values()) / 1e9
    assert covered == pytest.approx(stats["machine"]["seconds"], rel=0.2)


INIT = """\
#!/bin/busybox sh
mount -t proc proc /proc
echo 1 > /proc/sys/kernel/printk
echo "--- begin"
echo "command line: $(cat /proc/cmdline)"
i=0
while [ $i -lt 200 ]; do
    echo "line $i: $((i * i)) äöü\t."
    i=$((i + 1))
done
printf 'no line end'
echo
echo "--- end"
poweroff -f
"""
EXPECTED = "".join(
    [
        "--- begin\n",
        f"command line: {APPEND}\n",
        *(f"line {i}: {i * i} äöü\t.\n" for i in range(200)),
        "no line end\n",
        "--- end\n",
    ]
)


def test_init_script_prints_exactly_that_and_powers_off(
    cloud: Image, with_init: MakeInitrd, cache: Path
) -> None:
    initrd = with_init(INIT)
    for turn in range(20 if support.LONG else 2):
        ended = support.run(*boot_arguments(cloud.kernel, initrd, cache))
        assert ended.status == 0, (turn, ended.errors, ended.text[-500:])
        assert ended.errors == ""
        _, begin, rest = ended.text.partition("--- begin\n")
        said, end, after = rest.partition("--- end\n")
        assert begin + said + end == EXPECTED, turn
        assert after.count("\n") <= 1, f"something behind the end: {after!r}"


def test_panic_resets_with_status_7(cloud: Image, with_init: MakeInitrd, cache: Path) -> None:
    initrd = with_init("#!/bin/busybox sh\nexit 3\n")
    ended = support.run(*boot_arguments(cloud.kernel, initrd, cache))
    assert "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300" in ended.text
    assert ended.status == 7, ended.errors
    assert len(ended.errors.splitlines()) == 1
    assert "reset" in ended.errors
