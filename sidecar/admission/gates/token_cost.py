"""What a request costs in LLM tokens: estimated before it is sent, and better with each that the provider counted."""

from __future__ import annotations

#: LLM tokens of an answer until one was seen.
USUAL_OUTPUT = 100.0


class TokenCost:
    """The input as tickets tell it, corrected by what was counted, and an answer of usual length."""

    __slots__ = ("_correction", "_counted", "_output", "_told")

    def __init__(self) -> None:
        self._output = USUAL_OUTPUT
        self._told = self._counted = 0.0  # input as it was estimated and as it was counted, smoothed
        self._correction = 1.0

    def of(self, tokens: float, requests: float = 1) -> float:
        """LLM tokens that so many requests will take, which tell so many of input in all."""
        return tokens * self._correction + requests * self._output

    def counted(self, told: float, input_tokens: int, output_tokens: int) -> None:
        """A request that told so many was counted."""
        self._output += (0.1 if self._told else 1.0) * (output_tokens - self._output)
        # The ratio of the means, and not the mean of the ratios: large requests count for what they cost.
        self._told = 0.9 * self._told + told
        self._counted = 0.9 * self._counted + input_tokens
        if self._told > 0:
            self._correction = self._counted / self._told
