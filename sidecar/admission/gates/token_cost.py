"""Estimate the cost of a request in LLM tokens before it is sent. Each count that a provider reports improves it."""

from __future__ import annotations

#: Assumed LLM tokens of an answer until the provider has counted the first answer.
USUAL_OUTPUT = 100.0
#: A count that differs from its estimate by a larger factor says nothing about other requests: its media were not what
#: their headers say.
_MAX_RATIO = 20
#: LLM tokens that a provider may add to any request, for example the words of a chat template.
_ADDED = 1000


class TokenCost:
    """cost = estimated input x correction + average output, in LLM tokens.

    Tickets contain the estimated input. Correction and average output come from the provider's counts.
    """

    __slots__ = ("_counted", "_estimated", "correction", "output")

    def __init__(self) -> None:
        self.output = USUAL_OUTPUT
        # Smoothed sums of input tokens: as tickets estimate them, and as the provider counts them.
        self._estimated = self._counted = 0.0
        self.correction = 1.0

    def of(self, tokens: float, requests: float = 1) -> float:
        """Return the LLM tokens that `requests` requests will use; `tokens` is their total estimated input."""
        return tokens * self.correction + requests * self.output

    def learn(self, estimated: float, input_tokens: int, output_tokens: int) -> None:
        """Learn from one request: its `estimated` input, and the provider's counts of input and output LLM tokens."""
        self.output += (0.1 if self._estimated else 1.0) * (output_tokens - self.output)
        if estimated > _MAX_RATIO * max(input_tokens, 1) or input_tokens > _MAX_RATIO * estimated + _ADDED:
            return
        # A ratio of sums, not a mean of ratios: the weight of a request is proportional to its size.
        self._estimated = 0.9 * self._estimated + estimated
        self._counted = 0.9 * self._counted + input_tokens
        if self._estimated > 0:
            self.correction = self._counted / self._estimated
