"""What holds for every test: no network, no progress noise, no surprise from the caller's environment."""

import atexit
import os
import shutil
import socket
import tempfile

# Before any library reads them. The proxies lead nowhere: a child process that tries the network fails there too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for _name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
    os.environ[_name] = "http://127.0.0.1:9"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"
os.environ.pop("EDGELAB_DATA", None)
os.environ["EDGELAB_CACHE"] = tempfile.mkdtemp(prefix="edgelab-tests-")  # not the user's
atexit.register(shutil.rmtree, os.environ["EDGELAB_CACHE"], ignore_errors=True)

import pytest  # noqa: E402 (the environment comes first)

_LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fails any test that reaches beyond localhost, also in a thread and where the code under test swallows the error."""
    attempts = []

    def refuse(host, port) -> None:
        host = host.decode() if isinstance(host, bytes) else host
        if host not in _LOCAL or (host, port) == ("127.0.0.1", 9):  # the latter is the proxy set above
            attempts.append(f"{host}:{port}")
            raise OSError(f"tests have no network, and this one reached for {host}:{port}; use local files")

    def guard(owner, name: str, address) -> None:
        original = getattr(owner, name)

        def guarded(*args, **kwargs):
            if (target := address(*args, **kwargs)) is not None:
                refuse(*target[:2])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    def peer(sock, address):
        return address if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    guard(socket.socket, "connect", peer)
    guard(socket.socket, "connect_ex", peer)
    guard(socket, "getaddrinfo", lambda host, port, *args, **kwargs: (host, port))
    yield attempts
    assert not attempts, f"this test reached for the network: {', '.join(attempts)}"


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for each test whatever ran before it."""
    import random
    import sys

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, but each notebook is a file of its own: all of them on one worker would outlast all other tests.

    (`--dist loadgroup` would say the same with marks, but with pytest 9.2 xdist 3.8 puts no group behind a test's id.)
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndNotebook(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "::test_notebook_is_in_step_and_runs[" in nodeid else super()._split_scope(nodeid)

    return ByFileAndNotebook(config, log) if config.getoption("dist") == "loadfile" else None
