"""A simulated provider with hidden quotas. It runs as a backend in this process, or as an HTTP server."""

from backends.simulated.backend import SimulatedBackend
from backends.simulated.profile import Profile, add_arguments, changed, profile_from
from backends.simulated.provider import Counts, Provider
from backends.simulated.quota import Quota
from backends.simulated.server import PROVIDER, serve

__all__ = [
    "PROVIDER",
    "Counts",
    "Profile",
    "Provider",
    "Quota",
    "SimulatedBackend",
    "add_arguments",
    "changed",
    "profile_from",
    "serve",
]
