"""A machine that is detached needs nobody, not even who started it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from guest.support import environment

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from ringfence.cli.detach import daemonize

log, killed = Path(sys.argv[1]), os.pipe()
starter = os.fork()
if starter == 0:
    ready = daemonize(log)
    os.close(killed[1])
    os.read(killed[0], 1)  # ends when the others have gone
    ready()
    log.write_text("lives on")
    os._exit(0)
while not log.exists():
    time.sleep(0.01)
os.kill(starter, signal.SIGKILL)
os.waitpid(starter, 0)
"""


def test_who_waits_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # The daemon has our stdout, too, until it is detached: not to be waited for.
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(log)], env=environment(), check=True, timeout=60
    )
    while log.read_text() != "lives on":
        time.sleep(0.01)
