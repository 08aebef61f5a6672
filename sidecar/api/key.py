"""The key of the fair queue, from the header that `SIDECAR_KEY_HEADER` names."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import lru_cache

from backends.forwarded_headers import holds_secret
from sidecar.api.errors import InvalidRequest

#: Characters of the longest key. A longer one is a mistake.
MAX_KEY_CHARS = 256
#: Makes the hashes of this process different from those of any other, so that nobody can try passwords against a hash.
_SALT = secrets.token_bytes(16)


def fair_queue_key(headers: Mapping[str, str], header: str) -> str:
    """Return the key of a request; "" without the header. Raises `InvalidRequest` that names the header.

    The key of a header that holds a secret, such as `Authorization`, is a short hash of the value. So the secret is
    neither in `/status` nor on the page nor in a log line. The same value always gives the same key while the process
    runs.
    """
    key = headers.get(header, "")
    if key and _is_hashed(header):
        return f"hash-{_short_hash(key)}"
    if len(key) > MAX_KEY_CHARS:
        raise InvalidRequest(f"{header} must be at most {MAX_KEY_CHARS} characters, not {len(key)}", field=header)
    return key


@lru_cache(16)
def _is_hashed(header: str) -> bool:
    return holds_secret(header)


def _short_hash(value: str) -> str:
    return hashlib.blake2b(value.encode(errors="surrogateescape"), digest_size=6, key=_SALT).hexdigest()
