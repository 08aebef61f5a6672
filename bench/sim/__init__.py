"""Run hours of traffic in seconds: the real admission and dispatch with the simulated provider, in virtual time."""
