"""podman 5.9 as far as a pull over its API goes: events as recorded, and real podman for everything else.

Installed as ``podman`` in a directory of its own; what it is to do is in a file beside it, as no variable of
an environment reaches it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

VERSION = "5.9.0"


def install(directory: Path, real: str, **script: Any) -> Path:
    """Make the double in ``directory``. ``script``: ``error``, a text that the pull ends with; ``silent``:
    the answer ends without one; ``garbage``: it is no JSON.
    """
    directory.mkdir()
    (directory / "script.json").write_text(json.dumps({"real": real, **script}))
    program = directory / "podman"
    program.write_text(f"#!{sys.executable} -I\n{Path(__file__).read_text()}")
    program.chmod(0o755)
    return directory


def main() -> None:
    """What podman does."""
    script = json.loads((Path(__file__).parent / "script.json").read_text())
    arguments = sys.argv[1:]
    if arguments[-1] == "--version":
        print(f"podman version {VERSION}")
        return
    if "service" not in arguments:
        os.execv(script["real"], [script["real"], *arguments])
    at = arguments.index("system")
    serve(arguments[-1].removeprefix("unix://"), script, arguments[:at])


def serve(path: str, script: dict[str, Any], where: list[str]) -> None:
    """Answer one request, and wait to be ended."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        connection, _ = listening.accept()
        with connection, connection.makefile("rwb") as stream:
            request = stream.readline().decode()
            while stream.readline().strip():
                pass
            stream.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer(stream, request, script, where)
            stream.write(b"0\r\n\r\n")
        listening.accept()


def answer(stream: Any, request: str, script: dict[str, Any], where: list[str]) -> None:
    """The events of a pull, with real podman doing it."""

    def say(event: dict[str, Any]) -> None:
        line = b"no JSON\n" if script.get("garbage") else json.dumps(event).encode() + b"\n"
        stream.write(b"%x\r\n%s\r\n" % (len(line), line))
        stream.flush()

    query = dict(part.split("=", 1) for part in request.split()[1].partition("?")[2].split("&"))
    assert request.startswith("POST /v5.0.0/libpod/images/pull?"), request
    assert (query["pullProgress"], query["policy"]) == ("true", "always")
    name = query["reference"].replace("%2F", "/").replace("%3A", ":").replace("%40", "@")
    say({"stream": f"Trying to pull {name}...\n"})
    for digest, size in script.get("blobs", {}).items():
        for current in (0, size // 2, size):
            status = "success" if current == size else "pulling"
            say(
                {
                    "pullProgress": {
                        "status": status, "current": current, "total": size, "progressComponentID": digest,
                    }
                }
            )  # fmt: skip
    if script.get("error"):
        say({"error": script["error"]})
        return
    if script.get("silent"):
        return
    done = subprocess.run(
        [script["real"], *where, "pull", name], check=True, capture_output=True, close_fds=False
    )
    image = done.stdout.decode().split()[-1]
    say({"images": [image], "id": image})


if __name__ == "__main__":
    main()
