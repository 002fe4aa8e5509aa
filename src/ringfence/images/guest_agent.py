"""The agent as files of an image: a program, and what starts it in either kind of system.

It is started where the machine has a vsock device, and costs nothing elsewhere.
"""

from __future__ import annotations

from ringfence.agent.program import agent_code
from ringfence.images.builtin import elf_program

PROGRAM = "usr/sbin/ringfence-agent"
BASE = 0x40_0000
"""Where the program is in memory; any page would do."""

SCRIPT = f"""\
# Serve 'ringfence exec' and 'ringfence stop', where there is a way in for them.
if [ -e /sys/module/vmw_vsock_virtio_transport ]; then
    /{PROGRAM} &
    modprobe -q button && modprobe -q evdev && acpid -f > /dev/null 2>&1 &
fi
"""
"""For the init script of our initramfs."""

POWER_BUTTON = """\
#!/bin/sh
poweroff -f
"""
"""What busybox's acpid runs when the power button is pressed."""

UNIT = f"""\
[Unit]
Description=Commands from the host (ringfence exec)

[Service]
ExecStart=/{PROGRAM}
Restart=always
RestartSec=1
"""
"""For systemd."""

RULE = """\
SUBSYSTEM=="misc", KERNEL=="vsock", TAG+="systemd", ENV{SYSTEMD_WANTS}="ringfence-agent.service"
"""
"""For udev: start it as soon as there are sockets to the host."""


def agent_program() -> bytes:
    """The agent as a static ELF executable."""
    code, entry = agent_code()
    return elf_program(code, BASE, entry)


def initramfs_files() -> dict[str, bytes]:
    """What an initramfs of ours needs, by path."""
    return {
        f"/{PROGRAM}": agent_program(),
        "/etc/ringfence/30-agent.sh": SCRIPT.encode(),
        "/etc/acpi/PWRF/00000080": POWER_BUTTON.encode(),
    }


def disk_files() -> dict[str, bytes]:
    """What a system with systemd needs, by path."""
    return {
        PROGRAM: agent_program(),
        "etc/systemd/system/ringfence-agent.service": UNIT.encode(),
        "etc/udev/rules.d/60-ringfence.rules": RULE.encode(),
    }
