"""Send arbitrary bytes to both listeners: the result is an answer or an error in the right format, never a defect."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import CHAT, PNG, Process, chat

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"
DESCRIBE, CROPS = "/api/inference/describe", "/api/inference/crop-describe"


@pytest.fixture(scope="module")
def process():
    """Run one sidecar for all tests: if an example breaks the sidecar, the next example fails."""
    with asyncio.Runner() as runner:
        process = runner.run(Process("--max-body-bytes", "200000", "--deadline", "5").__aenter__())
        yield process
        assert process.process.returncode is None, "it has died"
        process.signal(15)
        status = runner.run(process.ended())
        assert (status, "defect" in process.log, "Traceback" in process.log) == (0, False, False), process.log


def send(port: int, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes, close the sending side if `end`, and read until the server closes: it must close within 10 s."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server refused the request and closed while the test was sending
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


def http(path: str, body: bytes, headers: bytes = b"Content-Type: application/json\r\n", method: bytes = b"POST"):
    head = b"%b %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n%b\r\n"
    return head % (method, path.encode(), len(body), headers) + body


def parse_answer(answer: bytes) -> tuple[int, bytes]:
    """Return status and body of an answer. Raises an error if the answer has no status line."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FRAME = "data:image/png;base64," + base64.b64encode(PNG).decode()
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url"]) | JSON,
        "text": JSON,
        "image": JSON | st.just(FRAME),
        "image_url": JSON | st.fixed_dictionaries({"url": JSON | st.just(FRAME) | st.text().map(lambda t: FRAME + t)}),
    },
)
MESSAGES = st.lists(
    JSON | st.fixed_dictionaries({"role": JSON, "content": JSON | st.lists(PARTS | JSON, max_size=3)}), max_size=3
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": JSON | st.just("qwen-vl-plus"),
        "messages": MESSAGES | JSON,
        "stream": JSON,
        "max_tokens": JSON,
        "input": JSON | st.fixed_dictionaries({"messages": MESSAGES}),
        "parameters": JSON,
        "image_b64": JSON | st.just(FRAME[22:]) | st.text(alphabet="ABCD=/+ \n", max_size=40),
        "crops": JSON | st.lists(st.fixed_dictionaries({}, optional={"bbox": JSON, "label": JSON, "confidence": JSON})),
        "prompt": JSON,
        "extra_body": JSON,
        "response_format": JSON,
    },
)


@FUZZ
@given(path=st.sampled_from([CHAT, NATIVE, DESCRIBE, CROPS]), body=BODIES)
def test_any_json_gets_an_answer_or_an_error_in_the_apis_own_format(process, path, body):
    status, answer = parse_answer(send(process.port, http(path, json.dumps(body).encode())))
    if status == 200:
        return
    error = json.loads(answer)
    assert status in (400, 413, 422, 502), error
    shape = {CHAT: {"error"}, NATIVE: {"code", "message"}}.get(path, {"detail"})
    assert shape <= set(error), error
    if path == CHAT:
        assert isinstance(error["error"]["message"], str)


@FUZZ
@given(path=st.sampled_from([CHAT, NATIVE, DESCRIBE, "/drain", "/status"]), body=st.binary(max_size=300))
def test_any_bytes_as_a_body_get_an_error(process, path, body):
    for port in (process.port, process.admin_port):
        if (port, path) != (process.admin_port, "/drain"):
            assert parse_answer(send(port, http(path, body)))[0] in range(400, 500)


@FUZZ
@given(
    name=st.sampled_from(
        ["X-Camera-Id", "X-Request-Timeout", "X-Request-Priority", "X-Queue-Policy", "X-Request-Id", "traceparent",
         "Authorization", "Content-Type", "Content-Encoding", "Expect", "X-DashScope-SSE", "Accept"]
    ),
    value=st.binary(max_size=60),
)  # fmt: skip
def test_any_bytes_as_a_header_value_get_an_answer_or_an_error(process, name, value):
    data = http(CHAT, json.dumps(chat()).encode(), name.encode() + b": " + value + b"\r\n")
    for port in (process.port, process.admin_port):
        answer = send(port, data)
        assert parse_answer(answer)[0] in (100, 200, *range(400, 500)), answer


@FUZZ
@given(
    pieces=st.lists(
        st.sampled_from(
            [b"GET ", b"POST ", b"/", CHAT.encode(), b"/metrics", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: x\r\n",
             b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"5\r\n", b"hello", b"0\r\n\r\n",
             b"\n", b" ", b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n", b"Connection: upgrade\r\n"]
        )
        | st.binary(max_size=8),
        max_size=14,
    )
)  # fmt: skip
def test_random_parts_of_http_get_an_answer_or_an_error(process, pieces):
    for port in (process.port, process.admin_port):
        answer = send(port, b"".join(pieces), end=True)
        for line in answer.splitlines():
            if line.startswith(b"HTTP/1."):
                assert line.split(b" ", 2)[1] in (
                    b"100",
                    b"200",
                    b"400",
                    b"404",
                    b"405",
                    b"408",
                    b"413",
                    b"415",
                    b"417",
                )


@FUZZ
@given(count=st.integers(1, 12), cut=st.integers(1, 400))
def test_pipelined_requests_in_one_write_are_answered_in_order(process, count, cut):
    one = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n\r\n"
    data = b"".join(one % number for number in range(count))
    answer = send(process.port, data + (one % count)[: cut % 40], end=True)
    ids = [line.split(b": ")[1] for line in answer.splitlines() if line.lower().startswith(b"x-request-id: ")]
    assert ids == [b"%d" % number for number in range(count)][: len(ids)]


@FUZZ
@given(
    cuts=st.lists(st.integers(1, 400), max_size=8),
    chunked=st.booleans(),
    pieces=st.lists(st.integers(1, 600), max_size=6),
)
def test_a_valid_body_is_accepted_for_every_split_into_pieces(process, cuts, chunked, pieces):
    """The body is split into HTTP chunks, and the bytes of the request into separate writes."""
    body = json.dumps(chat()).encode()
    if chunked:
        edges = [0, *sorted({cut for cut in cuts if cut < len(body)}), len(body)]
        parts = [body[start:end] for start, end in itertools.pairwise(edges)]
        framed = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nX-Trailer: 1\r\n\r\n"
        data = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n%b"
        data %= (CHAT.encode(), framed)
    else:
        data = http(CHAT, body)
    with socket.create_connection(("127.0.0.1", process.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        at = 0
        for piece in pieces:
            connection.sendall(data[at : at + piece])
            at += piece
        connection.sendall(data[at:])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    status, text = parse_answer(answer)
    assert status == 200, answer
    assert b'"choices"' in text
