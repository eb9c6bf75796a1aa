"""Faults 20 and 24: no network, and all kinds of terminals."""

import os
import pty
from functools import partial
from pathlib import Path
from typing import Any

from .stage import INBATCH, MAIN, TORCHRUN, Injection, end, environment, images, pictures, pretrain, run, script, start

OFFLINE = (
    """
import socket
def connect(self, address):
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = lambda *_: (_ for _ in ()).throw(socket.gaierror("no network"))
"""
    + MAIN
)


def offline(folder: Path) -> dict[str, Any]:
    out, by = folder / "run", [TORCHRUN[0], *script(folder, "offline", OFFLINE)]
    file = str(folder / "f.npz")
    commands = (pretrain(out), ["evaluate", str(out)], ["embed", str(out), "digits-canvas", "-o", file], ["methods"])
    return {"exits": [run(words, by=by).code for words in commands]}


def download(folder: Path) -> dict[str, Any]:
    by = [TORCHRUN[0], *script(folder, "offline", OFFLINE)]
    data = images(pictures(folder / "images"), "--encoder", "resnet10t", "--init", "timm")
    env = environment(HF_HOME=str(folder / "nothing downloaded"))
    ended = run(pretrain(folder / "run", data=data), by=by, env=env)
    return ended.seen | {"traceback": "Traceback" in ended.err}


def on_terminal(width: int, term: str, more: dict[str, str], folder: Path) -> dict[str, Any]:
    """Return the output of a run on a terminal, line by line."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    env = environment(TERM=term, **more)
    env.pop("COLUMNS")
    process = start(
        pretrain(folder / "run", quiet=False), by=INBATCH, env=env, stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the last process has closed it
        pass
    os.close(ours)
    code = end(process).code
    output = text.decode(errors="replace")
    colours = any(f"\x1b[{number}" in output for number in ("31", "32", "33", "34", "35", "36", "38", "9"))
    results = {"exit": code, "traceback": "Traceback" in output, "says": output}
    return results | {"escapes": "\x1b" in output, "colours": colours}


def no_terminal(folder: Path) -> dict[str, Any]:
    ended = run(pretrain(folder / "run", quiet=False), env=environment(TERM="dumb", DISPLAY="", MPLBACKEND=""))
    return ended.seen | {"escapes": "\x1b" in ended.out + ended.err, "curves": (folder / "run" / "curves.png").exists()}


PLAIN = {"exit": 0, "traceback": False, "says": ("epoch 1", "trained encoder")}

INJECTIONS = [
    Injection(20, "no network", "every connection refused; four commands", {"exits": [0] * 4}, offline),
    Injection(
        20, "a download without a network", "--init timm", {"exit": 2, "traceback": False, "says": ("resnet10t",)},
        download,
    ),
    Injection(
        24, "no terminal, no display", "pipes, DISPLAY unset",
        {"exit": 0, "escapes": False, "curves": True, "says": ("step 1/10", "trained encoder")}, no_terminal,
        quick=True,
    ),
    Injection(24, "TERM=dumb", "on a terminal", PLAIN | {"escapes": False}, partial(on_terminal, 80, "dumb", {})),
    Injection(
        24, "NO_COLOR", "on a terminal", PLAIN | {"colours": False},
        partial(on_terminal, 80, "xterm-256color", {"NO_COLOR": "1"}),
    ),
    Injection(
        24, "a narrow terminal", "20 columns", {"exit": 0, "traceback": False},
        partial(on_terminal, 20, "xterm-256color", {}),
    ),
]  # fmt: skip
