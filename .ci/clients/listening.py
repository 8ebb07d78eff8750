"""Waits for servers to come up. Standard library only."""

import socket
import time


def wait_until_listening(port, server):
    """Returns when the process `server` takes connections on `port`; it has two minutes."""
    for _ in range(240):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.5)
    raise AssertionError("the server takes no connections after two minutes")
