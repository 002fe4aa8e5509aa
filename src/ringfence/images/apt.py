"""Fetch distribution packages with the host's apt, without root and without touching its state.

apt reads one configuration file of ours (through ``APT_CONFIG``). It is the host's configuration
as ``apt-config dump`` gives it, so that sources, keys and proxies are the host's, without the hooks
that would run the host's scripts, and with every folder that apt writes to moved below our own.
Nothing counts as installed. This works on a fresh machine whose package lists are empty.

Shape: :class:`Apt` is one such folder with the four things that we ask of apt: ``update``,
``depends``, ``closure`` and ``download``.
"""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import HostError

Progress = Callable[[str, float], None]
"""Called with a stage ("update", "download", …) and how much of it is done, 0.0 to 1.0."""

_HOOKS = re.compile(r"(?i)(DPkg|APT::Update|APT::Periodic|Unattended-Upgrade|Dir::Etc::parts)\b")
_NETWORK_SECONDS = 20
"""How long apt waits for a server that says nothing."""


@dataclass(frozen=True)
class Fetched:
    """A downloaded package: its file, and name and version as apt knows them."""

    name: str
    version: str
    path: Path


def no_progress(stage: str, fraction: float) -> None:
    """A :data:`Progress` that says nothing."""


class Apt:
    """The host's apt with its state and cache in ``folder``.

    Parameters
    ----------
    folder : Path
        Our own; created as needed.
    suite : str, optional
        Take packages from this suite of the host's distribution ("trixie") instead of the ones
        that the host has in its sources.
    architecture : str, optional
        Another architecture than the host's ("i386").
    """

    def __init__(
        self, folder: Path, *, suite: str | None = None, architecture: str | None = None
    ) -> None:
        for tool in ("apt-get", "apt-cache", "apt-config"):
            if shutil.which(tool) is None:
                raise HostError(
                    f"{tool} was not found: pulling a distribution's kernel needs apt (Debian,"
                    " Ubuntu); give a kernel file or use the built-in guest instead"
                )
        self.folder = (folder / suite if suite else folder).absolute()
        self._complaint = ""
        self._unfetched: list[str] = []
        for name in ("state/lists/partial", "cache/archives/partial", "parts", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "state/status").touch()
        self._config = self.folder / "apt.conf"
        self._configure(suite, architecture)

    def update(self, progress: Progress = no_progress) -> None:
        """Fetch the package lists.

        A source that fails is not fatal, others may have what is needed; what apt complained about
        is kept and told, by ``reason``, when a package is not found.
        """
        self._run(["apt-get", "update"], progress, "update")

    def depends(self, name: str) -> list[str]:
        """Names that a package directly depends on; empty where it is unknown."""
        text, status = self._run(["apt-cache", "depends", "--important", name])
        found = re.findall(r"(?m)^ [ |](?:Pre)?Depends: <?([^\s<>:]+)", text)
        return found if status == 0 else []

    def candidate(self, name: str) -> str | None:
        """The version of a package that apt would take; None where it has none."""
        text, _ = self._run(["apt-cache", "policy", name])
        match = re.search(r"(?m)^  Candidate: (\S+)", text)
        return match[1] if match and match[1] != "(none)" else None

    def essential(self) -> list[str]:
        """The packages that a system can't do without (Debian Policy 3.8)."""
        text, _ = self._run(["apt-cache", "dumpavail"])
        return re.findall(r"(?m)^Package: (\S+)\n(?:\S.*\n| .*\n)*?Essential: yes$", text)

    def sources(self) -> str:
        """A sources.list of the same archives (sources.list(5)), for a system that starts anew."""
        query = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
        text, _ = self._run([*query, "Created-By: Packages"])
        lines = dict.fromkeys(line.strip() for line in text.splitlines())
        return "".join(
            f"deb {line}\n" for line in lines if re.fullmatch(r"https?:\S+ \S+ \S+", line)
        )

    def closure(self, names: Sequence[str]) -> list[str]:
        """The packages and all that they need, "name=version", as apt resolves it."""
        command = ["apt-get", "--simulate", "--no-install-recommends", "install", *names]
        text, status = self._run(command)
        found = re.findall(r"(?m)^Inst (\S+) \((\S+)", text)
        if status or not found:
            raise HostError(f"apt can't resolve {', '.join(names)}: {self.reason()}")
        return [f"{name}={version}" for name, version in found]

    def download(
        self, names: Sequence[str], dest: Path, progress: Progress = no_progress
    ) -> list[Fetched]:
        """Download packages, each "name" or "name=version", into a folder.

        Files that are already there and whole are not fetched again.

        Raises
        ------
        HostError
            A package is unknown, or can't be fetched; quotes apt's last complaint.
        """
        dest.mkdir(parents=True, exist_ok=True)
        wanted: list[tuple[str, str]] = []
        for item in names:
            name, _, version = item.partition("=")
            version = version or self.candidate(name) or ""
            if not version:
                raise HostError(f"package {name} is not in the host's apt sources: {self.reason()}")
            wanted.append((name, version))
        command = ["apt-get", "download", *(f"{name}={version}" for name, version in wanted)]
        _, status = self._run(command, progress, "download", cwd=dest)
        if status:
            raise HostError(f"apt can't download {', '.join(names)}: {self.reason()}")
        fetched = []
        for name, version in wanted:
            bare, _, architecture = name.partition(":")
            fetched.append(Fetched(bare, version, self._file(dest, bare, version, architecture)))
        return fetched

    def _file(self, folder: Path, name: str, version: str, architecture: str) -> Path:
        """Where apt has put a package; the same of other architectures may lie beside it."""
        for kind in (architecture or self._architecture, "all"):
            file = folder / f"{name}_{version.replace(':', '%3a')}_{kind}.deb"
            if file.is_file():
                return file
        raise HostError(f"apt fetched {name} {version} but left no file in {folder}")

    def reason(self) -> str:
        """Why something is missing, as far as apt said: a list it couldn't fetch comes first."""
        said = (self._unfetched or [self._complaint or "apt gave no reason"])[-1].strip()
        return f"{said} (is the network up, and are apt's sources right?)"

    def _configure(self, suite: str | None, architecture: str | None) -> None:
        host = subprocess.run(
            ["apt-config", "dump"], capture_output=True, text=True, errors="replace", check=False
        )
        lines = [line for line in host.stdout.splitlines() if not _HOOKS.match(line)]
        found = re.search(r'(?m)^APT::Architecture "([^"]*)";', host.stdout)
        self._architecture = architecture or (found.group(1) if found else "amd64")
        own = {
            "Dir::Etc::main": "ringfence-has-none",
            "Dir::Etc::parts": self.folder / "parts/",
            "Dir::State": self.folder / "state/",
            "Dir::State::lists": self.folder / "state/lists/",
            "Dir::State::status": self.folder / "state/status",
            "Dir::Cache": self.folder / "cache/",
            "Dir::Cache::archives": self.folder / "cache/archives/",
            "Dir::Log": self.folder / "log/",
            "Acquire::http::Timeout": _NETWORK_SECONDS,
            "Acquire::https::Timeout": _NETWORK_SECONDS,
            "Acquire::Languages": "none",
            "Debug::NoLocking": "true",
        }
        if os.geteuid() == 0:
            own["APT::Sandbox::User"] = "root"  # "_apt" may not enter a folder of root's
        if architecture is not None:
            lines = [line for line in lines if not line.startswith("APT::Architectures")]
            own["APT::Architecture"] = architecture
        if suite is not None:
            own["Dir::Etc::sourcelist"] = self._sources_of(suite)
            own["Dir::Etc::sourceparts"] = self.folder / "parts/"
        lines += [f'{name} "{value}";' for name, value in own.items()]
        self._config.write_text("\n".join(lines) + "\n")

    def _sources_of(self, suite: str) -> Path:
        """A sources.list with ``suite`` from the mirror that the host uses first."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9./-]*", suite):
            raise HostError(f"{suite!r} is no suite of a distribution: expected a name like trixie")
        query = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(SIGNED_BY)"]
        text = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        uri, _, key = (text.splitlines() or [""])[0].partition(" ")
        if not uri:
            raise HostError(f"the host has no apt sources: suite {suite} needs one to start from")
        option = f" [signed-by={key.strip()}]" if key.strip().startswith("/") else ""
        path = self.folder / "sources.list"
        path.write_text(f"deb{option} {uri} {suite} main\n")
        return path

    def _run(
        self,
        command: list[str],
        progress: Progress | None = None,
        stage: str = "",
        cwd: Path | None = None,
    ) -> tuple[str, int]:
        """Run a tool of apt; its standard output and exit status.

        One tool at a time uses the folder, also across processes: apt's own lock is off, as it
        wants root. With a callback, apt reports through a pipe (APT::Status-Fd):
        "dlstatus:<n>:<percent>:…".
        """
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
            return self._run_alone(command, progress, stage, cwd)

    def _run_alone(
        self, command: list[str], progress: Progress | None, stage: str, cwd: Path | None
    ) -> tuple[str, int]:
        environment = dict(os.environ, APT_CONFIG=str(self._config), LC_ALL="C")
        environment["DEBIAN_FRONTEND"] = "noninteractive"
        status_read, status_write = os.pipe()
        try:
            if progress is not None:
                command = [*command, "-o", f"APT::Status-Fd={status_write}"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(status_write,),
                cwd=cwd or self.folder,
                env=environment,
            )
        except OSError as error:
            os.close(status_read)
            raise HostError(f"{command[0]} can't be run ({error.strerror}): check apt") from error
        finally:
            os.close(status_write)
        with process, os.fdopen(status_read, "rb", 0) as reports:
            assert process.stdout is not None
            assert process.stderr is not None
            texts = {"out": b"", "err": b"", "status": b""}
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ, "out")
                selector.register(process.stderr, selectors.EVENT_READ, "err")
                selector.register(reports, selectors.EVENT_READ, "status")
                while selector.get_map():
                    for key, _ in selector.select():
                        chunk = os.read(key.fd, 1 << 16)
                        if not chunk:
                            selector.unregister(key.fileobj)
                        texts[key.data] += chunk
                        if key.data == "status" and progress is not None:
                            _report(progress, stage, texts["status"])
        complaints = re.findall(r"(?m)^(?:E|W|Err)[:\s].*", texts["err"].decode("utf-8", "replace"))
        if stage == "update":
            self._unfetched = [line for line in complaints if "Failed to fetch" in line]
        if complaints:
            errors = [line for line in complaints if not line.startswith("W")]
            self._complaint = (errors or complaints)[-1]
        if progress is not None and process.returncode == 0:
            progress(stage, 1.0)
        return texts["out"].decode("utf-8", "replace"), process.returncode


def _report(progress: Progress, stage: str, text: bytes) -> None:
    """Pass on the newest whole line of apt's status reports."""
    found = re.findall(rb"(?m)^dlstatus:[^:]*:([0-9.]+):.*\n", text)
    if found:
        progress(stage, min(float(found[-1]) / 100, 1.0))
