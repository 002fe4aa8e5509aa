"""Folders of the host's in a guest: Linux's 9p on real folders, and across a snapshot."""

from __future__ import annotations

import hashlib
import random
import stat
from pathlib import Path

import pytest

from guest import support
from guest.support import APPEND, Shell
from ringfence import Machine
from ringfence.images.root import GuestRoot
from ringfence.images.store import Image

pytestmark = pytest.mark.boot

MANY = 10_000


def digest(folder: Path) -> str:
    """Of all files below a folder, by name and contents."""
    found = hashlib.md5()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        if path.is_symlink():
            found.update(str(path.readlink()).encode())
        elif path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders and files of many sizes, and a link out of them."""
    source = random.Random(5)
    folder = tmp_path / "host" / "tree"
    for number in range(8):
        inner = folder / f"folder{number % 3}" / f"inner{number}"
        inner.mkdir(parents=True)
        for size in (0, 1, 4095, 70_000):
            (inner / f"file {size}").write_bytes(source.randbytes(size))
    (folder / "link").symlink_to("folder0/inner0")
    (folder / "out").symlink_to("/etc/hostname")
    return folder


def test_folders(generic: Image, cache: Path, tree: Path, tmp_path: Path) -> None:
    """Trees copied both ways, names and files put to use, a folder that may not be written."""
    host = tree.parent
    (host / "many").mkdir()
    for number in range(MANY):
        (host / "many" / f"{number:05}").touch()
    program = support.compile_c(support.PROGRAMS / "files.c", tmp_path / "files")
    root = GuestRoot()
    root.add_file("usr/bin/files", program.read_bytes(), 0o755)
    assert generic.initrd is not None
    initrd = tmp_path / "initrd"
    initrd.write_bytes(generic.initrd.read_bytes() + root.pack())
    with Machine(
        kernel=generic.kernel,
        initrd=initrd,
        append=APPEND,
        cache_dir=cache,
        shares=[host, f"{tree},tag=fixed,ro"],
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        said = shell.run("mount -t 9p")
        assert "host on /mnt/host type 9p (rw" in said

        shell.run("cp -a /mnt/host/tree /tmp/copy && cp -a /tmp/copy /mnt/host/back")
        assert digest(host / "back") == digest(tree)
        assert (host / "back" / "out").is_symlink()
        names = " ".join(f"{number:05}" for number in range(MANY))
        said = shell.run("cd /mnt/host/many; echo * | md5sum")  # a shell looks at names alone
        assert said.split()[0] == hashlib.md5(f"{names}\n".encode()).hexdigest()
        assert shell.run("ls -ln /mnt/host/back | grep link").split()[2:4] == ["0", "0"]

        shell.run("cd /mnt/host; mv back/folder0 moved && mv moved/inner0 back/ && rm -r moved")
        assert (host / "back" / "inner0" / "file 4095").stat().st_size == 4095
        assert not (host / "moved").exists()
        shell.run("cd /mnt/host; mkdir inner; chmod 750 inner; ln -s inner soft; mkfifo inner/fifo")
        shell.run(
            "cd /mnt/host; echo x > soft/first; ln inner/first inner/second; touch -d @5 soft/"
        )
        assert (host / "inner" / "second").stat().st_nlink == 2
        assert stat.S_IMODE((host / "inner").stat().st_mode) == 0o750
        assert stat.S_ISFIFO((host / "inner" / "fifo").stat().st_mode)
        shell.run("cd /mnt/host; (read -r l < inner/fifo; echo $l > said) & echo hi > inner/fifo")
        shell.run("until grep -q hi /mnt/host/said; do sleep 0.1; done")
        shell.run("mknod /mnt/host/null c 1 3", status=1)
        assert shell.run("files /mnt/host/inner 11") == "ok\n"
        (host / "inner" / "random").unlink()
        shell.run("cd / && umount /mnt/host && mkdir /mnt/mapped")
        options = "trans=virtio,version=9p2000.L,cache=mmap"
        shell.run(f"mount -t 9p -o {options} host /mnt/mapped")
        assert shell.run("files /mnt/mapped/inner 12") == "ok\n"
        (host / "inner" / "later").write_text("from the host")
        assert shell.run("cat /mnt/mapped/inner/later") == "from the host"

        before = digest(tree)
        for line in ("touch new", "rm -r folder1", "mv folder1 other", "chmod 0 link/*", "> out2"):
            said = shell.run(f"cd /mnt/fixed && ! ({line})")
            assert "Read-only" in said
        assert digest(tree) == before
        assert "rror" not in shell.run("dmesg | grep -i 9p")


def test_snapshot(generic: Image, cache: Path, tmp_path: Path) -> None:
    """Files that are open when a machine is saved are so when it goes on."""
    host = tmp_path / "host"
    host.mkdir()
    (host / "lines").write_text("one\ntwo\nthree\n")
    with Machine(
        kernel=generic.kernel,
        initrd=generic.initrd,
        append=APPEND,
        cache_dir=cache,
        shares=[host],
    ) as machine:
        machine.start()
        shell = Shell(machine)
        shell.take_over()
        shell.run("exec 5< /mnt/host/lines 6>> /mnt/host/log; read -r first <&5; echo $first >&6")
        machine.snapshot(tmp_path / "saved")
    moved = host.rename(tmp_path / "elsewhere")
    with Machine.restore(
        tmp_path / "saved", cache_dir=cache, shares=[f"{moved},tag=host"]
    ) as again:
        again.start()
        shell.machine = again
        assert shell.run("read -r second <&5; echo $second >&6; echo $second") == "two\n"
        shell.run("echo three > /mnt/host/new")
    assert (moved / "log").read_text() == "one\ntwo\n"
    assert (moved / "new").read_text() == "three\n"
