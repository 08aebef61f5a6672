"""trio-core's inference API: callers of trio-core can use the sidecar without a change."""
