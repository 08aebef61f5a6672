"""The sidecar's own key is found in a provider's error in every form in which a provider quotes keys."""

from __future__ import annotations

import base64
import random
import string
from urllib.parse import quote

import pytest

from backends.forwarded_headers import is_public_id
from backends.remote.key_traces import has_traces
from backends.remote.public_words import is_public_code, public_header

LETTERS = string.ascii_letters + string.digits


def keys() -> list[str]:
    rng = random.Random(19)
    return ["sk-" + "".join(rng.choices(LETTERS, k=length)) for length in (17, 32, 33, 61)]


@pytest.mark.parametrize("key", keys())
def test_a_key_is_found_whole_cut_and_encoded(key):
    for part in (key, key[:9], key[-8:], key[5:16], key[2:14]):
        for before in ("", "a", "ab"):
            encoded = base64.b64encode(f"{before}{part} is wrong".encode()).decode()
            assert has_traces(key, f"x {part} y")
            assert has_traces(key, " ".join(part[::-1]))
            assert len(part) < 11 or has_traces(key, encoded.rstrip("=")), (part, before)
    assert has_traces(key, "".join(f"\\\\u{ord(letter):04X}" for letter in key))
    assert has_traces(key, "".join(f"\\x{ord(letter):02x}" for letter in key))
    assert has_traces(key, "".join(f"&#x{ord(letter):x};" for letter in key))
    assert has_traces(key, quote("".join(f"%{ord(letter):02X}" for letter in key)))
    assert has_traces(key, key.encode().hex().upper())
    assert has_traces(key, f"{key[:8]}***{key[-8:]}")


def test_other_texts_and_words_as_keys_are_not_found():
    text = "Incorrect API key provided: empty or simulated; see https://platform.example/account/api-keys."
    for key in (*keys(), "EMPTY", "simulated", "none"):
        assert not has_traces(key, text)
        assert not has_traces(key, "".join(random.Random(5).choices(LETTERS, k=20_000)))


@pytest.mark.parametrize(
    "code",
    [
        "limit_requests", "Throttling.RateQuota", "ModelAccountTpmRateLimitExceeded",
        "InternalError.Algo.InvalidParameter",
        "rate_limit_exceeded", "API_KEY_INVALID", "RESOURCE_EXHAUSTED", "1302", "336501", "Arrearage",
        "InternalServerError",
        "FailedOperation.ResourcePackExhausted", "BadRequestError", "too_many_requests_error", "unsupported_parameter",
        "InvalidParameter.DataInspection", "model_not_found", "server_error", "PERMISSION_DENIED",
        "AccountOverdueError",
    ],
)  # fmt: skip
def test_codes_of_providers_are_public(code):
    assert is_public_code(code)


@pytest.mark.parametrize(
    "code",
    [
        "", "sk-error", "WhatIsInTheYard", "c2VydmVyX2Vycm9y", "4915123456789", "limit_requests_limit_" * 4, "limit\n",
        "l-i-m",
    ],
)  # fmt: skip
def test_other_codes_are_not_public(code):
    assert not is_public_code(code)


def test_headers_keep_known_words_and_stay_different():
    assert public_header("x-ratelimit-limit-requests") == "x-ratelimit-limit-requests"
    assert public_header("x-ai-ratelimit-limit-30-azure") == "x-ai-ratelimit-limit-30-azure"
    names = [public_header(f"x-ai-ratelimit-limit-60-{text}") for text in ("yard", "street", "yard")]
    assert names[0] == names[2] != names[1]
    assert not any("yard" in name or "street" in name for name in names)


def test_an_id_is_logged_if_it_is_hexadecimal_and_holds_no_text():
    assert is_public_id("3f1c9a52-77de-9b0e-a2c4-f08d11e2b6aa")
    assert is_public_id("req_011fc9a5277de9b0ea2c4f08d11e2b6aa")
    for text in ("", "up-9", "sk-abc", "what-is-in-the-yard", b"in the yard".hex(), "a" + b"in the yard".hex()):
        assert not is_public_id(text)
