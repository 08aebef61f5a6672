"""Decides which words of a provider everybody may see: in `/status`, in the log, and in the errors of other callers.

A provider can quote a request, a picture or a key wherever it can write, and in any encoding. So nothing is searched
for: a code, a media type or the name of a header is shown only if it consists of known words or of digits.
Everything else is for the caller of the request only.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from functools import lru_cache

from backends.remote.refusal_table import CODE_SPELLINGS

#: Characters of the longest code that is shown, and the digits that it may contain. The longest number that a provider
#: uses as a code has six digits (Baidu).
_MAX_CHARACTERS, _MAX_DIGITS = 64, 6
_CODE = re.compile(r"[A-Za-z0-9_.:/ -]+")
#: Splits `ModelAccountTpmRateLimitExceeded`, `API_KEY_INVALID` and `Throttling.RateQuota` into words.
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
#: Words of codes, types and headers that providers document, beside those of the codes in `refusal_table.py`.
_WORDS = frozenset(
    """
    a abort aborted above access account accounts active actual algo aliyun allocated allocation allowed
    already an and anthropic any api apikey app application arrearage arrears at attempt auth authentication
    authorization available azure backend bad balance base base64 batch be billing blocked body budget burst
    busy by call calls cancelled capacity channel charge check chunk client cloud code completion completions
    concurrency concurrent conflict connection connections consumer content context cost could count country
    credential credentials credit credits current daily dashscope data day days deactivated deadline decode
    deepseek default delete denied depleted deployment deprecated detail disabled does down download due
    duplicate duration edge empty enabled encoding endpoint engine enough entity entry error errors exceed
    exceeded exceeds exception exec execution exhausted expired external failed failure fair fast feature
    field file files filter flight flow forbidden format found free frequency frequent from frozen full
    function funds gateway global growth guard guardrail hard has header high hour hourly http id illegal
    image images in inactive inappropriate incorrect inference inflight input inspection instance insufficient
    internal invalid invocation io ip is json key large length level limit limited limiter limits lists llm
    loading local location locked login long malformed many max maximum media mediatype member memory message
    messages method minute missing mode model models moderation month monthly multimodal name network new no
    not null object of on only openai operation org organization out output over overdue overflow overload
    overloaded pack package paid param parameter parameters parse part path pay payload payment peak pending
    per period permission plan policy post postpaid precondition prepaid preview process project prompt
    provider provisioned proxy purchased qpm qps queue quota range rate ratelimit rates reached read ready
    reason refused region rejected remaining req request requested requests required reset resource resources
    response responsible result retry risk route router rpd rpm safety schema second seconds security
    sensitive server servers service serving session set size slow speed spend spending stale state status
    stop storage stream streaming string sub subscription support supported suspended syntax system tasks team
    temporarily temporary tenant territory the throttle throttled throttling throughput tier time timed
    timeout to today token tokens too tool tpd tpm traffic trial type unable unauthenticated unauthorized
    unavailable unexpected unhandled unknown unpaid unprocessable unpurchased unsupported up upstream url
    usage used user valid validation value verification version video vision wait wallet week weekly window
    with work worker workspace wrong x year zone
    """.split()  # noqa: SIM905
) | frozenset(word.lower() for code in CODE_SPELLINGS for word in _BETWEEN_WORDS.split(code) if word)
_SPELLINGS = frozenset(code.lower() for code in CODE_SPELLINGS)
_MEDIA_TYPES = frozenset(
    {
        "application/json", "application/octet-stream", "application/problem+json", "application/x-ndjson",
        "application/xml", "text/event-stream", "text/html", "text/plain", "text/xml",
    }
)  # fmt: skip
#: Makes the hashes of this process different from those of any other, so that nobody can try words against them.
_SALT = secrets.token_bytes(16)


@lru_cache(256)
def is_public_code(code: str) -> bool:
    """Return whether a provider's code consists of known words, with at most `_MAX_DIGITS` digits."""
    if code.lower() in _SPELLINGS:
        return True
    if len(code) > _MAX_CHARACTERS or _CODE.fullmatch(code) is None:
        return False
    words = [word for word in _BETWEEN_WORDS.split(code) if word]
    digits = sum(len(word) for word in words if word.isdigit())
    return digits <= _MAX_DIGITS and all(word.isdigit() or word.lower() in _WORDS for word in words)


def public_media_type(content_type: str) -> str:
    """Return a usual media type as it is, and any other one as "an unusual Content-Type"."""
    return content_type if content_type in _MEDIA_TYPES else "an unusual Content-Type"


def public_header(name: str) -> str:
    """Return the name of a header in lower case, with a short hash in place of each part that is no known word.

    Different names stay different. A hash is the same while the process runs.
    """
    digits = 0
    parts = re.split(r"([-_])", name)
    for index, part in enumerate(parts):
        if part.isdecimal() and digits + len(part) <= _MAX_DIGITS:
            digits += len(part)
        elif part not in _WORDS and part not in ("", "-", "_"):
            parts[index] = "hash" + hashlib.blake2b(part.encode(), digest_size=4, key=_SALT).hexdigest()
    return "".join(parts)
