"""A tiny real model for the tests of the local backend, built once per session, and control over its decode loop."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from local_calls import Tap

from backends.local import LocalBackend

_GET_TORCH = (
    "torch and transformers are not installed in this environment. `make test` installs them; or by hand, the CPU "
    "build: pip install torch transformers pillow (README, 'Developing')"
)


def _need_torch() -> None:
    """Skip the test with a message if torch is not installed. In CI, fail instead."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return
    if os.environ.get("CI"):
        pytest.fail(_GET_TORCH)
    pytest.skip(_GET_TORCH)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """Build a tiny model of a family, once per session, and return its folder."""
    _need_torch()
    from backends.local.tiny import build

    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("models") / family
            build(family, folders[family])
        return folders[family]

    return folder


@pytest.fixture(params=["idefics3", "llava", "qwen2_5_vl"])
def family(request):
    """Each family of models. Qwen's processor needs torchvision, whose import fails with some CPU builds of torch."""
    if request.param == "qwen2_5_vl":
        pytest.importorskip("torchvision", reason="Qwen-VL's processor needs torchvision", exc_type=Exception)
    return request.param


@pytest.fixture
def tap(model_of, monkeypatch):
    """A `Tap`. At the end it allows all steps, so that no thread stays blocked."""
    from backends.local.model import VisionModel

    tapped = Tap(VisionModel.generate)
    monkeypatch.setattr(
        VisionModel,
        "generate",
        lambda *call: tapped.generate(*call),  # noqa: PLW0108 - only a function gets the model as `self`
    )
    yield tapped
    tapped.allow(10**6)


@pytest.fixture
async def serve(model_of):
    """Start backends with `await serve(max_batch=1)`. They are closed at the end of the test."""
    started: list[LocalBackend] = []

    async def start(family: str = "idefics3", queued=lambda: 0, **options) -> LocalBackend:
        batches: list[int] = []
        backend = LocalBackend(str(model_of(family)), queued=queued, on_batch=batches.append, **options)
        started.append(backend)
        backend.batches = batches
        await backend.start()
        backend.batches.clear()
        return backend

    yield start
    for backend in started:
        await backend.close()
