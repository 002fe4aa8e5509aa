"""Arguments, and how errors become one line and a status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import ringfence
from ringfence.cli import app
from ringfence.cli.doctor import NEEDED_FEATURES, OFFERED_FEATURES, examine
from ringfence.engine.kvm import verdict
from ringfence.engine.kvm.verdict import Kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "No such option"),
        (["frob"], "No such command"),
        (["run", "--memory", "x"], "not a size"),
        (["run", "--memory", "900T"], "out of range"),
        (["run", "--memory", "512"], "a number without a unit is bytes"),
        (["run", "--memory", "-1G"], "not a size"),
        (["run", "--cpus", "two"], "--cpus"),
        (["run", "--cpus", "99"], "expected 1 to 32"),
        (["run", "--cpus", "-5"], "expected 1"),
        (["run", "--engine", "trap"], "not available yet"),
        (["run", "--engine", "warp"], "unknown engine"),
        (["run", "--timeout", "0"], "above 0"),
        (["run", "--timeout", "nan"], "above 0"),
        (["run", "--timeout", "soon"], "--timeout"),
        (["run", "--trace", "dreams"], "--trace"),
        (["run", "--disk", "a,format=vdi"], "format=raw|qcow2"),
        (["run", "--disk", ",readonly"], "names no file"),
        (["run", "--on-reset", "explode"], "--on-reset"),
        (["run", "--net", "pigeon"], "expected none, user"),
        (["run", "--nic", "ne2000"], "network card"),
        (["run", "--forward", "8080:80"], "--net user"),
        (["run", "--net", "user", "--forward", "80"], "forward"),
        (["run", "--capture", "f.pcap"], "capture"),
        (["run", "--stats", "/nonexistent/folder/stats.json"], "--stats"),
        (["run", "debian", "--kernel", "bzImage"], "both an image and --kernel"),
        (["run", "../../etc"], "image"),
        (["run", "nosuchimage"], "image"),
        (["pull", "debian", "--flavour", "salty"], "--flavour"),
        (["pull", "debian", "--include", "curl"], "need --disk"),
        (["pull", "debian", "--disk", "--size", "10M"], "too small"),
        (["pull", "debian", "--disk", "--size", "big"], "not a size"),
        (["pull", "debian", "--disk", "--ssh-key", "/nonexistent"], "can't be read"),
        (["exec", "nobody", "--", "true"], "no machine named"),
        (["exec", "nobody", "--"], "no command"),
        (["cp", "a", "b"], "NAME:PATH"),
        (["cp", "nobody:", "b"], "names no path"),
        (["stop", "../x"], "machine's name"),
        (["cache", "info", "--cache-dir", "/dev/null"], "not a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("ringfence: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""


def test_help_documents_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as ended:
            app.main(arguments)
        assert ended.value.code == 0
        out = capsys.readouterr().out
        for status in (0, 2, 3, 4, 5, 6, 7, 70):
            assert f" {status} " in out


def commands() -> list[list[str]]:
    """All there are, groups included, as words."""
    found: list[list[str]] = [[]]
    for words in found:
        here = typer.main.get_command(app.app)
        for word in words:
            here = here.commands[word]
        found += [[*words, name] for name in getattr(here, "commands", {})]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_has_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main([*words, "--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert "Example" in out
    assert " ".join(["ringfence", *words]) in out.partition("Example")[2]
    assert err == ""


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ("ringfence st", ["stop"]),
        ("ringfence run --pause", ["--pause-clock"]),
        ("ringfence run --on-reset re", ["reboot"]),
        ("ringfence run bu", ["builtin"]),
        ("ringfence stop ", []),
        ("ringfence device l", ["list"]),
    ],
)
def test_completion(typed: str, answers: list[str]) -> None:
    """As bash asks for it."""
    words = typed.split(" ")
    asked = {
        "_RINGFENCE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ringfence.cli"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == answers


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ringfence {ringfence.__version__}\n"


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["images", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["builtin"]
    with pytest.raises(SystemExit):
        app.main(["images"])
    assert capsys.readouterr().out.startswith("builtin: built in")


def test_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.o").write_bytes(bytes(1 << 20))
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "link.o").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(SystemExit):
        app.main(["cache", "info", "--json", "--cache-dir", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path),
        "files": 1,
        "bytes": 1 << 20,
    }
    with pytest.raises(SystemExit) as ended:
        app.main(["cache", "clear", "--cache-dir", str(tmp_path)])
    assert ended.value.code == 0
    assert "1 files removed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["link.o", "precious.txt"]
    with pytest.raises(SystemExit) as ended:
        app.main(["cache", "info", "--cache-dir", str(tmp_path / "nowhere")])
    assert ended.value.code == 0


CPUINFO = """\
processor\t: 0
model name\t: Some CPU
flags\t\t: {flags}

processor\t: 1
flags\t\t: nothing
"""
ALL = " ".join(NEEDED_FEATURES + OFFERED_FEATURES)


@pytest.mark.parametrize(
    ("flags", "name", "ok", "detail"),
    [
        (ALL, "features needed", True, "all there"),
        ("cx16 nx", "features needed", False, "lacks fxsr lahf_lm sse2"),
        (ALL, "features offered", True, "avx2"),
        (ALL, "memfd", True, "works"),
        (ALL, "W^X dual mapping", True, "works"),
        (ALL, "cache folder", True, "writable"),
    ],
)
def test_doctor(tmp_path: Path, flags: str, name: str, ok: bool, detail: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(flags=flags))
    check = {each.name: each for each in examine(cpuinfo)}[name]
    assert check.ok is ok
    assert detail in check.detail


@pytest.mark.parametrize(
    ("kind", "ok", "engine"),
    [
        (Kind.HARDWARE, True, "kvm"),
        (Kind.SOFTWARE, False, "translate"),
        (Kind.NONE, False, "translate"),
    ],
)
def test_doctor_says_what_auto_takes(
    kind: Kind, ok: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "DEVICE", Path("/dev/null"))
    monkeypatch.setattr(verdict, "verdict", lambda: verdict.Verdict(kind, "found this"))
    checks = {each.name: each for each in examine()}
    assert (checks["KVM"].ok, checks["KVM"].detail) == (ok, "found this")
    assert checks["engine"].detail.startswith(f"auto takes '{engine}'")
    assert not checks["KVM"].needed


@pytest.mark.parametrize("reason", ["", "ptrace is not permitted"])
def test_doctor_says_why_all_is_translated(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.engine.direct.host.obstacle", lambda: reason)
    check = {each.name: each for each in examine()}["direct execution"]
    assert (check.ok, check.needed) == (not reason, False)
    assert (reason or "works") in check.detail


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)
    failed = [row for row in rows if row["needed"] and not row["ok"]]
    assert ended.value.code == (6 if failed else 0)
    assert {"KVM", "engine", "apt", "memory", "limits"} <= {row["name"] for row in rows}


def test_doctor_says_what_user_networking_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringfence.network import slirp

    monkeypatch.setattr(slirp, "SONAME", "libnosuchthing.so.0")
    slirp.library.cache_clear()
    try:
        check = {each.name: each for each in examine()}["network (user)"]
        assert (check.ok, check.needed) == (False, False)
        assert "install libslirp0" in check.detail
    finally:
        slirp.library.cache_clear()


def test_what_is_fetched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringfence.cli import pull

    fetched: list[str] = []
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(pull, "pull", fetched.append)
    assert pull.ensure_image(None) == "debian"
    assert pull.ensure_image(None, flavour=pull.FLAVOUR_WITH_9P) == "debian-generic"
    assert pull.ensure_image("debian-i386") == "debian-i386"
    assert pull.ensure_image("mine") == "mine"
    assert fetched == ["cloud", "generic", "i386"]


def test_without_apt_the_builtin_guest_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ringfence.cli.pull import ensure_image

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ensure_image(None) == "builtin"
    assert "no apt" in capsys.readouterr().err
    assert ensure_image(None, flavour="generic") == "builtin"
    assert ensure_image("debian") == "debian"
    assert ensure_image("builtin") == "builtin"
