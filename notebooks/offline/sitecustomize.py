"""No network for a notebook's kernel and its child processes: put this folder on PYTHONPATH, and Python reads it at its start.

A connection, datagram or name look-up beyond this machine raises OSError. Each attempt is also written to the file that
EDGELAB_OFFLINE_LOG names, so that `build.py` sees those whose error somebody swallowed. Libraries that reach out without
Python's sockets are led astray by the proxies that `build.py` sets beside it.
"""

import os
import socket

_LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


def _refuse(address) -> None:
    host, port = address
    host = host.decode() if isinstance(host, bytes) else host
    if host in _LOCAL or str(host).startswith("127."):
        return
    if log := os.environ.get("EDGELAB_OFFLINE_LOG"):
        with open(log, "a", encoding="utf-8") as f:
            f.write(f"{host}:{port}\n")
    raise OSError(f"notebooks have no network, and this one reached for {host}:{port}; use local files")


def _guard(owner, name: str, address_of) -> None:
    original = getattr(owner, name)

    def guarded(*args, **kwargs):
        address = address_of(*args, **kwargs)
        if address is not None:
            _refuse(address)
        return original(*args, **kwargs)

    setattr(owner, name, guarded)


def _peer(sock, *args):
    """The address that `connect(address)` or `sendto(data[, flags], address)` names, or None for a socket of this machine's own."""
    return tuple(args[-1][:2]) if sock.family in (socket.AF_INET, socket.AF_INET6) else None


_guard(socket.socket, "connect", _peer)
_guard(socket.socket, "connect_ex", _peer)
_guard(socket.socket, "sendto", _peer)
_guard(socket, "getaddrinfo", lambda host, port, *args, **kwargs: (host, port))
_guard(socket, "gethostbyname", lambda host: (host, ""))
