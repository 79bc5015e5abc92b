"""Is there a network, and downloads that neither hang nor write where they should not."""

from __future__ import annotations

import contextlib
import socket
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from pdl_utils.settings import flag

STALL = 20.0  # seconds without a byte after which a download has failed


@contextlib.contextmanager
def careful_downloads() -> Iterator[None]:
    """Inside, a download that stalls raises instead of hanging, and tar files cannot write outside their
    folder: loaders have no parameter for the one, and old ones do not see to the other."""
    timeout, extraction = socket.getdefaulttimeout(), getattr(tarfile.TarFile, "extraction_filter", None)
    socket.setdefaulttimeout(STALL)
    if hasattr(tarfile, "data_filter"):
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        tarfile.TarFile.extraction_filter = staticmethod(extraction) if extraction else None


class Network:
    """What this process knows of the network. Each host is tried once, and only so many seconds are spent
    on silent hosts in all: on a train, six data sets must not wait six times."""

    patience = 4.0  # seconds for all silent hosts together; one gets half of it

    def __init__(self) -> None:
        self._patience_left = self.patience
        self._answers: dict[tuple[str, int], bool] = {}

    def answers(self, host: str, port: int) -> bool:
        """Does the host accept a connection?"""
        if (host, port) not in self._answers:
            self._answers[host, port] = self._try(host, port)
        return self._answers[host, port]

    def _try(self, host: str, port: int) -> bool:
        limit = min(self._patience_left, self.patience / 2)
        if limit <= 0:
            return False
        connected = threading.Event()

        def connect() -> None:
            # Half the limit, so that an address family that leads nowhere leaves time for the other.
            with contextlib.suppress(OSError), socket.create_connection((host, port), limit / 2):
                connected.set()

        # In a thread, because looking up a name takes no time-out and may hang for half a minute.
        started = time.monotonic()
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(limit)
        if not connected.is_set():
            self._patience_left -= time.monotonic() - started
        return connected.is_set()


_network = Network()


def network_problem(url: str) -> str | None:
    """Why `url` cannot be fetched, in words that follow 'because', or None if its host answers.

    Takes no more than `Network.patience` seconds a process, however many hosts are asked for; a process
    that was offline stays so (restart the kernel to look again).
    """
    if flag("PDL_OFFLINE"):
        return "PDL_OFFLINE is set"
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or {"http": 80, "https": 443}[target.scheme]
    if not _network.answers(target.hostname, port):
        return f"{target.hostname} does not answer (no network?)"
    return None
