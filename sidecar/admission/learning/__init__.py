"""Learn the limits from verdicts: one learner for each dimension of one account and model."""
