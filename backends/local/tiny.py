"""Builds a tiny vision-language model with seeded random weights: for trying the local backend, and for its tests.

    python -m backends.local.tiny idefics3 FOLDER

Its answers are noise, but everything else is real: the same `from_pretrained` loads the folder and a model from a hub.
Building takes less than a second; the folder has less than a megabyte.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_PAD, _START, _END, _IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
#: Special tokens that the processors of Idefics3 and Qwen look up by name in the tokenizer.
_FAMILY_MARKS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}IMAGE{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def build(family: str, folder: Path) -> None:
    """Save a model of `family` and its processor into `folder`. The folder is created if it does not exist.

    Families: `idefics3` (SmolVLM's architecture), `llava`, and `qwen2_5_vl`, whose processor needs torchvision.
    The weights of a family are the same every time. Raises `KeyError` for another family.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model, processor = _FAMILIES[family](_tokenizer())
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer() -> Any:
    """Return a tokenizer that is trained on one line of text.

    It is a byte-level BPE tokenizer, so that it can encode every string.
    """
    marks = [_PAD, _START, _END, _IMAGE, *_FAMILY_MARKS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["A street at dusk: two people wait, a red car is parked, a dog looks on."] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=marks,
        padding_side="left",
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": ids(_START),
        "eos_token_id": ids(_END),
        "pad_token_id": ids(_PAD),
        **more,
    }


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        vision_config=_VISION,
        text_config=_text(tokenizer, model_type="llama"),
    )
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=4,  # (64 / 16)² = 16 patches; 2² = 4 patches (scale factor 2) become one LLM token
        chat_template=_TEMPLATE.replace("IMAGE", _IMAGE),
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        text_config=_text(tokenizer, model_type="llama"),
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token=_IMAGE,
        num_additional_image_tokens=0,
        chat_template=_TEMPLATE.replace("IMAGE", _IMAGE),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        # Rotary sections for time, height and width. Their sum is half of the head size, which is 16.
        text_config=_text(
            tokenizer, rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
        ),
    )
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


_FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
}


def main() -> None:
    """Build the model that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m backends.local.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(_FAMILIES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.family, arguments.folder)


if __name__ == "__main__":
    main()
