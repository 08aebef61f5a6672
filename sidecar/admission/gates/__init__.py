"""The conditions that can delay a ticket: one file for each gate."""
