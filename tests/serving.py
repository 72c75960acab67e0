"""An ASGI app on a free port of this machine, for as long as a test needs it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn


@contextmanager
def serving(app) -> Iterator[str]:
    """Yields the address."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        runner = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_keep_alive=60))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
        port = listener.getsockname()[1]
        thread.start()
        while not runner.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
        runner.should_exit = True
        thread.join(20)
