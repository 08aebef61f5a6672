"""Loading a model: the errors for unusable folders and missing packages, and the reports while it is loading."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

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
    """A copy of a model's folder, which the test may damage."""
    return shutil.copytree(model_of("idefics3"), tmp_path / "copy")


async def refusal(model: object, **options) -> str:
    backend = LocalBackend(str(model), **options)
    with pytest.raises(BackendError) as caught:
        await backend.start()
    assert backend.unready_reason() is not None
    await backend.close()
    return caught.value.message


async def test_a_missing_folder_is_named(model_of, tmp_path):
    model_of("idefics3")
    assert await refusal(tmp_path / "none") == f"there is no model folder {tmp_path / 'none'}"


async def test_a_folder_without_a_model_is_reported(model_of, tmp_path):
    model_of("idefics3")
    assert "no config.json" in await refusal(tmp_path)


async def test_a_language_model_without_vision_is_reported(broken):
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is a llama model, not a vision-language model" in await refusal(broken)


async def test_a_folder_without_an_image_processor_is_reported(broken):
    (broken / "processor_config.json").unlink()
    assert "damaged" in await refusal(broken)


async def test_a_model_without_a_chat_template_is_reported(broken):
    (broken / "chat_template.jinja").unlink()
    assert "no chat template" in await refusal(broken)


async def test_a_broken_configuration_is_reported(broken):
    (broken / "config.json").write_text("{")
    assert "config.json is not JSON" in await refusal(broken)


async def test_truncated_weights_are_reported(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "is it damaged? SafetensorError" in await refusal(broken)


async def test_missing_weights_are_reported_and_not_replaced_by_random_values(broken):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = await refusal(broken)
    assert "1 weights are missing" in message
    assert "q_proj" in message


async def test_a_model_that_loads_but_cannot_answer_is_reported(model_of, tap):
    tap.fault = lambda *_: RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    message = await refusal(model_of("idefics3"))
    assert "was loaded but cannot answer: RuntimeError: mat1 and mat2" in message


async def test_a_missing_device_is_reported(model_of):
    assert "there is no device 'cuda:77'" in await refusal(model_of("idefics3"), device="cuda:77")


async def test_no_request_is_accepted_before_the_model_is_loaded(model_of, tap):
    from local_calls import ask, chat

    backend = LocalBackend(str(model_of("idefics3")))
    assert backend.unready_reason() == "the model is not loaded"
    await tap.hold()
    starting = asyncio.create_task(backend.start())
    await until(lambda: tap.running)  # the warm-up
    assert backend.unready_reason() == "the model is being loaded"
    with pytest.raises(Unreachable, match="the model is being loaded"):
        await ask(backend, chat())
    tap.allow(10)
    await starting
    assert backend.unready_reason() is None
    await backend.close()


async def test_a_slow_start_is_logged(model_of, tap, caplog, monkeypatch):
    monkeypatch.setattr(backend_module, "_PROGRESS_SECONDS", 0.01)
    backend = LocalBackend(str(model_of("idefics3")))
    await tap.hold()
    with caplog.at_level("INFO", logger="backends.local"):
        starting = asyncio.create_task(backend.start())
        await until(lambda: "still loading" in caplog.text)
        tap.allow(10)
        await starting
    for stage in ("on cpu as float32 (0.7 MB of weights)", "weights loaded in", "ready: the first answer took"):
        assert stage in caplog.text
    await backend.close()


async def test_a_cancelled_start_leaves_no_thread(model_of, tap):
    backend = LocalBackend(str(model_of("idefics3")))
    await tap.hold()
    starting = asyncio.create_task(backend.start())
    await until(lambda: tap.running)
    starting.cancel()
    await asyncio.wait([starting])
    tap.allow(10)
    await until(lambda: not any(thread.name == "local-engine" for thread in threading.enumerate()))
    await backend.close()


def run(code: str) -> str:
    """Run code in a new interpreter and return its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    return done.stdout.strip()


def test_importing_the_backend_does_not_import_torch_transformers_or_pil():
    code = "import sys, backends.local; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("package", ["torch", "transformers", "PIL"])
def test_the_error_for_a_missing_package_names_the_command_to_install_it(package):
    code = f"""
import asyncio, sys
sys.modules[{package!r}] = None  # as if it were not installed
from backends.local import LocalBackend
try:
    asyncio.run(LocalBackend("any").start())
except Exception as error:
    print(type(error).__name__, error)
"""
    output = run(code)
    assert output.startswith("BackendError the local backend needs torch, transformers and pillow")
    assert output.endswith("pip install 'vlm-sidecar[local]'")


def test_the_number_of_cpu_cores_is_plausible(model_of):
    model_of("idefics3")
    from backends.local.model import cpu_cores

    assert 1 <= cpu_cores() <= os.cpu_count()
