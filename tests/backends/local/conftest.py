"""A tiny real model for the tests of the local backend, built once per session, and control over its decode loop."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

from pathlib import Path

import pytest
from local_calls import Tap
from real_parts import real_packages

from backends.local import LocalBackend


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """Build a tiny model of a family, once per session, and return its folder."""
    real_packages("torch", "torchvision", "transformers", "PIL", how_to_get_them="`make .venv/.local` installs them")
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
    """Each family of models."""
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
