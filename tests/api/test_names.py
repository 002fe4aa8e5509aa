"""Names of machines: unique among the living, free again once their process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.api import names
from ringfence.errors import HostError, UsageError

SOURCE = Path(__file__).parents[2] / "src"
HOLDER = """
import sys
from ringfence import sockets
from ringfence.api import names
claim = names.claim("held")
listener = sockets.listen(claim.place.control, 1)
print("held", flush=True)
sys.stdin.read()
"""


def holder() -> subprocess.Popen[str]:
    """Another process that holds the name "held"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_names_are_unique_and_free_again() -> None:
    first = names.claim("web")
    with pytest.raises(UsageError, match="runs already"):
        names.claim("web")
    second = names.claim_free("web")
    third = names.claim_free("web")
    assert [each.place.name for each in (second, third)] == ["web-2", "web-3"]
    assert [place.name for place in names.running()] == ["web", "web-2", "web-3"]
    assert first.place.pid == os.getpid()
    third.place.log.write_text("last words")
    for each in (first, second, third):
        each.release()
        each.release()
    assert names.running() == []
    assert sorted(path.name for path in names.runtime_folder().iterdir()) == [
        ".changes",
        "web-3.log",
    ]
    names.claim("web").release()


def test_a_killed_process_frees_its_name() -> None:
    process = holder()
    with process:
        assert [place.pid for place in names.running()] == [process.pid]
        with pytest.raises(UsageError, match=str(process.pid)):
            names.claim("held")
        process.send_signal(signal.SIGKILL)
    again = names.claim("held")
    assert [path.name for path in again.place.folder.iterdir()] == ["lock"]
    again.release()
    with holder() as process:
        process.kill()
    assert names.running() == []
    assert not names.place_of("held").folder.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 65, "a b", "ä", ".changes"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="machine's name"):
        names.place_of(name)


def test_the_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGFENCE_HOME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "ringfence"
    folder.mkdir(mode=0o755)
    claim = names.claim("a")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert claim.place.folder.stat().st_mode & 0o777 == 0o700
    claim.release()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "not/absolute")
    assert names.runtime_folder() == Path(f"/tmp/ringfence-{os.getuid()}")


def test_a_folder_of_somebody_elses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_HOME", str(tmp_path))
    (tmp_path / "run").symlink_to("/tmp")
    with pytest.raises(HostError, match="not a folder of yours"):
        names.claim("a")
    monkeypatch.setenv("RINGFENCE_HOME", "/proc/nowhere")
    with pytest.raises(HostError, match="can't be made"):
        names.claim("a")
