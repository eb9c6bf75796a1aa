"""No network, in this process and in every Python that it starts: `conftest.py` puts this folder on PYTHONPATH.

An audit hook sees what Python's sockets are about to do, by whatever name they were reached, and cannot be taken off
again. Processes of this machine may meet.
"""

import os
import socket
import sys

LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()}
"""Hosts that are this machine."""
LOOKED_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
ADDRESSED = ("socket.connect", "socket.sendto", "socket.sendmsg")


def hook(event: str, args: tuple) -> None:
    if not event.startswith("socket."):
        return
    if event in LOOKED_UP:
        host = args[0][0] if isinstance(args[0], tuple) else args[0]
    elif event in ADDRESSED and isinstance(args[1], tuple) and args[0].family in (socket.AF_INET, socket.AF_INET6):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL:
        raise OSError(f"a test tried to reach {host!r} ({event} in process {os.getpid()})")


sys.addaudithook(hook)
