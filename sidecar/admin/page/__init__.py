"""The live page: three files that the admin listener serves as they are. No build step, nothing from elsewhere."""
