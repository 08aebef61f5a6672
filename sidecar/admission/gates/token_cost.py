"""Estimate the cost of a request in LLM tokens before it is sent. Each count that a provider reports improves it."""

from __future__ import annotations

#: Assumed LLM tokens of an answer until the first answer was counted.
USUAL_OUTPUT = 100.0


class TokenCost:
    """Input as tickets estimate it, times a correction learned from the provider's counts, plus an average answer."""

    __slots__ = ("_counted", "_told", "correction", "output")

    def __init__(self) -> None:
        self.output = USUAL_OUTPUT
        self._told = self._counted = 0.0  # input tokens: estimated by tickets, counted by the provider; both smoothed
        self.correction = 1.0

    def of(self, tokens: float, requests: float = 1) -> float:
        """Return the LLM tokens that `requests` requests will use; `tokens` is their total estimated input."""
        return tokens * self.correction + requests * self.output

    def counted(self, told: float, input_tokens: int, output_tokens: int) -> None:
        """Learn from one request: its estimated input `told`, and the provider's counts of input and output tokens."""
        self.output += (0.1 if self._told else 1.0) * (output_tokens - self.output)
        # The ratio of the means, not the mean of the ratios: so a request has weight in proportion to its size.
        self._told = 0.9 * self._told + told
        self._counted = 0.9 * self._counted + input_tokens
        if self._told > 0:
            self.correction = self._counted / self._told
