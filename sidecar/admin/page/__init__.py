"""The live page: three static files that the admin listener serves. No build step, no external resources."""
