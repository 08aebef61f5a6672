"""Both ends of every measured line, as bare protocols, each in a process of its own: what is measured lies between.

    python -m bench.cost.wire upstream PORT
    python -m bench.cost.wire silent PORT                            # takes everything, and never answers
    python -m bench.cost.wire load PORT CONNECTIONS SECONDS < body   # prints what it saw as JSON
    python -m bench.cost.wire pace PORT PER_SECOND SECONDS < body    # likewise
    python -m bench.cost.wire pile PORT REQUESTS < body              # sends them all at once, and holds on

The upstream answers at once. Asked for a stream it sends `EVENTS` events, `EVENT_SECONDS` apart, and each says when it
was sent: both ends read the one clock of the machine, so that the client knows how long each was on its way.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from statistics import median

import uvloop

EVENTS = 40
EVENT_SECONDS = 0.005
ANSWER = json.dumps(
    {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": "qwen-vl-plus",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1225, "completion_tokens": 30, "total_tokens": 1255},
    }
).encode()
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chat-1","object":"chat.completion.chunk","created":1,"model":"qwen-vl-plus",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"%019d"},"finish_reason":null}]}\n\n'
)
#: What asks for a stream, in a body that came whole: bodies that come in pieces are frames, and not looked at.
_STREAM = re.compile(rb'"stream": ?true')
_SENT = re.compile(rb'"(\d{19})"')
_END = b"data: [DONE]"


class Upstream(asyncio.Protocol):
    """Answers every request. Reads no more of HTTP than where a request ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = bytearray()
        self.missing = -1
        self.streams = False
        self.events_left = 0

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            self.missing = content_length(self.buffer[:end]) - (len(self.buffer) - end)
            self.streams = self.missing == 0 and _STREAM.search(self.buffer, end) is not None
            self.buffer.clear()
        else:
            self.missing -= len(data)
        if self.missing == 0:
            self.missing = -1
            if self.streams:
                self.transport.write(STREAM_HEAD)
                self.events_left = EVENTS
                self.send_event()
            else:
                self.transport.write(WHOLE)

    def send_event(self) -> None:
        if self.transport.is_closing():  # the client had seen enough
            return
        if self.events_left:
            self.events_left -= 1
            self.transport.write(chunk(EVENT % time.monotonic_ns()))
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self.send_event)
        else:
            self.transport.write(chunk(_END + b"\n\n") + b"0\r\n\r\n")


class Client(asyncio.Protocol):
    """Sends one request after another on its connection, and notes how long each took. Subclasses tell the end."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.seconds: list[float] = []
        self.buffer = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self) -> None:
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.has_ended():
            return
        self.seconds.append(time.perf_counter() - self.sent_at)
        if not self.buffer.startswith(b"HTTP/1.1 200 "):
            self.fail(f"not answered: {bytes(self.buffer[:300])!r}")
            self.transport.abort()
            return
        self.buffer.clear()
        self.next()

    def has_ended(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        head = self.buffer[:end].lower()
        if b"content-length:" in head:
            return len(self.buffer) >= end + content_length(head)
        return self.buffer.endswith(b"0\r\n\r\n")

    def next(self) -> None:
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(f"the connection broke: {error}")

    def fail(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_exception(RuntimeError(why))


class StreamClient(Client):
    """Notes when the first event came, and how long each later one was on its way."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self.first: list[float] = []
        self.delays: list[float] = []
        self.begun = False

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        for sent in _SENT.findall(data):
            if self.begun:
                self.delays.append((now - int(sent)) / 1e9)
            else:
                self.begun = True
                self.first.append(time.perf_counter() - self.sent_at)
        super().data_received(data)

    def next(self) -> None:
        self.begun = False
        self.send()


class PacedClient(Client):
    """Sends the next request when it is told to, and is free between."""

    busy = False

    def send(self) -> None:
        self.busy = True
        super().send()

    def next(self) -> None:
        self.busy = False


def content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length:") + 15
    return int(head[at:].split(b"\r\n", 1)[0]) if at >= 15 else 0


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def request_of(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


async def connect(kind: type[Client], port: int, count: int, body: bytes) -> list[Client]:
    loop, request = asyncio.get_running_loop(), request_of(body)
    return [(await loop.create_connection(lambda: kind(request), "127.0.0.1", port))[1] for _ in range(count)]


async def hold(clients: list[Client], seconds: float) -> float:
    """Give the seconds that passed. Raises what broke a client."""
    began = time.perf_counter()
    done, _ = await asyncio.wait([client.lost for client in clients], timeout=seconds, return_when="FIRST_COMPLETED")
    for lost in done:
        await lost
    return time.perf_counter() - began


async def load(port: int, connections: int, seconds: float, body: bytes) -> dict[str, float]:
    """Ask again as soon as there is an answer, on every connection; gives medians in seconds."""
    streams = _STREAM.match(body, 1) is not None
    clients = await connect(StreamClient if streams else Client, port, connections, body)
    for client in clients:
        client.send()
    took = await hold(clients, seconds)
    while not any(client.seconds for client in clients):  # a slow proxy needs longer for its first answer
        took += await hold(clients, seconds)
    waits = [wait for client in clients for wait in client.seconds]
    found = {"answered": len(waits), "per_second": len(waits) / took, "p50": median(waits)}
    if streams:
        first = [wait for client in clients for wait in client.first]
        later = [delay for client in clients for delay in client.delays]
        found |= {"events": len(first) + len(later), "first": median(first), "event": median(later)}
    return found


async def pace(port: int, per_second: float, seconds: float, body: bytes) -> dict[str, float]:
    """Ask at a steady rate, whatever the answers do: a request that finds no free connection is late, and counted."""
    clients = await connect(PacedClient, port, 64, body)
    began, late = time.perf_counter(), 0
    for number in range(round(per_second * seconds)):
        await asyncio.sleep(max(began + number / per_second - time.perf_counter(), 0))
        free = next((client for client in clients if not client.busy), None)
        clients.append(clients.pop(0))  # in turn: one that never asks is closed after some seconds
        if free is None:
            late += 1
        else:
            free.send()
    return {"answered": sum(len(client.seconds) for client in clients), "late": late}


async def pile(port: int, requests: int, body: bytes) -> None:
    """Ask so many at once, and wait for answers until killed."""
    clients = await connect(Client, port, requests, body)
    for client in clients:
        client.send()
    await hold(clients, 600)


async def upstream(port: int, protocol: type[asyncio.Protocol] = Upstream) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    match sys.argv[1:]:
        case ["upstream", port]:
            uvloop.run(upstream(int(port)))
        case ["silent", port]:
            uvloop.run(upstream(int(port), asyncio.Protocol))
        case ["load", port, connections, seconds]:
            found = uvloop.run(load(int(port), int(connections), float(seconds), sys.stdin.buffer.read()))
            print(json.dumps(found))
        case ["pace", port, per_second, seconds]:
            print(json.dumps(uvloop.run(pace(int(port), float(per_second), float(seconds), sys.stdin.buffer.read()))))
        case ["pile", port, requests]:
            uvloop.run(pile(int(port), int(requests), sys.stdin.buffer.read()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
