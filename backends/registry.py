"""Name → backend class. A backend's module, and what is heavy in it, is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_CLASSES = {
    "dashscope": ("backends.remote.backend", "DashScopeBackend"),
    "local": ("backends.local", "LocalBackend"),
    "simulated": ("backends.simulated", "SimulatedBackend"),
}

#: What `SIDECAR_BACKEND` may name.
NAMES = tuple(_CLASSES)


def backend_class(name: str) -> Any:
    """Give the class of a backend; each takes arguments of its own. Raises `KeyError` for a name not in `NAMES`."""
    module, name = _CLASSES[name]
    return getattr(import_module(module), name)
