"""Hours of traffic in seconds: the real admission and dispatch around the simulated provider, on a virtual clock."""
