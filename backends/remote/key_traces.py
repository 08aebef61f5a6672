"""Finds the sidecar's own key in what a provider sends: whole or cut, escaped, in base64, hexadecimal, or reversed.

A caller gets the provider's error as it is, but never a part of the key in it.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from urllib.parse import unquote

#: Characters (letters and digits) of the shortest part of a key that is found, and of the shortest key that is secret
#: at all: servers without keys take words such as `EMPTY`, and answers contain these words.
_PART, _SHORTEST_KEY = 8, 12
#: Every second part is searched for, so that a part of `_PART` + 1 characters contains one of them.
_STEP = 2
_ESCAPE = re.compile(r"\\+(?:u|U0000|x)\{?([0-9a-fA-F]{2,4})\}?|&#(?:x([0-9a-fA-F]{1,4})|([0-9]{1,5}));")
_NO_LETTER = re.compile(r"[^a-z0-9]+")


def has_traces(key: str, text: str) -> bool:
    """Return whether a text contains the key or a part of it of at least 9 letters and digits, or its first or last 8.

    Everything else in the text is ignored: spaces, stars, characters without width. A text that contains the beginning
    that many keys have, such as `sk-proj-`, counts too. A key shorter than 12 letters and digits is never found.
    """
    parts = _parts(key)
    if not parts:
        return False
    for _ in range(2):  # an error inside an error is escaped twice
        text = _ESCAPE.sub(_unescaped, unquote(text, errors="replace"))
    plain = _letters(text)
    return any(part in plain for part in parts)


def _unescaped(found: re.Match[str]) -> str:
    digits = found[1] or found[2]
    return chr(int(digits, 16) if digits else int(found[3]))


def _letters(text: str) -> str:
    return _NO_LETTER.sub("", text.lower())


@lru_cache(4)
def _parts(key: str) -> frozenset[str]:
    """Return the texts to search for: parts of each spelling of the key."""
    plain = _letters(key)
    if len(plain) < _SHORTEST_KEY:
        return frozenset()
    data = key.encode()
    spellings = [plain, plain[::-1]]
    for before in range(3):  # what stands before the key shifts its base64
        encoded = base64.b64encode(bytes(before) + data).decode()
        # The characters at both ends depend on the neighbours, too.
        spellings.append(_letters(encoded[-(-before * 4 // 3) : (before + len(data)) * 4 // 3]))
    parts = {
        spelling[start : start + _PART]
        for spelling in spellings
        for start in (*range(0, len(spelling) - _PART, _STEP), len(spelling) - _PART)
    }
    digits = data.hex()
    parts |= {digits[start : start + 2 * _PART] for start in range(0, len(digits) - 2 * _PART + 1, 2)}
    return frozenset(parts | {_letters(key[:_PART]), _letters(key[-_PART:])})
