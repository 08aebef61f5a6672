"""`vlm-sidecar top`: a live view of a running sidecar in the terminal, updated every second. Standard library only.

It reads `/events` of the admin listener, so it works with any host and through `kubectl port-forward`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from sidecar.observe.format import duration, number, visible

_SPARKS = "▁▂▃▄▅▆▇█"
#: Seconds that a current value is averaged over, and seconds before the next try after a lost connection.
_RECENT_SECONDS, _RETRY_SECONDS = 10, 1.0
_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34"}

Paint = Callable[[str, str], str]


class View:
    """The data received from `/events` so far."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.status: dict[str, Any] = start["status"]
        self._fields = {field: at for at, field in enumerate(start["fields"])}
        self._points = {name: deque(series["recent"], maxlen=300) for name, series in start["history"].items()}

    def tick(self, event: dict[str, Any]) -> None:
        """Add the data of a `tick` event."""
        self.status = event["status"]
        for name, point in event["points"].items():
            self._points[name].append(point)

    def series(self, backend: str, field: str, *, rate: bool = False) -> list[float]:
        """Return the values of one field, one per point; with `rate`, per second."""
        at, span = self._fields[field], self._fields["span"]
        return [(point[at] or 0.0) / (point[span] or 1.0 if rate else 1.0) for point in self._points[backend]]

    def recent(self, backend: str, field: str, *, rate: bool = False) -> float:
        """Return the mean of a field over the last `_RECENT_SECONDS`."""
        last = self.series(backend, field, rate=rate)[-_RECENT_SECONDS:]
        return sum(last) / len(last) if last else 0.0

    def causes(self, backend: str) -> dict[str, float]:
        """Return the mean number of waiting requests in the last minute, by the cause of the wait."""
        means = {}
        for field in self._fields:
            if field.startswith("waiting."):
                last = self.series(backend, field)[-60:]
                means[field.removeprefix("waiting.")] = sum(last) / len(last) if last else 0.0
        return means


def top(host: str, port: int) -> int:
    """Show a sidecar until the user quits. If stdout is no terminal, print the view once. Return the exit status."""
    where = f"{host}:{port}"
    if not sys.stdout.isatty():
        try:
            with contextlib.closing(events(host, port)) as received:
                print("\n".join(render(View(next(received)), width=100)))
        except (OSError, http.client.HTTPException, StopIteration) as error:
            print(f"vlm-sidecar: no sidecar answers on {where}: {_reason(error)}", file=sys.stderr)
            return 1
        return 0
    with contextlib.suppress(KeyboardInterrupt), _screen():
        while True:
            try:
                _show(host, port)
            except (OSError, http.client.HTTPException, StopIteration) as error:
                _draw([f"no sidecar answers on {where}: {_reason(error)}", "", "looking again every second; q leaves"])
                time.sleep(_RETRY_SECONDS)
    return 0


def _show(host: str, port: int) -> None:
    paint = painter()
    with contextlib.closing(events(host, port)) as received:
        view = View(next(received))
        while True:
            size = shutil.get_terminal_size()
            _draw(render(view, width=size.columns, paint=paint)[: size.lines - 1])
            view.tick(next(received))


def events(host: str, port: int) -> Generator[dict[str, Any]]:
    """Yield the data of each event of `/events`. Raises `OSError` or `HTTPException` if no sidecar answers."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/events")
        response = connection.getresponse()
        if response.status != 200:
            raise ConnectionError(response.read(200).decode(errors="replace").strip() or f"status {response.status}")
        while line := response.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        connection.close()


# -- rendering ---------------------------------------------------------------------------------------------------------


def painter() -> Paint:
    """Return the function that colours text: without colours if `NO_COLOR` is set to any value (no-color.org)."""
    return _plain if os.environ.get("NO_COLOR") else _coloured


def _plain(text: str, colour: str) -> str:
    del colour
    return text


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def render(view: View, *, width: int, paint: Paint = _plain) -> list[str]:
    """Return the whole view as lines of at most `width` characters."""
    status = view.status
    state = "ready" if status["ready"] else status["reason"]
    head = f"vlm-sidecar {status['version']}  up {duration(status['uptime_seconds'])}  "
    lines = [paint(_cut(head, width), "bold") + paint(_cut(state, width), "green" if status["ready"] else "red")]
    if status["simulated"]:
        lines.append(paint(_cut("SIMULATED: answers of the backend 'simulated' are made up", width), "yellow"))
    for backend in status["backends"]:
        lines += ["", *_backend(view, backend, width, paint)]
    if status["throttles"]:
        seen = [
            f"{duration(entry['seconds_ago'])} ago {entry['count']} x {entry['kind']}" for entry in status["throttles"]
        ]
        lines += ["", _cut("  refusals   " + " · ".join(seen), width)]
    return lines


def _backend(view: View, backend: dict[str, Any], width: int, paint: Paint) -> Iterator[str]:
    name = backend["name"]
    models = backend["models"]
    if not models:
        yield _cut(f"{name}  nothing was asked yet", width)
    for model in models[:3]:
        colour = "red" if model["hold"] else "yellow" if model["bound_by"] else "green"
        yield paint(_cut(f"{name} {model['model']}", width), "bold")
        for line in textwrap.wrap(visible(model["in_words"]), width - 2)[:4]:  # the most important line for an operator
            yield paint(f"  {line}", colour)
    yield ""
    by_priority = backend["queue"]["by_priority"]
    learned = [model["requests"]["learned"] for model in models]
    limit = "unknown" if not any(learned) else f"{sum(value or 0.0 for value in learned):.3g}/s"
    waits = " · ".join(f"{count} {priority}" for priority, count in by_priority.items() if count)
    cells = (
        ("sent", "sent", True, f"learned limit {limit}", "green"),
        ("refused", "refused", True, f"{sum(view.series(name, 'refused')):.0f} in 5 min", "red"),
        ("tokens", "input_tokens", True, "input a second", "blue"),
        ("in flight", "in_flight", False, "", "green"),
    )
    room = _bar_width(width)
    for label, field, rate, note, colour in cells:
        value = view.recent(name, field, rate=rate)
        spark = sparkline(view.series(name, field, rate=rate), room)
        yield _row(width, label, number(value) + ("/s" if rate else ""), paint(spark, colour), note)
    waiting = [
        sum(at) for at in zip(*(view.series(name, f"waiting.{cause}") for cause in view.causes(name)), strict=True)
    ]
    yield _row(width, "waiting", number(backend["queue"]["requests"]), paint(sparkline(waiting, room), "yellow"), waits)
    yield ""
    yield from _shares(view, name, width, paint)
    queues = [
        f"{visible(queue['key']) or '(no key)'} {queue['requests']} (since {queue['oldest_seconds']:.1f} s)"
        for model in models
        for queue in model["longest_queues"]
    ]
    if queues:
        yield ""
        yield _cut("  queues     " + " · ".join(queues[:12]), width)


def _row(width: int, label: str, value: str, bar: str, note: str) -> str:
    left = width - 26 - _bar_width(width)
    return f"  {label:12} {value:>7}  {bar}  {note if len(note) <= left else ''}".rstrip()


def _bar_width(width: int) -> int:
    """Return the width of a bar in a line of this width. The notes beside the bars have priority."""
    return max(min(width - 54, 60), 10)


def _shares(view: View, name: str, width: int, paint: Paint) -> Iterator[str]:
    """Yield lines about how the time of a request is divided, and about the causes of waiting."""
    room = _bar_width(width)
    ended = view.recent(name, "answered")
    parts = {
        part: view.recent(name, f"{part}_seconds") / ended if ended else 0.0 for part in ("queue", "lock", "upstream")
    }
    longest = max(parts.values()) or 1.0
    for part, seconds in parts.items():
        note = f"an answer, last {_RECENT_SECONDS} s" if part == "queue" else ""
        yield _row(width, part, f"{seconds:.2f} s", paint(bar(seconds / longest, room), "blue"), note)
    causes = {cause: mean for cause, mean in view.causes(name).items() if mean >= 0.01}
    total = sum(causes.values())
    if causes:
        yield ""
    for cause, mean in sorted(causes.items(), key=lambda item: -item[1]):
        yield _row(
            width, cause, f"{mean / total:.0%}", paint(bar(mean / total, room), "yellow"), f"{mean:.1f} wait for it"
        )


def sparkline(values: list[float], width: int) -> str:
    """Return the last `width` values as block characters. The highest of them has full height."""
    last = values[-width:]
    highest = max(last, default=0.0) or 1.0
    return "".join(_SPARKS[min(int(value / highest * 7.999), 7)] if value > 0 else " " for value in last).rjust(width)


def bar(share: float, width: int) -> str:
    """Return a bar that fills `share` (0 to 1) of the width."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return ("█" * filled).ljust(width, "·")


def _cut(text: str, width: int) -> str:
    text = visible(text)
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


# -- the terminal ------------------------------------------------------------------------------------------------------


def _draw(lines: list[str]) -> None:
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Use the terminal's alternate screen and restore the terminal at the end.

    `q` raises `KeyboardInterrupt`, like Ctrl-C.
    """
    import termios  # noqa: PLC0415  not available on every system, and only needed for a terminal
    import tty  # noqa: PLC0415

    keyboard = sys.stdin.isatty()
    before = termios.tcgetattr(sys.stdin) if keyboard else None
    try:
        if keyboard:
            tty.setcbreak(sys.stdin)
            threading.Thread(target=_leave_on_q, daemon=True).start()
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _leave_on_q() -> None:
    """Send SIGINT when `q` is pressed, like Ctrl-C. The signal interrupts the main thread even while it waits."""
    while keys := os.read(sys.stdin.fileno(), 64):
        if b"q" in keys.lower():
            os.kill(os.getpid(), signal.SIGINT)
            return


def _reason(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "it has ended"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
