"""Maps names to backend classes. It imports a backend's module, with its heavy libraries, only on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_CLASSES = {
    "dashscope": ("backends.remote.backend", "DashScopeBackend"),
    "local": ("backends.local", "LocalBackend"),
    "simulated": ("backends.simulated", "SimulatedBackend"),
}

#: The names that the setting `SIDECAR_BACKEND` accepts.
NAMES = tuple(_CLASSES)


def backend_class(name: str) -> Any:
    """Import and return the class of a backend. Each class has its own constructor arguments.

    Raises `KeyError` for a name that is not in `NAMES`.
    """
    module, name = _CLASSES[name]
    return getattr(import_module(module), name)
