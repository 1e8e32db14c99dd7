"""An HTTP server on loopback that serves a folder, and fails on demand."""

import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_SECONDS = 20.0


class FolderServer:
    """Serves `folder`. `faults[name]` lists what goes wrong with the next requests of a file, first come first served:
    an HTTP status, "stall", "short" (ends in the middle) or "wrong" (another content of the same length).
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[int | str]] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                with server._lock:
                    server.requests[name] += 1
                    fault = server.faults.get(name) and server.faults[name].pop(0)
                if not fault:
                    super().do_GET()
                elif isinstance(fault, int):
                    self.send_error(fault)
                else:
                    self._send_wrongly((folder / name).read_bytes(), fault)

            def _send_wrongly(self, data: bytes, fault: str) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "wrong":
                    self.wfile.write(bytes(255 - byte for byte in data))
                    return
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "stall":
                    server._ended.wait(STALL_SECONDS)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def wait_for(self, name: str, seconds: float = 10.0) -> bool:
        """Whether `name` is asked for within so many seconds."""
        end = time.monotonic() + seconds
        while not self.requests[name] and time.monotonic() < end:
            time.sleep(0.02)
        return self.requests[name] > 0

    def stop(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
