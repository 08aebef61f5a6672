"""From a ticket to its answer: the permit, the attempts, and what a failed attempt means."""
