"""A server that answers on this machine while a test runs."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening(server: socketserver.TCPServer) -> Iterator[str]:
    """Inside, `server` answers at the address that is given."""
    # It looks this often whether it shall stop; twice a second is the library's own.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
