"""Each undocumented part of aiohttp that is used, and each behaviour that is relied upon. A failing name is the part"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import socket
from inspect import signature
from pathlib import Path

import aiohttp
import pytest
from aiohttp import base_protocol, client_proto, client_reqrep, connector, helpers, http, tcp_helpers
from yarl import URL

from backends import http1

pytestmark = pytest.mark.internal_http

FOLDER = Path(http1.__file__).parent
HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
BOUND = 10.0


@pytest.fixture
def parts():
    from backends.http1 import aiohttp_parts  # noqa: PLC0415  older releases lack what it imports

    return aiohttp_parts


class Transport(asyncio.Transport):
    """Keeps what is written, and counts pauses."""

    def __init__(self):
        super().__init__()
        self.written, self.reading, self.closing = b"", True, False

    def write(self, data):
        self.written += bytes(data)

    def writelines(self, pieces):
        self.written += b"".join(bytes(piece) for piece in pieces)

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    abort = close

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


def parser(**options):
    """A parser as `RequestProtocol` makes it, and the protocol that it controls."""
    loop = asyncio.get_running_loop()
    protocol = base_protocol.BaseProtocol(loop, None)
    protocol.connection_made(Transport())
    made = http.HttpRequestParser(
        protocol, loop, 1024, payload_exception=aiohttp.ClientPayloadError, auto_decompress=False,
        **{"max_msg_queue_size": 3, **options},
    )  # fmt: skip
    protocol._parser = made
    return made, protocol


def received(*pieces):
    """A client's protocol that has received these bytes."""
    protocol = client_proto.ResponseHandler(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(read_until_eof=True)
    for piece in pieces:
        protocol.data_received(piece)
    return protocol


# -- the uses, in the order of the table ------------------------------------------------------------------------------


async def test_base_protocol_has_a_transport_and_knows_whether_writing_is_paused():
    protocol = base_protocol.BaseProtocol(asyncio.get_running_loop(), None)
    transport = Transport()
    protocol.connection_made(transport)
    assert protocol.transport is transport
    protocol.pause_writing()
    assert protocol.writing_paused
    protocol.resume_writing()
    assert not protocol.writing_paused
    protocol.connection_lost(None)
    assert protocol.transport is None


async def test_base_protocol_reading_paused_and_resume_reading():
    made, protocol = parser()
    made.feed_data(HEAD + b"Content-Length: 3\r\n\r\n")  # only a body can be paused
    protocol.pause_reading()
    assert protocol._reading_paused and not protocol.transport.reading
    protocol.resume_reading(False)
    assert not protocol._reading_paused and protocol.transport.reading


async def test_base_protocol_buffer_paused_holds_the_transport():
    _, protocol = parser()
    protocol._pause_reading_for_buffer()
    assert protocol._buffer_paused and not protocol.transport.reading
    protocol._resume_reading_for_buffer()
    assert not protocol._buffer_paused and protocol.transport.reading


async def test_base_protocol_drain_helper_and_drain_waiter():
    _, protocol = parser()
    await protocol._drain_helper()
    protocol.pause_writing()
    waiting = asyncio.ensure_future(protocol._drain_helper())
    await asyncio.sleep(0)
    assert protocol._drain_waiter is not None
    protocol.resume_writing()
    await waiting
    protocol.connection_lost(None)
    with pytest.raises(ConnectionError):
        await protocol._drain_helper()


async def test_http_request_parser_takes_our_arguments():
    parser(max_msg_queue_size=1)


async def test_http_request_parser_feed_data_gives_messages_with_bodies_an_upgrade_and_a_rest():
    made, _ = parser()
    ((_, body),), upgraded, _ = made.feed_data(HEAD + b"Content-Length: 3\r\n\r\nabc")
    assert (upgraded, body.is_eof(), body.read_nowait()) == (False, True, b"abc")
    _, upgraded, _ = made.feed_data(HEAD + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n")
    assert upgraded


async def test_http_request_parser_message_consumed_lets_the_parser_continue():
    made, _ = parser(max_msg_queue_size=2)
    one = HEAD + b"Content-Length: 0\r\n\r\n"
    messages, _, _ = made.feed_data(one * 3)
    assert len(messages) == 2
    made.message_consumed()
    messages, _, _ = made.feed_data(b"")
    assert len(messages) == 1


async def test_raw_request_message_has_our_fields():
    made, _ = parser()
    (((message, _),), _, _) = made.feed_data(HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    assert (message.method, message.path, message.version) == ("POST", "/a", aiohttp.HttpVersion11)
    assert (message.headers["host"], message.should_close, message.chunked) == ("x", True, True)


async def test_http_processing_error_is_what_the_request_parser_raises():
    made, _ = parser()
    with pytest.raises(http.HttpProcessingError):
        made.feed_data(b"\x16\x03\x01 no HTTP\r\n\r\n")


async def test_empty_payload_is_at_its_end():
    assert aiohttp.EMPTY_PAYLOAD.is_eof() and aiohttp.EMPTY_PAYLOAD.read_nowait() == b""


async def test_stream_reader_set_exception_and_on_eof():
    made, _ = parser()
    (((_, body),), _, _) = made.feed_data(HEAD + b"Content-Length: 3\r\n\r\n")
    ended = []
    body.on_eof(lambda: ended.append(1))
    made.feed_data(b"abc")
    assert ended == [1]
    body.on_eof(lambda: ended.append(2))
    assert ended == [1, 2], "called at once where the end has come"
    (((_, body),), _, _) = made.feed_data(HEAD + b"Content-Length: 3\r\n\r\n")
    body.set_exception(KeyError())
    with pytest.raises(KeyError):
        await body.readany()


async def test_stream_reader_total_bytes_counts_what_has_arrived():
    made, _ = parser()
    (((_, body),), _, _) = made.feed_data(HEAD + b"Content-Length: 9\r\n\r\nabc")
    body.read_nowait()
    made.feed_data(b"de")
    assert body.total_bytes == 5


def test_tcp_keepalive_sets_the_option():
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:

        class OfSocket(asyncio.Transport):
            def get_extra_info(self, name, default=None):
                return one if name == "socket" else default

        tcp_helpers.tcp_keepalive(OfSocket())
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_rfc822_formatted_time_is_the_date_of_http():
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", helpers.rfc822_formatted_time())


async def test_response_handler_read_should_close_and_payload():
    protocol = received(OK + b"Content-Length: 3\r\n\r\n")
    message, body = await protocol.read()
    assert message.code == 200 and protocol._payload is body and protocol.should_close, "the body is not read"
    protocol.data_received(b"abc")
    assert not protocol.should_close
    protocol.data_received(OK)
    protocol.data_received(b"Content-Length: 0\r\n\r\n")
    assert protocol.should_close, "something has arrived that nobody asked for"


async def test_response_handler_set_response_params_takes_our_arguments():
    protocol = client_proto.ResponseHandler(asyncio.get_running_loop())
    protocol.set_response_params(skip_payload=True, read_until_eof=True, read_bufsize=10)
    protocol.data_received(OK + b"Content-Length: 3\r\n\r\n")
    _, body = await protocol.read()
    assert body.is_eof(), "the answer to HEAD has no body"


async def test_raw_response_message_has_our_fields():
    message, _ = await received(OK + b"Content-Length: 0\r\nConnection: close\r\n\r\n").read()
    assert (message.code, message.headers["content-length"], message.should_close) == (200, "0", True)


async def test_tcp_connector_factory_makes_the_protocol_of_connect(parts):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    made = parts.PartsConnector()
    target = parts.ConnectTarget(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), None)
    connection = await made.connect(target, [], aiohttp.ClientTimeout(connect=BOUND))
    assert type(connection.protocol) is parts.ResponseProtocol
    assert list(signature(aiohttp.TCPConnector.connect).parameters)[1:] == ["req", "traces", "timeout"]
    parts.abort(connection)
    await made.close()
    server.close()


async def test_connection_has_protocol_and_transport_until_it_is_closed(parts):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    made = parts.PartsConnector()
    connection = await made.connect_new(
        parts.ConnectTarget(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), None)
    )
    assert isinstance(connection, connector.Connection)
    assert connection.transport is connection.protocol.transport and parts.can_be_reused(connection)
    connection.close()
    assert connection.protocol is None and not parts.can_be_reused(connection)
    await made.close()
    server.close()


async def test_client_request_headers_have_host_and_the_urls_password():
    loop = asyncio.get_running_loop()
    made = client_reqrep.ClientRequest("GET", URL("http://me:pw@x.example:81/v1"), proxy=None, loop=loop)
    assert (made.headers["Host"], made.headers["Authorization"]) == ("x.example:81", "Basic bWU6cHc=")


async def test_stream_writer_writes_a_view_and_waits_while_the_socket_is_full():
    protocol = received()
    writer = http.StreamWriter(protocol, asyncio.get_running_loop())
    protocol.pause_writing()
    writing = asyncio.ensure_future(writer.write(memoryview(b"x" * 100_000)))
    await asyncio.sleep(0)
    assert not writing.done() and protocol.transport.written == b"x" * 100_000
    protocol.resume_writing()
    await writing


def test_exc_sentinel_is_the_default_of_set_exception():
    default = signature(client_proto.ResponseHandler.set_exception).parameters["exc_cause"].default
    assert default is helpers._EXC_SENTINEL


async def test_server_disconnected_error_message_is_text_only_if_no_answer_had_begun(parts):
    """The worst behaviour to lose: it decides whether a POST, which costs money, is sent again."""
    for pieces, answered in (((), False), ((OK,), True), ((OK + b"Content-Le",), True)):
        protocol = received(*pieces)
        protocol.connection_lost(None)
        error = protocol.exception()
        assert isinstance(error, aiohttp.ServerDisconnectedError)
        assert isinstance(error.message, str) is not answered
        assert parts.broke_before_answer(error) is not answered


# -- other behaviours that are relied upon ----------------------------------------------------------------------------


async def test_behaviour_connect_takes_proxy_authorization_from_the_proxys_url(parts):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    made = parts.PartsConnector()
    proxy = URL(f"http://u:p@127.0.0.1:{server.sockets[0].getsockname()[1]}")
    target = parts.ConnectTarget(URL("http://provider.example/v1"), proxy)
    parts.abort(await made.connect_new(target))
    assert target.headers["Proxy-Authorization"] == "Basic dTpw"
    await made.close()
    server.close()


async def test_behaviour_feed_data_gives_no_message_of_data_with_an_error():
    made, _ = parser()
    with pytest.raises(http.HttpProcessingError):
        made.feed_data(HEAD + b"Content-Length: 0\r\n\r\nno HTTP at all\r\n\r\n")


async def test_behaviour_feed_data_stops_after_each_message_so_that_an_error_behind_it_takes_none_away():
    made, _ = parser(max_msg_queue_size=1)
    messages, _, _ = made.feed_data(HEAD + b"Content-Length: 0\r\n\r\nno HTTP at all\r\n\r\n")
    assert len(messages) == 1
    made.message_consumed()
    with pytest.raises(http.HttpProcessingError):
        made.feed_data(b"")


async def test_behaviour_a_message_that_is_consumed_before_its_body_counts_for_ever():
    """If this fails, `RequestProtocol.feed` need not wait for the body before it continues."""
    for early, parsed in ((False, 2), (True, 1)):
        made, _ = parser(max_msg_queue_size=2)
        made.feed_data(HEAD + b"Content-Length: 1\r\n\r\n")
        if early:
            made.message_consumed()
        made.feed_data(b"x")
        if not early:
            made.message_consumed()
        assert len(made.feed_data(2 * (HEAD + b"Content-Length: 0\r\n\r\n"))[0]) == parsed


async def test_behaviour_a_read_resumes_reading_and_can_parse_more(parts):
    """Why `resume_reading` does nothing without a pause, and `_Delivery.on_data` ignores a call from inside itself."""
    resumed = []

    class Counting(parts.ResponseProtocol):
        def resume_reading(self, resume_parser=True):
            resumed.append(self._reading_paused)
            super().resume_reading(resume_parser)

    protocol = Counting(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(read_until_eof=True, read_bufsize=16)
    protocol.data_received(OK + b"Content-Length: 200\r\n\r\n" + b"x" * 10)
    _, body = await protocol.read()
    body.read_nowait()
    assert resumed == [False]
    protocol.data_received(b"x" * 190)
    assert not protocol.transport.reading
    size = 0
    while not body.at_eof():
        size += len(body.read_nowait())
    assert size == 190 and True in resumed and protocol.transport.reading


# -- behaviours that are corrected: a test that fails here says that a correction is no longer needed -----------------


async def test_correction_trailers_become_headers_of_the_next_request():
    made, _ = parser()
    made.feed_data(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    made.feed_data(b"0\r\nX-Trailer: t\r\n\r\n")
    (((message, _),), _, _) = made.feed_data(HEAD + b"Content-Length: 0\r\n\r\n")
    assert "X-Trailer" in message.headers


async def test_correction_drain_helper_leaves_a_cancelled_waiter(parts):
    _, protocol = parser()
    ours = parts.RequestProtocol(asyncio.get_running_loop(), buffer_bytes=1024, max_pipelined=1)
    ours.connection_made(Transport())
    for one, drain in ((protocol, protocol._drain_helper), (ours, ours.drain)):
        one.pause_writing()
        waiting = asyncio.ensure_future(drain())
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    assert protocol._drain_waiter.cancelled()
    assert ours._drain_waiter is None


@pytest.mark.parametrize("ours", [False, True])
async def test_correction_a_reset_looks_like_the_end_of_an_answer_without_a_length(parts, ours):
    protocol = received(OK + b"\r\nabc")
    if ours:
        protocol = parts.ResponseProtocol(asyncio.get_running_loop())
        protocol.connection_made(Transport())
        protocol.set_response_params(read_until_eof=True)
        protocol.data_received(OK + b"\r\nabc")
    _, body = await protocol.read()
    protocol.connection_lost(ConnectionResetError(104, "reset"))
    assert isinstance(body.exception(), aiohttp.ClientPayloadError) is ours


@pytest.mark.parametrize("ours", [False, True])
async def test_correction_the_reader_of_a_body_that_stops_being_http_gets_no_error(parts, ours):
    protocol = (parts.ResponseProtocol if ours else client_proto.ResponseHandler)(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(read_until_eof=True)
    protocol.data_received(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    _, body = await protocol.read()
    protocol.data_received(b"zz\r\n")
    assert isinstance(body.exception(), aiohttp.ClientPayloadError) is ours


# -- the file itself --------------------------------------------------------------------------------------------------


def test_no_other_file_imports_an_undocumented_part():
    """Documented: what `aiohttp` and `aiohttp.web` export, except `EMPTY_PAYLOAD` and names with an underscore."""
    for path in FOLDER.glob("*.py"):
        if path.name == "aiohttp_parts.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names if alias.name.startswith("aiohttp")}
                assert found <= {"aiohttp"}, path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiohttp"):
                names = {alias.name for alias in node.names}
                assert node.module == "aiohttp" and names <= set(aiohttp.__all__) | {"web"}, path
                assert "EMPTY_PAYLOAD" not in names, path


def test_the_table_names_each_part_that_is_used(parts):
    """A part that the code names, and the docstring does not, would be used without being listed."""
    tree = ast.parse(Path(parts.__file__).read_text())
    table = parts.__doc__
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiohttp"):
            for alias in node.names:
                assert alias.name in table, alias.name
    own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in _own_names(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert node.attr in own or node.attr in table, node.attr


def _own_names(node):
    """The private names that a class of ours defines."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner.name
        if isinstance(inner, ast.Assign) and any(
            isinstance(one, ast.Name) and one.id == "__slots__" for one in inner.targets
        ):
            yield from ast.literal_eval(inner.value)
