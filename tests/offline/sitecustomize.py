"""Block the network in this process and in every Python that it starts: `conftest.py` puts this folder on PYTHONPATH.

An audit hook checks the socket calls of Python, by any name under which they are called, and cannot be removed.
Connections between processes of this machine are allowed.
"""

import os
import socket
import sys

LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()}
"""Names of this machine."""
LOCAL |= {*os.environ.get("INBATCH_TEST_ADDRESSES", "").split()}  # more of its addresses, for one test
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
        attempt = f"a test tried to reach {host!r} ({event} in process {os.getpid()})"
        os.write(2, f"{attempt}\n".encode())  # a library may handle the exception
        raise OSError(attempt)


sys.addaudithook(hook)
