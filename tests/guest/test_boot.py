"""Debian's kernels, unmodified, from the first instruction to power-off."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, BOOT, MakeInitrd, Session, boot_arguments
from ringfence import Machine
from ringfence.engine import StopReason
from ringfence.images.root import build_initramfs
from ringfence.images.store import Image

pytestmark = pytest.mark.boot
SEQUENCE_SUM = hashlib.sha256("".join(f"{n}\n" for n in range(1, 2001)).encode()).hexdigest()


@pytest.mark.parametrize("flavour", ["cloud", "generic", "i386"])
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


def test_a_32_bit_program_in_a_64_bit_system(cloud: Image, i386: Image, cache: Path) -> None:
    """busybox for i386 under Debian's amd64 kernel: system calls, signals, faults, threads' TLS."""
    script = (
        "#!/bin/sh\n/bin/busybox32 sh -c 'echo $((6*7)); kill -TERM $$' || echo status $?\n"
        "/bin/busybox32 seq 1 2000 | /bin/busybox32 sha256sum\n"
        '/bin/busybox32 sh -c \'trap "echo caught" USR1; kill -USR1 $$; i=0;'
        " while [ $i -lt 2000 ]; do i=$((i+1)); done; echo $i'\n"
        "/bin/busybox32 poweroff -f\n"
    )
    initrd = build_initramfs(
        cloud.folder / "busybox", {"/bin/busybox32": i386.folder / "busybox"}, init=script
    )
    with Machine(
        kernel=cloud.kernel, initrd=initrd, append=APPEND + " quiet", engine="translate",
        cache_dir=cache,
    ) as machine:  # fmt: skip
        machine.start()
        assert machine.wait(BOOT) is StopReason.POWER_OFF
        said = machine.console.output.split()
    assert said[said.index("42") + 1 :][:6] == [
        "Terminated", "status", "143", SEQUENCE_SUM, "-", "caught",
    ]  # fmt: skip
    assert "2000" in said
