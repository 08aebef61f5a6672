"""Fetch small files over HTTP with aiohttp's documented client: one GET, no redirect, a bounded size."""

from __future__ import annotations

import aiohttp
from yarl import URL


class Downloads:
    """Fetches files. The session is created at the first fetch, because most processes fetch no file."""

    def __init__(self, *, timeout_seconds: float) -> None:
        """`timeout_seconds` is the limit of one fetch, from the connection to the last byte."""
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def get(self, url: URL, *, max_bytes: int) -> tuple[int, bytes]:
        """Return the status and the body. Raises `HttpError`, `TimeoutError`.

        The body is empty if the status is not 200. Of a body that is longer than `max_bytes`, only a part is returned.
        This part is always longer than `max_bytes`, so the caller can see that the body is too long. A redirect is not
        followed, because it could lead to any address.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar())
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return response.status, b""
            data = await response.content.read(max_bytes + 1)
            while len(data) <= max_bytes and (more := await response.content.read(max_bytes)):
                data += more
            return response.status, data

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
