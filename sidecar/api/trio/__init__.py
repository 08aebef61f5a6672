"""trio-core's inference API, so that its callers need no change."""
