"""Loading: what is told about folders that cannot be served, about missing packages, and while it takes its time."""
# ruff: noqa: PLC0415 - torch and PIL are imported where they are known to be there

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from local_calls import until

from backends.base import BackendError, Unreachable
from backends.local import LocalBackend
from backends.local import backend as backend_module


@pytest.fixture
def broken(model_of, tmp_path):
    """A copy of a model's folder, to be broken."""
    return shutil.copytree(model_of("idefics3"), tmp_path / "copy")


async def refusal(model: object, **options) -> str:
    backend = LocalBackend(str(model), **options)
    with pytest.raises(BackendError) as caught:
        await backend.start()
    assert backend.ready_reason() is not None
    await backend.close()
    return caught.value.message


async def test_a_folder_that_is_not_there_is_named(model_of, tmp_path):
    model_of("idefics3")
    assert await refusal(tmp_path / "none") == f"there is no model folder {tmp_path / 'none'}"


async def test_a_folder_of_something_else_is_told(model_of, tmp_path):
    model_of("idefics3")
    assert "no config.json" in await refusal(tmp_path)


async def test_a_language_model_without_vision_is_told(broken):
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is a llama model, not a vision-language model" in await refusal(broken)


async def test_a_folder_without_image_processor_is_told(broken):
    (broken / "processor_config.json").unlink()
    assert "damaged" in await refusal(broken)


async def test_a_model_without_chat_template_is_told(broken):
    (broken / "chat_template.jinja").unlink()
    assert "no chat template" in await refusal(broken)


async def test_a_broken_configuration_is_told(broken):
    (broken / "config.json").write_text("{")
    assert "config.json is not JSON" in await refusal(broken)


async def test_cut_off_weights_are_told(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "is it damaged? SafetensorError" in await refusal(broken)


async def test_missing_weights_are_told_and_not_filled_with_noise(broken):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = await refusal(broken)
    assert "1 weights are missing" in message
    assert "q_proj" in message


async def test_a_model_that_loads_and_cannot_answer_is_told(model_of, tap):
    tap.fault = lambda *_: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    message = await refusal(model_of("idefics3"))
    assert "was loaded but cannot answer: RuntimeError: mat1 and mat2" in message


async def test_a_device_that_is_not_there_is_told(model_of):
    assert "there is no device 'cuda:77'" in await refusal(model_of("idefics3"), device="cuda:77")


async def test_no_request_is_taken_before_the_model_is_loaded(model_of, tap):
    from local_calls import ask, chat

    backend = LocalBackend(str(model_of("idefics3")))
    assert backend.ready_reason() == "the model is not loaded"
    await tap.hold()
    starting = asyncio.create_task(backend.start())
    await until(lambda: tap.running)  # the warm-up
    assert backend.ready_reason() == "the model is being loaded"
    with pytest.raises(Unreachable, match="the model is being loaded"):
        await ask(backend, chat())
    tap.let(10)
    await starting
    assert backend.ready_reason() is None
    await backend.close()


async def test_a_slow_start_says_so_in_the_log(model_of, tap, caplog, monkeypatch):
    monkeypatch.setattr(backend_module, "_PROGRESS_SECONDS", 0.01)
    backend = LocalBackend(str(model_of("idefics3")))
    await tap.hold()
    with caplog.at_level("INFO", logger="backends.local"):
        starting = asyncio.create_task(backend.start())
        await until(lambda: "still loading" in caplog.text)
        tap.let(10)
        await starting
    for stage in ("on cpu as float32 (0.7 MB of weights)", "weights loaded in", "ready: the first answer took"):
        assert stage in caplog.text
    await backend.close()


async def test_a_start_that_is_cancelled_leaves_no_thread(model_of, tap):
    backend = LocalBackend(str(model_of("idefics3")))
    await tap.hold()
    starting = asyncio.create_task(backend.start())
    await until(lambda: tap.running)
    starting.cancel()
    await asyncio.wait([starting])
    tap.let(10)
    await until(lambda: not any(thread.name == "local-engine" for thread in threading.enumerate()))
    await backend.close()


def run(code: str) -> str:
    """Run code in a fresh interpreter: what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    return done.stdout.strip()


def test_importing_the_backend_brings_neither_torch_nor_transformers_nor_pil():
    code = "import sys, backends.local; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("package", ["torch", "transformers", "PIL"])
def test_a_missing_package_is_told_with_what_to_install(package):
    code = f"""
import asyncio, sys
sys.modules[{package!r}] = None  # as if it were not installed
from backends.local import LocalBackend
try:
    asyncio.run(LocalBackend("any").start())
except Exception as error:
    print(type(error).__name__, error)
"""
    said = run(code)
    assert said.startswith("BackendError the local backend needs torch, transformers and pillow")
    assert said.endswith("pip install 'vlm-sidecar[local]'")


def test_the_engine_leaves_a_core_to_the_event_loop(model_of):
    model_of("idefics3")
    from backends.local.model import cpu_cores

    assert 1 <= cpu_cores() <= os.cpu_count()
