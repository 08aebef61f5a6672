"""The model: loading it, encoding a batch, and the decode loop. All of this runs in the engine thread.

Apart from `tiny.py`, only this file of the backend uses torch and transformers. The engine thread imports it to load a
model, because the import takes seconds and hundreds of megabytes.
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

#: Texts in torch's errors for exhausted memory. They are needed for errors that have no type of their own: those of the
#: CPU allocator, of MPS, and of some CUDA libraries.
_NO_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are encoded together. Shorter rows are padded on the left."""

    tensors: Any
    """The output of the processor (`transformers.BatchFeature`), on the model's device."""
    prompt_tokens: list[int]
    """LLM tokens of each row, with image tokens, without padding."""


class VisionModel:
    """A loaded model and its processor."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self.device = device
        self._model = model
        self._processor = processor
        text = model.config.get_text_config()
        self.context_tokens: int = getattr(text, "max_position_embeddings", None) or 4096
        """Maximum number of LLM tokens of prompt and answer together."""
        ends = model.generation_config.eos_token_id
        self.end_tokens = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self._image_mark: str | None = getattr(processor, "image_token", None)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # the prompts of all rows must end at the same position
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def prepare(self, prompt: Prompt, files: list[tuple[bytes, str]]) -> tuple[str, list[PIL.Image.Image]]:
        """Render the messages with the model's chat template, and decode the (bytes, field) pairs of the images.

        Raises `Rejected` with the name of the invalid field.
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
        """Return a small grey PNG image for the warm-up."""
        file = BytesIO()
        PIL.Image.new("RGB", (64, 64), "grey").save(file, "PNG")
        return file.getvalue()

    def encode(self, texts: list[str], images: list[list[PIL.Image.Image]]) -> Batch:
        """Tokenize the texts and resize the images. Every row must have the same number of images.

        Raises `Rejected` if the processor refuses a row, for example because an image is too narrow for its patches.
        """
        try:
            tensors = self._processor(
                text=texts, images=images if images[0] else None, padding=True, return_tensors="pt"
            )
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            kind = type(error).__name__  # not the message: it may quote the prompt
            raise invalid(f"the model's processor refuses the prompt with its images ({kind})", "messages") from error
        tensors = tensors.to(self.device, dtype=self._model.dtype)
        return Batch(tensors, tensors["attention_mask"].sum(dim=1).tolist())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without the special tokens of the chat template."""
        text: str = self._processor.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def generate(
        self, batch: Batch, draws: Sequence[Draw], max_tokens: int, step: Callable[[list[int]], list[bool]]
    ) -> None:
        """Run the decode loop for at most `max_tokens` steps.

        Each decode step calls `step` with the newest token of every row. `step` returns which rows are finished. A
        finished row gets padding in the later steps. The loop ends when all rows are finished. Errors of torch and of
        the model are not caught.
        """
        with torch.inference_mode():
            self._model.generate(
                **batch.tensors,
                # The model's own configuration is not used: its penalties would count a row's padding as text, so that
                # an answer would depend on the other rows. `_sampler` applies the options of each row.
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=sorted(self.end_tokens) or None,
                    pad_token_id=self._processor.tokenizer.pad_token_id,
                    bos_token_id=self._model.generation_config.bos_token_id,
                ),
                logits_processor=transformers.LogitsProcessorList([self._sampler(draws)]),
                stopping_criteria=transformers.StoppingCriteriaList([self._stopping_criterion(step)]),
            )

    def _stopping_criterion(self, step: Callable[[list[int]], list[bool]]) -> Any:
        """Return `step` as a stopping criterion. Each decode step calls it with all tokens so far, (rows, length)."""

        def criterion(tokens: Any, scores: Any, **_: object) -> Any:
            return torch.tensor(step(tokens[:, -1].tolist()), dtype=torch.bool, device=tokens.device)

        return criterion

    def _sampler(self, draws: Sequence[Draw]) -> Any:
        """Return a logits processor that samples each row separately inside a greedy loop.

        With it, rows of different temperatures can share a batch. The greedy loop uses the argmax of the scores. For a
        row with a temperature T, argmax(scores / T + Gumbel noise) is a sample from softmax(scores / T) (the Gumbel-max
        trick: Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). The scores of a greedy row are not changed. Each row
        has its own random generator, so that the same seed gives the same answer in every batch.
        """
        generators = [torch.Generator(self.device).manual_seed(draw.seed) for draw in draws]
        at = 0

        def sample(tokens: Any, scores: Any) -> Any:
            nonlocal at
            for row, draw in enumerate(draws):
                if draw.temperature > 0:
                    scaled = _nucleus(scores[row] / draw.temperature, draw.top_p)
                    # If x is exponentially distributed, -log(x) has a Gumbel distribution. The bound avoids log(0).
                    noise = torch.empty_like(scaled).exponential_(generator=generators[row]).clamp_(min=1e-30)
                    scores[row] = scaled - noise.log_()
                if at < len(draw.forced):
                    scores[row] = -math.inf
                    scores[row, draw.forced[at]] = 0
            at += 1
            return scores

        return sample

    def free(self) -> None:
        """Free the memory of a failed batch."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        elif self.device == "mps":
            torch.mps.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` means that the memory is exhausted, so that a smaller batch may succeed."""
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY_TEXTS)

    def is_fatal(self, error: BaseException) -> bool:
        """Return whether the device is unusable after `error`: a failed CUDA kernel breaks its whole context."""
        # torch.AcceleratorError exists since torch 2.8.
        kind = getattr(torch, "AcceleratorError", None)
        return kind is not None and isinstance(error, kind) and not self.is_out_of_memory(error)


def _nucleus(scores: Any, top_p: float) -> Any:
    """Set all scores to -inf except the most likely tokens that together reach the probability `top_p`.

    Source: top-p (nucleus) sampling, Holtzman et al., arXiv 1904.09751.
    """
    if top_p >= 1:
        return scores
    ordered, order = torch.sort(scores, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    before[0] = -1  # the most likely token always stays, also with a top_p of 0
    return scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, before >= top_p), -math.inf)


def load(name: str, device: str, log: Callable[[str], None]) -> VisionModel:
    """Load a model from a folder or from a model hub. `name` is the argument of transformers' `from_pretrained`.

    `device` is the name of a torch device, or `auto`: CUDA, else Apple's MPS, else the CPU. `log` is called with one
    line for each stage. Raises `BackendError` with a message for the operator if the folder, a package or a file is
    missing, if a file is damaged, or if the model is not a vision-language model.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, cpu_cores() - 1))  # leave one core to the event loop
    device, dtype = _place(device)
    name, weights = _check_files(name)
    log(f"loading {name} on {device} as {str(dtype).removeprefix('torch.')}{weights}")
    began = time.monotonic()
    try:
        model = _load(name, device, dtype)
    except BackendError:
        raise
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"{name} needs a package that is not installed: {first}") from error
    except Exception as error:  # the parser of a damaged file may raise any error
        first = (str(error).strip() or "no message").splitlines()[0]
        raise BackendError(f"{name} cannot be loaded, is it damaged? {type(error).__name__}: {first}") from error
    log(f"weights loaded in {time.monotonic() - began:.1f} s")
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
    if report["missing_keys"]:  # transformers fills missing weights with random values, without an error
        missing = sorted(report["missing_keys"])
        raise BackendError(f"{name} is damaged: {len(missing)} weights are missing, such as {missing[0]}")
    return VisionModel(model.eval().to(device), processor, device)


def _place(device: str) -> tuple[str, Any]:
    """Return the device, and the number type that is fast on it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"there is no device {device!r} for the local model: {first}") from error
    if kind == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return device, torch.float16 if kind == "mps" else torch.float32


def _check_files(name: str) -> tuple[str, str]:
    """Return the name to load, and a text for the log that says where the weights come from.

    Raises `BackendError` if `name` is a folder and cannot be loaded.
    """
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
    """Return the number of cores that this process may use.

    It is the smaller one of the process's affinity and the container's quota (cgroup v2 `cpu.max`).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limits.read_text().partition(" ") if limits.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
