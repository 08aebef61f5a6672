"""The collected answers of real providers, if they lie beside the checkout, in `../shared/vocabulary.jsonl`.

    python tests/backends/remote/test_vocabulary.py      # the share that is read as wanted, and each other answer

The file is not a part of this repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from answer_readings import meaning_of, wait_of
from real_parts import platform_lacks

from backends.base import BackendError
from backends.remote.answers import StreamWatch, judge
from backends.remote.error_bodies import lenient_json
from backends.remote.refusals import classify

FILE = Path(__file__).parents[4] / "shared" / "vocabulary.jsonl"
SHARE = 0.95


def reading_of(entry: dict[str, Any]) -> BackendError | None:
    body = entry["body"] if isinstance(entry["body"], str) else json.dumps(entry["body"], ensure_ascii=False)
    raw = body.encode()
    if entry.get("where") == "stream":
        watch = StreamWatch()
        watch.feed(raw)
        watch.end()
        return watch.failure
    if entry["status"] < 400:
        return classify(0, entry["headers"], raw) if judge(lenient_json(raw), is_chat=True) == "error" else None
    return classify(entry["status"], entry["headers"], raw)


def misread(entries: list[dict[str, Any]]) -> list[str]:
    """Return one line for each answer whose kind, or whose wait, is not read as wanted."""
    lines = []
    for entry in entries:
        want = entry["want"]
        error = reading_of(entry)
        meaning = "accepted" if error is None else {"server": "transient"}.get(meaning_of(error), meaning_of(error))
        wait = None if error is None else wait_of(error)
        asked = want["retry_after_s"]
        right_wait = asked is None or (wait is not None and abs(wait - asked) <= max(0.01, 0.02 * asked))
        if meaning not in (want["kind"], *want["also_ok"]) or not right_wait:
            lines.append(f"{entry['id']}: {meaning}, {wait} s; wanted {want['kind']}, {asked} s")
    return lines


def read_file() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def test_the_collected_answers_are_read_as_wanted():
    if not FILE.exists():
        platform_lacks("../shared/vocabulary.jsonl is not beside this checkout")
    entries = read_file()
    lines = misread(entries)
    assert len(lines) <= (1 - SHARE) * len(entries), "\n".join(lines)


if __name__ == "__main__":
    collected = read_file()
    wrong = misread(collected)
    print(*wrong, f"{len(collected) - len(wrong)} of {len(collected)} are read as wanted", sep="\n")  # noqa: T201
