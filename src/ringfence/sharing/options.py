"""What can be said about a shared folder: ``FOLDER[,tag=TAG][,ro][,owner=UID[:GID]]``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UsageError

TAG_LENGTH = 31
"""Bytes of a tag."""
_OWNER = re.compile(r"(\d{1,9})(?::(\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """One folder that a guest is given.

    Attributes
    ----------
    path : Path
        The folder.
    tag : str
        What the guest mounts it by.
    read_only : bool
        Whether the guest may change nothing in it.
    uid, gid : int
        Whose the guest sees those files be that belong to the user who runs the machine.
    """

    path: Path
    tag: str
    read_only: bool = False
    uid: int = 0
    gid: int = 0


def parse_share(text: str | Path | ShareOptions) -> ShareOptions:
    """Read a shared folder's description; without a tag it has the folder's own name.

    A comma in a path is written twice.

    Raises
    ------
    UsageError
        There is an unknown option or value, or no folder.
    """
    if isinstance(text, ShareOptions):
        return text
    first, *rest = str(text).replace(",,", "\0").split(",")
    if not first:
        raise UsageError(f"share {str(text)!r} names no folder: expected FOLDER[,OPTION...]")
    path = Path(first.replace("\0", ","))
    tag, read_only, uid, gid = path.resolve().name or "root", False, 0, 0
    for option in rest:
        name, _, value = option.partition("=")
        owner = _OWNER.fullmatch(value)
        if name == "tag" and value:
            tag = value.replace("\0", ",")
        elif name == "ro" and value in ("", "on", "off"):
            read_only = value != "off"
        elif name == "owner" and owner:
            uid = int(owner[1])
            gid = int(owner[2] or uid)
        else:
            raise UsageError(f"share option {option!r}: expected tag=TEXT, ro or owner=UID[:GID]")
    if len(tag.encode()) > TAG_LENGTH:
        raise UsageError(f"share tag {tag!r} is longer than {TAG_LENGTH} bytes: name one with tag=")
    return ShareOptions(path, tag, read_only, uid, gid)


def parse_shares(texts: Iterable[str | Path | ShareOptions]) -> tuple[ShareOptions, ...]:
    """Read all of a machine's; UsageError where two have one tag, too."""
    shares = tuple(parse_share(text) for text in texts)
    tags = [share.tag for share in shares]
    for tag in tags:
        if tags.count(tag) > 1:
            raise UsageError(f"two shares have the tag {tag!r}: name others with tag=")
    return shares


def relocated(
    shares: Iterable[ShareOptions], elsewhere: Iterable[str | Path | ShareOptions]
) -> tuple[ShareOptions, ...]:
    """Shares, with what ``elsewhere`` says of some of their tags.

    Raises
    ------
    UsageError
        It speaks of a tag that is none of theirs.
    """
    shares = tuple(shares)
    given = {share.tag: share for share in parse_shares(elsewhere)}
    unknown = set(given) - {share.tag for share in shares}
    if unknown:
        known = ", ".join(share.tag for share in shares) or "none"
        raise UsageError(f"no shared folder has the tag {min(unknown)!r}: expected {known}")
    return tuple(given.get(share.tag, share) for share in shares)
