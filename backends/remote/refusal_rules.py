"""The rules by which a provider's error is read, in their order. The words and codes are in `refusal_table.py`.

A message can quote the request, and a caller could write the words of a refusal into it. Therefore words count only at
statuses that can mean such a refusal, never inside quotes, URLs and file names, never where the error names a field of
the request, and never if the request contains the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import cast

from backends.remote import refusal_table as table
from backends.remote.error_bodies import ErrorFacts
from backends.remote.refusal_table import ABOUT_THE_REQUEST, Meaning, plain

#: Kinds that a long period can hide behind: OpenAI's type `requests` beside "requests per day".
_RATES = ("request_rate", "token_rate", "unknown")

#: Seconds. With a shorter wait, "check your plan and billing details" does not mean money.
_WAIT_WITHOUT_MONEY = 3600.0
#: Statuses at which words about money count; also inside a 200.
_MONEY_STATUSES = (400, 402, 403, 412, 429)
#: Statuses that no failure over the request's content has. At a 500, for example, the words may be quoted.
_SURE_LOAD = (429, 503, 529)
_QUOTED = re.compile(
    r"(?<!\w)'[^'\n]{0,1500}'(?!\w)|\"[^\"]{0,1500}\"|`[^`]{0,1500}`|“[^”]{0,1500}”|‘[^’]{0,1500}’|「[^」]{0,1500}」"
    r"|\b(?:https?|file|oss|s3|data):\S+|\S{1,80}\.(?:jpe?g|png|gif|webp|bmp|tiff?|mp[34]|wav|mov|avi|txt|pdf|json|ya?ml)\b"
)
#: What follows these words in a message about the request is the request's own text.
_THEN_QUOTES = re.compile(
    r"\b(?:got|given|received|input|value|prompt|content|messages?|text|url|file|filename|path|image)s?\s*[:=].*",
    re.DOTALL,
)
#: The same for a failure while the request was processed.
_FAILED_ON = re.compile(
    r"\b(?:got|given|received|input|value|prompt|content|text|url|filename|image)s?\s*[:=].*", re.DOTALL
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
_ACTUAL_AND_LIMIT = re.compile(
    r"(requests?|tokens?)(?: per |/)(second|minute|hour|day)s? \(actual/limit\):? *([\d.,]*\d)/([\d.,]*\d)"
)
_CURRENT_AND_LIMIT = re.compile(
    r"current (rpm|tpm|max parallel requests): (\d+), (?:\1 limit|max parallel requests): (\d+)"
)
_LIMIT = re.compile(r"(?:limit|allowed|maximum)[: ]+(\d[\d,]*)")
_REQUESTED = re.compile(r"requested[: ]+(\d[\d,]*)")
#: A provider's number inside a message: MiniMax's "insufficient balance (1008)".
_NUMBER_IN_TEXT = re.compile(r"\((\d{4,6})\)")
_AFFORD = re.compile(r"can only afford (\d[\d,]*)")
_POLICY = re.compile(r'"([^"]*)"[^,]*?;\s*(?:q=\d+\s*;\s*)?w=(\d+)')
_LONG_WINDOW = 3600
#: Facts of one kind in a message that are read.
_FACTS = 4
#: Characters of a header that are searched.
_HEADER_LIMIT = 300
#: Headers of Kong, Cerebras, SambaNova and Mistral that name their window.
_REMAINING = re.compile(r"ratelimit-remaining-(?:[a-z]+-)?(second|minute|hour|day|month)$")
_SHORT_WINDOWS = ("second", "minute")
#: Searches in one request. A message that agrees with it more often quotes it.
_SEARCHES = 16
_ESCAPE = re.compile(rb"\\u([0-9A-Fa-f]{4})")
#: Escapes in a request that are replaced. With more, each word counts as a word of the request.
_ESCAPES = 20_000
#: An image, or another medium, inside a request. It holds no words.
_MEDIUM = re.compile(rb";base64,[A-Za-z0-9+/=_-]{256,}")
#: Bytes of a request, without its media, that are searched. Of a longer one, each word counts as a word of the request:
#: 13 MB of spaces would block the event loop for half a second.
_SEARCHED_BYTES = 512 * 1024
#: The only other letter that becomes an ASCII letter in lower case.
_KELVIN = "\u212a".encode()
#: What stands between two words in a request: nothing (`isOverdue`), `_`, or white space, which JSON may escape.
_BETWEEN_WORDS = (
    rb"(?:[\s_\x1c-\x1f]|\\[nrtfb]|\xc2[\x85\xa0]|\xe1\x9a\x80"
    rb"|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80){0,64}"
)
_ESCAPED = (b'"', b"/", b"\\\\")


def without_quotes(text: str) -> str:
    """Return a text without what stands in quotes, and without URLs and file names: those may be the caller's."""
    return _QUOTED.sub(" ", text)


class Rules:
    """The rules, applied to one error."""

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        facts: ErrorFacts,
        text: str,
        *,
        wait: float | None,
        request_body: bytes,
    ) -> None:
        self.status = status
        self.headers = headers
        self.facts = facts
        self.text = text
        """All the words, in lower case. They are used for numbers and for the rates of a 429."""
        self.wait = wait
        self.codes = [plain(code) for code in facts.codes]
        self.code_words = [_CAMEL.sub(" ", code).lower().strip() for code in facts.codes]
        bare = without_quotes(text)
        prose = {code.lower() for code in facts.codes}
        for code in self.code_words:
            if " " in code and code not in prose:  # a message that begins with its code says nothing by that
                bare = bare.replace(code, " ")
        if status in ABOUT_THE_REQUEST:
            bare = _THEN_QUOTES.sub(" ", bare)
        elif status >= 500 and status not in _SURE_LOAD:
            bare = _FAILED_ON.sub(" ", bare)
        self.words = bare
        """The words that can be the provider's."""
        window = table.NAMED_SHORT_WINDOW.search(self.words)
        self._window_end = window.end() if window else None
        """Where the first short window in the words ends."""
        self._request = request_body
        self._lower_request: bytes | None = None
        self._searches = 0
        self.numbers_in_words = self._numbers_in_words()
        """Numbers in parentheses, which some providers put into their messages instead of a code."""
        self.words_known = True
        """False after `decide` if no rule knew the code or the words, and the status does not say enough."""

    def decide(self) -> tuple[Meaning, str]:
        """Return the meaning and the rule."""
        for rules in (self._own_fault, self._machine_facts, self._codes, self._people, self._load):
            for found in rules():
                return found
        meaning, rule = self._by_status()
        # An invalid request and a failure have words of any kind; a limit, money or the key have words that recur.
        self.words_known = (self.status in ABOUT_THE_REQUEST and meaning == "rejected") or (
            self.status >= 500 and meaning == "server"
        )
        return meaning, rule

    # -- the rules, in their order -------------------------------------------------------------------------------------

    def _own_fault(self) -> Iterator[tuple[Meaning, str]]:
        status, text = self.status, self.text
        match = _AFFORD.search(text)
        if match and _int(match[1]) > 0 and (status in (402, 429) or status < 400):
            yield "too_large", "the credit suffices for a smaller request: 'can only afford M' with M > 0"
        limit, requested = _LIMIT.search(text), _REQUESTED.search(text)
        if limit and requested and 400 <= status < 500 and _int(requested[1]) > _int(limit[1]):
            yield "too_large", "Requested N is above Limit M, read as numbers"
        if status == 429 or (status < 400 and self._throttles()):
            # Anthropic's ordinary 429 advises to "reduce the prompt length … or try again later".
            if self.wait is None and self._proven(table.SURELY_TOO_LARGE) and not table.PASSES.search(self.words):
                yield "too_large", "words: the request is too large for the limit"
            for code in self._each_code():
                if code in table.SURELY_TOO_LARGE_CODES:
                    yield "too_large", f"code {code}"
        elif status in (400, 413, 422) or status < 400:
            if self._proven(table.TOO_LARGE):
                yield "too_large", "words: the request is too large"
            for code in self._each_code():
                if table.CODES.get(code) == "too_large":
                    yield "too_large", f"code {code}"

    def _machine_facts(self) -> Iterator[tuple[Meaning, str]]:
        headers = self.headers
        names = " ".join(self.facts.quota_names)
        spelled = _CAMEL.sub(" ", names).lower()
        if re.search(r"\bper (day|week|month|hour)\b|\b1 (d|h)\b", spelled):
            yield "quota_period", "the quota's name says per day (or hour, week, month)"
        if re.search(r"\bper (minute|min|second|sec)\b|\b1 (min|s)\b", spelled):
            tokens = "token" in spelled
            yield ("token_rate" if tokens else "request_rate"), "the quota's name says per minute (or second)"
        if headers.get("x-envoy-overloaded"):
            yield "concurrency", "header x-envoy-overloaded: Envoy's bound for requests at the same time"
        if self.status == 429:
            if headers.get("x-envoy-ratelimited"):
                yield "request_rate", "header x-envoy-ratelimited"
            if headers.get("x-amzn-errortype", "").startswith("LimitExceededException"):
                yield "quota_period", "header x-amzn-errortype: the usage plan's quota"
            named = f"{headers.get('rate_limit_type', '')} {headers.get('policy-id', '')}".lower()
            for part, kind in (("token", "token_rate"), ("parallel", "concurrency"), ("request", "request_rate"),
                               ("call", "request_rate")):  # fmt: skip
                if part in named.replace("ratelimit", ""):
                    yield cast("Meaning", kind), "header rate_limit_type or policy-id"
            windows = {
                match[1] in _SHORT_WINDOWS
                for name, value in headers.items()
                if value == "0" and (match := _REMAINING.search(name))
            }
            if windows == {False}:
                yield "quota_period", "a header says that nothing remains of an hour's, a day's or a month's quota"
        used_up = re.findall(r'"([^"]*)"\s*;\s*r=0\b', headers.get("ratelimit", "")[:_HEADER_LIMIT])
        for name, window in _POLICY.findall(headers.get("ratelimit-policy", "")[:_HEADER_LIMIT]):
            if name in used_up and int(window) >= _LONG_WINDOW:
                yield "quota_period", "header ratelimit-policy: the window of the used-up policy is an hour or more"
        if not self._may_state_facts():
            return
        reached = [
            (match[1], match[2])
            for match in islice(_ACTUAL_AND_LIMIT.finditer(self.words), _FACTS)
            if _int(match[3]) >= _int(match[4]) and not self._quotes(match[0])
        ]
        if any(window in ("hour", "day") for _, window in reached):
            yield "quota_period", "(actual/limit): a/b with a >= b"
        for name, _ in reached:
            yield ("token_rate" if name.startswith("token") else "request_rate"), "(actual/limit): a/b with a >= b"
        for match in islice(_CURRENT_AND_LIMIT.finditer(self.words), _FACTS):
            if _int(match[2]) >= _int(match[3]) and not self._quotes(match[0]):
                kinds: dict[str, Meaning] = {"rpm": "request_rate", "tpm": "token_rate"}
                yield kinds.get(match[1], "concurrency"), "current a, limit b with a >= b"

    def _codes(self) -> Iterator[tuple[Meaning, str]]:
        found: list[tuple[Meaning, str]] = []
        for field, number in [*self.facts.numbers, *(("text", number) for number in self.numbers_in_words)]:
            numbers = table.NUMBERS.get(field, table.NUMBERS["code"])
            if number in numbers:
                found.append((numbers[number], f"number {number} in {field}"))
        if self.status in (401, 402, 403) and "insufficientquota" in self.codes:
            found.append(("billing", "code insufficient_quota: these statuses mean no rate"))
        found += [(table.CODES[code], f"code {code}") for code in self._each_code() if code in table.CODES]
        found += [
            (words.meaning, f"words in the code: {words.meaning}")
            for code in self.code_words
            for words in (*table.CODE_WORDS, *self._weak_code_words())
            if words.pattern.search(code)
        ]
        heads = (code.partition(".")[0] for code in self.codes)  # `InvalidParameter.ImageSize`
        found += [("own_fault", f"code {head}.…") for head in heads if table.CODES.get(head) == "own_fault"]
        for meaning, rule in found:
            if self._allowed(meaning):
                yield self._refined(meaning, rule)

    def _weak_code_words(self) -> list[table.Words]:
        return [
            words
            for words in table.WEAK_CODE_WORDS
            if self.status < 400 or self.status in table.WEAK_STATUSES[words.meaning]
        ]

    def _people(self) -> Iterator[tuple[Meaning, str]]:
        """Money, content inspection, the key and long periods, by words."""
        status, inside_200 = self.status, self.status < 400
        if status in (402, 429) and self._proven(table.BEFORE_MONEY):
            yield "concurrency", "words: a budget of requests in progress"
        if status == 402:
            yield "billing", "status 402"
        if status in _MONEY_STATUSES or inside_200:
            if rule := self._first(table.MONEY):
                yield rule
            google = any(code == "resourceexhausted" for code in self.codes) or bool(self.facts.quota_names)
            patient = self.wait is not None and self.wait < _WAIT_WITHOUT_MONEY
            if not google and not patient and self._proven(table.WEAK_MONEY):
                yield "billing", "words: billing details"
        if (status in (400, 403, 451) or inside_200) and self._proven(table.MODERATED):
            yield "moderated", "words: content inspection"
        if status == 401:
            yield "unauthorized", "status 401"
        if status in (400, 403) and (rule := self._first(table.KEY)):
            yield rule
        if status in (403, 429, 498) or inside_200:
            yield from self._period()
        if status == 403 and not self._throttles() and self._proven(table.QUOTA_403):
            yield "quota_period", "words: a quota is used up, as 403"
        if (status in _MONEY_STATUSES or inside_200) and self._proven(table.FREE_QUOTA):
            yield "billing", "words: the free quota is used up"

    def _period(self) -> Iterator[tuple[Meaning, str]]:
        if rule := self._first(table.PERIOD):
            yield rule
        match = table.WINDOW_SECONDS.search(self.words)
        if match and int(match[1]) >= _LONG_WINDOW and not self._is_hint(match):
            yield "quota_period", "words: a window of an hour or more, in seconds"

    def _load(self) -> Iterator[tuple[Meaning, str]]:
        """Limits and overload, by words: only at statuses and codes that can mean them."""
        status = self.status
        if not (self._throttles() or status >= 500 or status < 400):
            return

        def found(pattern: re.Pattern[str], words: str) -> bool:
            match = pattern.search(words)
            return match is not None and (status in _SURE_LOAD or not self._quotes(match[0]))

        # The harmless kinds of a 429 may be decided by quoted words too: Google quotes the names of its own quotas.
        for words in (self._before_hints(), self.words, self.text) if status == 429 else (self.words,):
            if found(table.CONCURRENCY, words):
                yield "concurrency", "words: too many at the same time, or a full queue"
            if found(table.GROWTH, words):
                yield "growth", "words: the load rose too quickly"
            if found(table.CAPACITY, words):
                yield "capacity", "words: overloaded, busy or loading"
            tokens, requests = found(table.TOKENS, words), found(table.REQUESTS, words)
            if tokens and not requests:
                yield "token_rate", "words: LLM tokens per time"
            if requests and not tokens:
                yield "request_rate", "words: requests per time"
            if found(table.SHORT_WINDOW, words) and not tokens:
                yield "request_rate", "words: a limit per minute or second"

    def _by_status(self) -> tuple[Meaning, str]:
        status = self.status
        if self._throttles():
            return "unknown", "a limit that is not named: status 429, or a code of throttling"
        if status == 529:  # "overloaded" at Anthropic and at gateways that imitate it
            return "capacity", "status 529"
        if status == 498:
            return "unknown", "status 498"
        if status == 503 and (self.headers.get("retry-after") or self.headers.get("retry-after-ms")):
            return "capacity", "status 503 with Retry-After"
        if 400 <= status < 500 and status not in (408, 424, 425):  # 424: TGI's failure during the generation
            return "rejected", f"status {status}"
        return "server", f"status {status}" if status >= 400 else "an error inside a 200 that names no reason"

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _each_code(self) -> Iterator[str]:
        for code in self.codes:
            yield code
            if "." in code:
                yield code.rpartition(".")[2]
        yield plain(self.headers.get("x-amzn-errortype", "").partition(":")[0])

    def _throttles(self) -> bool:
        """Return whether status or code say that some limit refused the request; at 403 and inside a 200 also words."""
        if self.status == 429:
            return True
        if self.status >= 500:
            return False
        if (self.status == 403 or self.status < 400) and self._proven(table.THROTTLED):
            return True
        pattern = table.SURE_THROTTLING_CODE if self.status in ABOUT_THE_REQUEST else table.THROTTLING_CODE
        return any(pattern.search(code) for code in self.code_words)

    def _allowed(self, meaning: Meaning) -> bool:
        """Return whether a code can have this meaning at this status."""
        status = self.status
        if meaning in ("moderated", "own_fault", "too_large"):
            return status < 500 and (meaning == "moderated" or status != 429)
        if meaning == "unauthorized":
            return status < 500 and status != 429
        if meaning == "capacity":
            return status not in ABOUT_THE_REQUEST and status not in (401, 402, 403)
        if meaning in ("request_rate", "token_rate", "growth", "concurrency", "quota_period"):
            return status not in (401, 402, 404, 413, 422)
        return True

    def _refined(self, meaning: Meaning, rule: str) -> tuple[Meaning, str]:
        """Return the meaning of a code together with its message, where the code alone is not exact."""
        if meaning == "token_rate" and self._about_money():
            return "billing", f"{rule}, with words about money"
        if (
            meaning in ("token_rate", "billing")
            and "insufficientquota" in self.codes
            and table.CAPACITY.search(self.words)
        ):
            return "capacity", f"{rule}, with words about load: a gateway has replaced the message"
        if meaning in _RATES:
            for period in self._period():
                return period
        return meaning, rule

    def _about_money(self) -> bool:
        """Return whether a code of a quota means that the account has no money left.

        OpenAI sends `insufficient_quota` with the text "You exceeded your current quota, please check your plan and
        billing details" for an empty account. DashScope sends the same code and the same text for tokens per minute.
        DashScope's error differs in three ways: it has a `request_id` beside the error, its text contains a link to
        DashScope's help, and its code begins with `Throttling`. A gateway may keep only one of them (oh-my-pi #8496).
        """
        if table.FREE_QUOTA.search(self.text):
            return True
        if self.status >= 500 or not (self._first(table.MONEY) or self._proven(table.WEAK_MONEY)):
            return False
        if self.facts.has_request_id or any(code.startswith("throttling") for code in self.codes):
            return False
        return re.search("model-studio|aliyun|alibabacloud", self.text) is None

    def _first(self, words: tuple[table.Words, ...]) -> tuple[Meaning, str] | None:
        for line in words:
            if self._proven(line.pattern):
                return line.meaning, f"words: {line.meaning}"
        return None

    def _proven(self, pattern: re.Pattern[str]) -> bool:
        """Return whether the provider's own words match: see the module's docstring."""
        match = pattern.search(self.words)
        if match is None or (pattern in table.LASTING and self._is_hint(match)):
            return False
        if self.status not in ABOUT_THE_REQUEST and self.status >= 400 and self.status != 403:
            return True
        return not self._quotes(match[0])

    def _is_hint(self, match: re.Match[str]) -> bool:
        """Return whether words about money or a long period are a hint beside a short limit, which was named before.

        "10 per minute. (Your plan also allows 1000 requests per day.)"
        """
        return self._window_end is not None and self._window_end <= match.start() and self._throttles()

    def _before_hints(self) -> str:
        """Return the words up to the short window that was named first if hints follow, else all words."""
        matches = (pattern.search(self.words) for pattern in table.LASTING) if self._window_end is not None else ()
        hinted = any(match is not None and self._is_hint(match) for match in matches)
        return self.words[: self._window_end] if hinted else self.words

    def _may_state_facts(self) -> bool:
        """Return whether numbers inside the message can be the provider's own: only where it speaks of a limit."""
        return self.status < 400 or self.status in (403, 429) or self.status >= 500

    def _numbers_in_words(self) -> list[int]:
        if not self._may_state_facts():
            return []
        found = dict.fromkeys(_NUMBER_IN_TEXT.findall(self.words))
        known = [number for number in found if int(number) in table.NUMBERS["text"]]
        return [int(number) for number in known if not self._quotes(f"({number})")]

    def _quotes(self, words: str) -> bool:
        """Return whether the message may be about a field of the request, or whether the words are the request's."""
        if self.facts.param or any(table.CODES.get(code) == "own_fault" for code in self._each_code()):
            return True
        return self._request_has(words)

    def _request_has(self, words: str) -> bool:
        """Return whether the request contains the words, however their white space and letters were written.

        In the words, white space is one space, and identifiers are split: see `refusals`.
        """
        if not self._request:
            return False
        self._searches += 1
        if self._searches > _SEARCHES:
            return True
        if self._searches == 1:
            self._lower_request = _lower(self._request)
        request = self._lower_request
        # Where a quote was taken out of the message, more than one space is left: the request has the quote there.
        return request is None or all(
            _spelling(part).search(request) for part in re.split(r"\s{2,}", words.strip()) if part
        )


def _lower(request: bytes) -> bytes | None:
    """Return a request in lower case, without media and escapes such as `\\u0062`; None if it is too long to search."""
    if len(request) > _SEARCHED_BYTES:
        request = _MEDIUM.sub(b";base64,", request)
        if len(request) > _SEARCHED_BYTES:
            return None
    if b"\\u" in request:
        if request.count(b"\\u") > _ESCAPES:
            return None
        request = _ESCAPE.sub(lambda match: chr(int(match[1], 16)).encode("utf-8", "surrogatepass"), request)
    return request.lower().replace(_KELVIN, b"k")


def _spelling(words: str) -> re.Pattern[bytes]:
    """Return a pattern of all the spellings, in a JSON request, that become these words in a message."""
    parts = []
    for word in words.split():
        spelled = (re.escape(letter.encode("utf-8", "replace")) for letter in word)
        parts.append(b"".join(rb"\\?" + letter if letter in _ESCAPED else letter for letter in spelled))
    return re.compile(_BETWEEN_WORDS.join(parts))


def _int(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0
