"""Properties are tried on the same examples in every run, and without a limit on real time."""

from hypothesis import settings

settings.register_profile("admission", deadline=None, derandomize=True)
settings.load_profile("admission")
