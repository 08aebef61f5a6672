"""`vlm-sidecar drain`, for a preStop hook: requests a drain and waits until the sidecar has ended."""

from __future__ import annotations

import http.client
import sys
import time


def drain(admin_port: int, timeout: float) -> int:
    """Drain the sidecar on this machine and wait up to `timeout` seconds for its end. Return the exit status.

    Uses only the standard library, because the import of aiohttp takes too long in a preStop hook.
    """
    until = time.monotonic() + timeout
    try:
        status, text = _ask("POST", "/drain", admin_port)
    except OSError as error:
        print(f"vlm-sidecar: no sidecar answers on 127.0.0.1:{admin_port}: {error.strerror or error}", file=sys.stderr)
        return 1
    if status != 202:
        print(f"vlm-sidecar: the sidecar does not drain: {text.strip()}", file=sys.stderr)
        return 1
    while time.monotonic() < until:
        try:
            _ask("GET", "/livez", admin_port)
        except OSError:
            return 0  # the listener is closed, so the sidecar has finished
        time.sleep(0.1)
    print(f"vlm-sidecar: it is still draining after {timeout:g} s", file=sys.stderr)
    return 1


def _ask(method: str, path: str, port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError("what answers there is no sidecar") from error
    finally:
        connection.close()
