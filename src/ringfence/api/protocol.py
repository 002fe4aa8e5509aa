"""What client and machine say to each other: one JSON object a line, both ways.

A client asks ``{"ringfence": 1, "command": "pause", "arguments": {}}``. The machine answers with
any number of ``{"progress": {"stage": "…", "fraction": 0.5}}``, then ``{"result": {…}}`` or
``{"error": {"message": "…", "status": 2}}``, where status is the exit status that the command line
gives to such an error. Then the next command may come. Commands that open a *stream* (``console``)
answer ``{"result": {…}, "stream": true}``: what follows is bytes, until either side closes.

Lines are at most `LINE_LIMIT` bytes. `VERSION` grows when an old client would misunderstand; new
commands and new keys of a result don't count, ignore what you don't know.
"""

from __future__ import annotations

import json
from typing import Any

from ringfence import errors
from ringfence.errors import RingfenceError, UsageError

VERSION = 1
LINE_LIMIT = 64 << 10
"""Bytes of a line, with its newline."""
INTERNAL_ERROR = 70
"""Status of a bug of ours (EX_SOFTWARE of sysexits(3))."""

Message = dict[str, Any]

_KINDS: dict[int, type[RingfenceError]] = {
    kind.exit_status: kind
    for kind in (errors.UsageError, errors.ImageError, errors.GuestTimeout, errors.HostError)
}


def encode(message: Message) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """A message of a line; UsageError if it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"a control message is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise UsageError("a control message is no JSON object: expected {…}")
    return message


def request(command: str, arguments: Message) -> Message:
    """What a client says."""
    return {"ringfence": VERSION, "command": command, "arguments": arguments}


def parse_request(message: Message) -> tuple[str, Message]:
    """The command and its arguments; UsageError where it is not understood."""
    if message.get("ringfence") != VERSION:
        raise UsageError(
            f"control protocol version {message.get('ringfence')!r}: expected {VERSION};"
            " the other side is of another release"
        )
    command, arguments = message.get("command"), message.get("arguments", {})
    if not isinstance(command, str) or not isinstance(arguments, dict):
        raise UsageError("a control message lacks its command, a string, or arguments, an object")
    return command, arguments


def failure(error: BaseException) -> Message:
    """What a machine says when a command failed."""
    if isinstance(error, RingfenceError):
        return {"error": {"message": str(error), "status": error.exit_status}}
    text = f"internal error: {type(error).__name__}: {error}"
    return {"error": {"message": text, "status": INTERNAL_ERROR}}


def raised(failure: Message) -> RingfenceError:
    """The error that a client raises for what a machine answered under ``error``."""
    status, message = failure.get("status"), str(failure.get("message"))
    kind = _KINDS.get(status, RingfenceError) if isinstance(status, int) else RingfenceError
    return kind(message)
