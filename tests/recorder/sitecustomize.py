"""On PYTHONPATH: every process writes down what it tries to reach, and reaches one address at most.

TEST_CONNECTIONS: the file. TEST_ALLOWED: HOST:PORT, or nothing. An audit hook sees what any Python
code asks of a socket or a resolver.
"""

import os
import sys

_LOG = os.environ["TEST_CONNECTIONS"]
_ALLOWED = os.environ.get("TEST_ALLOWED", "")


def _note(line):
    handle = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def _heard(event, given):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        asked = given[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        asked = given
    else:
        return
    if not isinstance(asked, tuple):  # a path in the file system, or a connection that is open
        return
    where = ":".join(str(part) for part in asked[:2])
    _note(f"tried {where}")
    if where != _ALLOWED:
        raise ConnectionRefusedError(f"tests/recorder refuses {where}")


sys.addaudithook(_heard)
_note(f"records {os.getpid()}")
