"""Fetches the images of a request. Data URLs are always allowed, other URLs only if the operator allowed them.

Without this rule, a caller could use the sidecar to read the pod's network and files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from urllib.request import url2pathname

from yarl import URL

from backends.base import Rejected
from backends.http1.downloads import Downloads
from backends.http1.errors import HttpError
from backends.local.prompts import ImageUrl, invalid

#: Bytes of the largest image that is fetched. It equals the default limit of a request's body.
_MAX_BYTES = 14 * 1024 * 1024
#: Seconds that a fetch may take. A camera's snapshot takes less than a second.
_TIMEOUT_SECONDS = 10.0


class ImageSources:
    """Fetches images whose URL is below one of the `allowed` URLs, such as `https://host/folder/` or `file:///folder/`."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """Check and store the allowed URLs.

        Raises `ValueError` if a scheme is not http, https or file, or if an http(s) URL has no host.
        """
        self._allowed = [URL(url) for url in allowed]
        for url in self._allowed:
            if url.scheme not in {"http", "https", "file"} or (url.scheme != "file" and not url.host):
                raise ValueError(f"images may be allowed from http://, https:// or file:/// URLs, not {url}")
        self._downloads = Downloads(timeout_seconds=_TIMEOUT_SECONDS)

    async def fetch(self, images: Sequence[ImageUrl]) -> dict[str, bytes]:
        """Fetch all images that are not data URLs. Returns their bytes by the field that contains the URL.

        Raises `Rejected` with the field of an image that cannot be fetched.
        """
        return {image.field: await self._one(image) for image in images if not image.url.startswith("data:")}

    async def close(self) -> None:
        """Close the connections."""
        await self._downloads.close()

    async def _one(self, image: ImageUrl) -> bytes:
        try:
            url = URL(image.url)
        except ValueError:
            raise invalid("is not a URL", image.field) from None
        if url.scheme == "file":
            folders = [url2pathname(base.path) for base in self._allowed if base.scheme == "file"]
            return await asyncio.to_thread(_read, url2pathname(url.path), folders, image.field)
        if any(_is_below(url, base) for base in self._allowed):
            return await self._download(url, image.field)
        raise _not_allowed(image.field)

    async def _download(self, url: URL, field: str) -> bytes:
        try:
            status, data = await self._downloads.get(url, max_bytes=_MAX_BYTES)
        except (HttpError, TimeoutError) as error:
            raise invalid(f"could not be fetched ({type(error).__name__})", field) from error
        if status != 200:
            raise invalid(f"could not be fetched: status {status}", field)
        return _bounded(data, field)


def _is_below(url: URL, base: URL) -> bool:
    """Return whether `url` is `base` or below it. `yarl` has already resolved each `..` that was not encoded."""
    if url.scheme != base.scheme or url.host != base.host or url.port != base.port or url.user is not None:
        return False
    return ".." not in url.parts and (url.path == base.path or url.path.startswith(base.path.rstrip("/") + "/"))


def _read(name: str, folders: list[str], field: str) -> bytes:
    path = Path(name).resolve()  # resolves links and `..`
    if not any(path.is_relative_to(Path(folder).resolve()) for folder in folders):
        raise _not_allowed(field)
    try:
        if not path.is_file():  # a read from a pipe or a device might never end
            raise invalid("there is no such file", field)
        with path.open("rb") as file:
            return _bounded(file.read(_MAX_BYTES + 1), field)
    except OSError as error:
        raise invalid(f"could not be read ({type(error).__name__})", field) from error


def _not_allowed(field: str) -> Rejected:
    return invalid("images are taken as data URLs (data:image/jpeg;base64,…); this source is not allowed", field)


def _bounded(data: bytes, field: str) -> bytes:
    if len(data) > _MAX_BYTES:
        raise invalid(f"is larger than {_MAX_BYTES} bytes", field)
    return data
