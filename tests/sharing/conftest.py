"""A shared folder with something in it, and something beside it that is nobody's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ringfence.sharing.options import ShareOptions
from ringfence.sharing.session import FolderServer
from sharing.client import Client

MakeServer = Callable[..., FolderServer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder."""
    made = tmp_path / "shared"
    (made / "sub" / "deep").mkdir(parents=True)
    (made / "file").write_text("contents")
    (made / "sub" / "inner").write_text("inner")
    (tmp_path / "secret").write_text("secret")
    return made


@pytest.fixture(params=["hasty", "patient"])
def serve(folder: Path, request: pytest.FixtureRequest) -> Iterator[MakeServer]:
    """Make a server: ``serve(read_only=True)``; one may answer at once, and one may not."""
    with ExitStack() as opened:

        def make(**options: object) -> FolderServer:
            server = FolderServer(ShareOptions(folder, "tag", **options))
            opened.callback(server.close)
            server._tree.remembers &= request.param == "hasty"
            return server

        yield make


@pytest.fixture
def client(serve: MakeServer) -> Client:
    """A session with it."""
    return Client(serve())
