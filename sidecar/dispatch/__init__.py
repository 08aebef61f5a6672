"""Carries a ticket to its answer: gets the permit, makes the attempts and decides what follows a failed attempt."""
