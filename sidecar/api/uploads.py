"""DashScope's upload policy, which allows a client to send a file to DashScope's storage.

The official SDK asks for it when a message names a local file. The SDK then sends the file to the storage itself, and
the message with the address of the file (`oss://…`) through the sidecar.
"""

from __future__ import annotations

from backends.http1.interface import Answer
from sidecar.admission import NO_MODEL
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.dispatch.dispatcher import DeadlineExceeded

#: The path below the base of the native API.
PATH = "/uploads"
#: Seconds for a policy. DashScope answers in less than one.
_MAX_SECONDS = 10.0
#: Bytes of the longest policy. Those of DashScope have about 1,500 bytes.
_MAX_BYTES = 64 * 1024


async def upload_policy(call: Call) -> Answer:
    """Answer `GET /api/v1/uploads` with DashScope's answer. It is no generation, so that it uses no learned limit."""
    require_native_api(call, "; an image can be sent inside a request, as a data URL")
    try:
        return await call.forward(
            "native",
            PATH,
            b"",
            model=NO_MODEL,
            tokens=0.0,
            stream=False,
            method="GET",  # also for a HEAD: DashScope may not answer that one
            max_seconds=_MAX_SECONDS,
            max_answer_bytes=_MAX_BYTES,
        )
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"no upload policy came within {_MAX_SECONDS:g} s: ask again") from error


def require_native_api(call: Call, advice: str = "") -> None:
    """Raise `InvalidRequest` if no backend passes on the paths of DashScope's own API. `advice` ends the message."""
    if call.settings.no_native_api:
        raise InvalidRequest(
            f"only DashScope's own API answers {call.http.raw_path.partition('?')[0][:200]}, and "
            f"{call.settings.no_native_api}{advice}",
            status=404,
            code="not_found",
        )
