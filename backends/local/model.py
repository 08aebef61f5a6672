"""The model itself: loading it, encoding a batch, the decode loop. All of this runs in the engine thread.

The one file of the backend that knows torch and transformers. It is imported in the engine thread, when a model is
loaded: that takes seconds and hundreds of megabytes.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from jinja2 import TemplateError

from backends.base import BackendError
from backends.local.pictures import decode
from backends.local.prompts import Prompt, invalid
from backends.local.rows import Draw

#: Texts by which torch reports short memory where it has no type for it: its CPU allocator, MPS, some CUDA libraries.
_NO_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows encoded together, padded on the left."""

    tensors: Any
    """What the processor made, on the model's device (`transformers.BatchFeature`)."""
    prompt_tokens: list[int]
    """LLM tokens of each row, image tokens included, padding not."""


class VisionModel:
    """A loaded model with its processor."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self.device = device
        self._model = model
        self._processor = processor
        text = model.config.get_text_config()
        self.context_tokens: int = getattr(text, "max_position_embeddings", None) or 4096
        """Prompt and answer together may have this many LLM tokens."""
        ends = model.generation_config.eos_token_id
        self.end_tokens = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self._image_mark: str | None = getattr(processor, "image_token", None)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # an answer begins where the prompt ends, for every row at once
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def prepare(self, prompt: Prompt, files: list[tuple[bytes, str]]) -> tuple[str, list[PIL.Image.Image]]:
        """Render the messages by the model's chat template, and decode the (bytes, field) pairs of the images.

        Raises `Rejected` that names the field at fault.
        """
        for at, message in enumerate(prompt.messages):
            for part in message["content"]:
                if self._image_mark and self._image_mark in part.get("text", ""):
                    raise invalid(f"may not contain the model's image mark {self._image_mark}", f"messages[{at}]")
        try:
            rendered: str = self._processor.apply_chat_template(
                prompt.messages, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise invalid(f"the model's chat template refuses it ({error})", "messages") from None
        return rendered, decode(files)

    @staticmethod
    def sample_image() -> bytes:
        """Make a small grey picture, to warm up with."""
        file = BytesIO()
        PIL.Image.new("RGB", (64, 64), "grey").save(file, "PNG")
        return file.getvalue()

    def encode(self, texts: list[str], images: list[list[PIL.Image.Image]]) -> Batch:
        """Tokenise and resize. Every row has the same number of images.

        Raises `Rejected` if the processor refuses a row: an image too narrow for its patches, say.
        """
        try:
            tensors = self._processor(
                text=texts, images=images if images[0] else None, padding=True, return_tensors="pt"
            )
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            kind = type(error).__name__  # its message may quote the prompt
            raise invalid(f"the model's processor refuses the prompt with its images ({kind})", "messages") from error
        tensors = tensors.to(self.device, dtype=self._model.dtype)
        return Batch(tensors, tensors["attention_mask"].sum(dim=1).tolist())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without the marks of the chat template."""
        text: str = self._processor.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def generate(
        self, batch: Batch, draws: Sequence[Draw], max_tokens: int, step: Callable[[list[int]], list[bool]]
    ) -> None:
        """Run the decode loop, for at most `max_tokens` steps.

        Each step hands `step` the newest token of every row; it answers which rows are finished. A finished row gets
        padding from then on, and the loop ends when all are. Raises whatever torch or the model raise.
        """
        with torch.inference_mode():
            self._model.generate(
                **batch.tensors,
                # Not the model's own configuration: penalties and the like would count a row's padding as text, so
                # that an answer depended on its neighbours. What a row asks for is done by `_choose`.
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=sorted(self.end_tokens) or None,
                    pad_token_id=self._processor.tokenizer.pad_token_id,
                    bos_token_id=self._model.generation_config.bos_token_id,
                ),
                logits_processor=transformers.LogitsProcessorList([self._choose(draws)]),
                stopping_criteria=transformers.StoppingCriteriaList([self._watch(step)]),
            )

    def _watch(self, step: Callable[[list[int]], list[bool]]) -> Any:
        """`step` as a stopping criterion: called once a step with all tokens so far, (rows, length)."""

        def watch(tokens: Any, scores: Any, **_: object) -> Any:
            return torch.tensor(step(tokens[:, -1].tolist()), dtype=torch.bool, device=tokens.device)

        return watch

    def _choose(self, draws: Sequence[Draw]) -> Any:
        """Row by row sampling inside a greedy loop, so that rows of any temperature share a batch.

        The loop takes the argmax. For a row with a temperature T, argmax(scores / T + noise) with Gumbel noise is a
        draw from softmax(scores / T) (the Gumbel-max trick: Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). A
        greedy row's scores are not touched. Each row draws from a generator of its own, so that a seed gives the
        same answer whoever shares the batch.
        """
        generators = [torch.Generator(self.device).manual_seed(draw.seed) for draw in draws]
        at = 0

        def choose(tokens: Any, scores: Any) -> Any:
            nonlocal at
            for row, draw in enumerate(draws):
                if draw.temperature > 0:
                    scaled = _nucleus(scores[row] / draw.temperature, draw.top_p)
                    # -log of an exponential variable is a Gumbel one; the bound keeps a zero from becoming infinite.
                    noise = torch.empty_like(scaled).exponential_(generator=generators[row]).clamp_(min=1e-30)
                    scores[row] = scaled - noise.log_()
                if at < len(draw.forced):
                    scores[row] = -math.inf
                    scores[row, draw.forced[at]] = 0
            at += 1
            return scores

        return choose

    def free(self) -> None:
        """Give back the memory of a batch that failed."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        elif self.device == "mps":
            torch.mps.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that a smaller batch might fit."""
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY_TEXTS)

    def is_fatal(self, error: BaseException) -> bool:
        """Whether the device is unusable after `error`: a failed CUDA kernel takes the whole context with it."""
        # torch.AcceleratorError came with torch 2.8.
        kind = getattr(torch, "AcceleratorError", None)
        return kind is not None and isinstance(error, kind) and not self.is_out_of_memory(error)


def _nucleus(scores: Any, top_p: float) -> Any:
    """Top-p: keep the likeliest tokens that together reach probability `top_p` (Holtzman et al., arXiv 1904.09751)."""
    if top_p >= 1:
        return scores
    ordered, order = torch.sort(scores, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    before[0] = -1  # the likeliest always stays, also for a top_p of 0
    return scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, before >= top_p), -math.inf)


def load(name: str, device: str, say: Callable[[str], None]) -> VisionModel:
    """Load a folder, or an id of a model hub, as transformers' `from_pretrained` does.

    `device` is torch's name for one, or `auto`: CUDA, else Apple's MPS, else the CPU. `say` gets a line for each stage.
    Raises `BackendError` with a message for a person: folder, package or files missing, damaged, or not a
    vision-language model.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, cpu_cores() - 1))  # one core stays with the event loop
    device, dtype = _place(device)
    name, weights = _check_files(name)
    say(f"loading {name} on {device} as {str(dtype).removeprefix('torch.')}{weights}")
    began = time.monotonic()
    try:
        model = _load(name, device, dtype)
    except BackendError:
        raise
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"{name} needs a package that is not installed: {first}") from error
    except Exception as error:  # whatever a parser of broken files may raise
        first = (str(error).strip() or "no message").splitlines()[0]
        raise BackendError(f"{name} cannot be loaded, is it damaged? {type(error).__name__}: {first}") from error
    say(f"weights loaded in {time.monotonic() - began:.1f} s")
    return model


def _load(name: str, device: str, dtype: torch.dtype) -> VisionModel:
    config = transformers.AutoConfig.from_pretrained(name)
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise BackendError(f"{name} is a {config.model_type} model, not a vision-language model")
    processor = transformers.AutoProcessor.from_pretrained(name)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise BackendError(f"{name} has no image processor with a tokenizer: not a vision-language model, or damaged")
    if not getattr(processor, "chat_template", None):
        raise BackendError(f"{name} has no chat template: choose an instruction-tuned model")
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would fill them with noise, and serve it
        missing = sorted(report["missing_keys"])
        raise BackendError(f"{name} is damaged: {len(missing)} weights are missing, such as {missing[0]}")
    return VisionModel(model.eval().to(device), processor, device)


def _place(device: str) -> tuple[str, Any]:
    """The device, and the type of number that is quick on it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"there is no device {device!r} for the local model: {first}") from error
    if kind == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return device, torch.float16 if kind == "mps" else torch.float32


def _check_files(name: str) -> tuple[str, str]:
    """What to load, and for the log from where. Raises `BackendError` if a folder is meant and it cannot be loaded."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise BackendError(f"there is no model folder {name}")
        return name, " (from the model hub or its cache)"
    if not (folder / "config.json").is_file():
        raise BackendError(f"{name} is not a model folder: it has no config.json")
    try:
        json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise BackendError(f"{name} is damaged: config.json is not JSON ({error})") from error
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return str(folder), f" ({size / 1e6:.1f} MB of weights)"


def cpu_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota (cgroup v2 `cpu.max`), whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limits.read_text().partition(" ") if limits.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
