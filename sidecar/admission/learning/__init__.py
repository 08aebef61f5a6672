"""What is learned from verdicts: one dimension of one provider account and model at a time."""
