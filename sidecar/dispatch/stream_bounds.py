"""The bounds of a stream's time: until its first content, between two pieces of content, and as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from backends.base import Progress


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The bounds that apply to a stream, in seconds."""

    idle_seconds: float = 30.0
    """The longest time without content after the first content."""
    max_seconds: float = 600.0
    """The longest duration of a stream, from the moment at which the caller gets its head."""
    ends_at_deadline: bool = False
    """The request's deadline is the caller's own budget for the whole stream.

    Otherwise the deadline holds until the first content.
    """


class StreamBounds:
    """Decides when one running stream must end."""

    __slots__ = ("_began", "_deadline", "_progress", "_settings")

    def __init__(self, settings: StreamSettings, progress: Progress | None, *, began: float, deadline: float) -> None:
        """`began` is the loop time at which the stream began, `deadline` that of the request.

        `progress` None: the backend does not say when content comes, so only the duration is bounded.
        """
        self._settings = settings
        self._progress = progress
        self._began = began
        self._deadline = deadline

    @property
    def has_content(self) -> bool:
        """Whether content has come."""
        return self._progress is None or self._progress.content_at is not None

    def next_look(self, now: float) -> float:
        """Return the loop time at which the stream must end, or an earlier one at which to call this again.

        The time is not after `now` if the stream must end now. So each piece of content costs no timer.
        """
        end, _ = self._end()
        # Content may come right after this look, and nothing after it.
        return end if end <= now else min(end, now + self._settings.idle_seconds)

    def reason(self, name: str) -> str:
        """Return why the stream of the upstream `name` has ended, and what changes this."""
        match self._end()[1]:
            case "idle":
                seconds, advice = self._settings.idle_seconds, "read the stream steadily, or raise SIDECAR_STREAM_IDLE"
                return f"no content came from {name} to the caller for {seconds:g} s: {advice}"
            case "max":
                seconds = self._settings.max_seconds
                return f"the stream from {name} took longer than {seconds:g} s: raise SIDECAR_STREAM_MAX"
            case _:
                return ""

    def _end(self) -> tuple[float, str]:
        settings = self._settings
        end, bound = self._began + settings.max_seconds, "max"
        if (settings.ends_at_deadline or not self.has_content) and self._deadline <= end:
            end, bound = self._deadline, "deadline"
        if self._progress is not None and self._progress.content_at is not None:
            idle_until = self._progress.content_at + settings.idle_seconds
            if idle_until < end:
                end, bound = idle_until, "idle"
        return end, bound
