"""The headers that are forwarded: from the caller to the provider, and from the provider to the caller.

Both are allow-lists. So `Set-Cookie`, credentials, hop-by-hop headers, lengths, encodings and any header that a gateway
may add in the future are not forwarded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import unquote_plus

from backends.http1.headers import canonical_name

#: `HTTP-Referer` and `X-Title` name the caller's program at OpenRouter.
_TO_PROVIDER = frozenset({"traceparent", "tracestate", "http-referer", "x-title"})
#: Where a word begins inside a name: `apiKey`, `APIKey`, `X-Api-Key`, `api_key`.
_WORD_BEGINS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: Names, as lower-case words with hyphens, that hold a secret. Those of the first line may also be the end of a word
#: (`apikey`, `idtoken`). `session` alone or with an id is a secret, `session-cache` is not.
_SECRET_NAME = re.compile(
    r"(?:key|token|(?:secret|passw(?:or)?d|passphrase|cookie|credential|signature)s?|auth|jwt)\d*(?:-|$)"
    r"|(?:^|-)(?:authorization|authentication|sig|pwd|pass)\d*(?:-|$)"
    r"|session(?:-?id)?$"
)
_TO_PROVIDER_PREFIXES = ("x-dashscope-",)
_TO_CALLER = frozenset({"content-type", "content-language", "request-id", "traceparent", "retry-after"})
#: Not `x-ratelimit-` and the like: they describe the whole account, which the sidecar shares among all cameras. A
#: camera's client would throttle itself by them.
_TO_CALLER_PREFIXES = ("x-dashscope-", "openai-")
#: Headers in which providers send their own id of a request, the preferred one first.
_REQUEST_IDS = (
    "x-request-id", "x-dashscope-request-id", "apim-request-id", "x-amzn-requestid", "x-siliconcloud-trace-id",
    "request-id", "x-ms-request-id", "x-generation-id", "x-trace-id", "cf-ray",
)  # fmt: skip
#: Those of them whose value callers get for an accepted answer, where every microsecond counts.
_USUAL_REQUEST_IDS = _REQUEST_IDS[:5]
#: The name under which callers get that id: `X-Request-Id` is the caller's own.
UPSTREAM_REQUEST_ID = "X-Upstream-Request-Id"
_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")
#: An id of hexadecimal digits, such as a UUID, perhaps behind a known word: `req_011f…`, `chatcmpl-9a…`.
_HEX_ID = re.compile(r"(?:(?:req|chatcmpl|cmpl|gen|resp|msg)[_-])?([0-9a-f-]{1,64})")
#: Bytes in a row that are letters, digits or punctuation. A random UUID has so many in one case of 300; text in
#: hexadecimal has more.
_TEXT_IN_HEX = re.compile(rb"[ -~]{8}")


def to_provider(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's headers that the provider gets. A value that is not ASCII is left out."""
    return {name: value for name, value in headers.items() if _goes_to_provider(name) and value.isascii()}


def query_to_provider(query: str) -> str:
    """Return the query of the caller's URL without parameters that hold a secret, for example `api-version=2024-10-21`.

    `;` separates parameters like `&`, because some servers read it so.
    """
    if not query:
        return ""
    parts = (";".join(one for one in part.split(";") if not _is_secret(one)) for part in query.split("&"))
    return "&".join(part for part in parts if part)


def _is_secret(parameter: str) -> bool:
    return holds_secret(unquote_plus(parameter.partition("=")[0]))


def holds_secret(name: str) -> bool:
    """Return whether a header or a parameter of a URL with this name holds a secret, such as `X-Api-Key` or `sig`."""
    return _SECRET_NAME.search(_WORD_BEGINS.sub("-", name).strip("-").lower()) is not None


def to_caller(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the provider's headers that the caller gets: content type, request id and the provider's own headers.

    The names are spelled `Like-This`, so that a header of the sidecar can replace one of the provider. The provider's
    request id gets the name `X-Upstream-Request-Id`.
    """
    return {name: value for given, value in headers.items() if (name := _name_for_caller(given)) is not None}


def upstream_request_id(headers: Mapping[str, str]) -> str:
    """Return the provider's own id of the request; empty if it sent none that is a plain token."""
    ids = {name: value for given, value in headers.items() if (name := given.lower()) in _REQUEST_IDS}
    return next((value for name in _REQUEST_IDS if _ID.fullmatch(value := ids.get(name, ""))), "")


def is_public_id(request_id: str) -> bool:
    """Return whether a provider's request id may be logged: it is hexadecimal and contains no text."""
    found = _HEX_ID.fullmatch(request_id)
    if found is None:
        return False
    digits = found[1].replace("-", "")
    return not any(
        _TEXT_IN_HEX.search(bytes.fromhex(digits[start:][: (len(digits) - start) // 2 * 2])) for start in (0, 1)
    )


@lru_cache(512)
def _goes_to_provider(name: str) -> bool:
    return name.lower() in _TO_PROVIDER or (name.lower().startswith(_TO_PROVIDER_PREFIXES) and not holds_secret(name))


@lru_cache(512)
def _name_for_caller(given: str) -> str | None:
    name = given.lower()
    if name in _USUAL_REQUEST_IDS:
        return UPSTREAM_REQUEST_ID
    return canonical_name(given) if name in _TO_CALLER or name.startswith(_TO_CALLER_PREFIXES) else None
