"""The pocket VLM: CLIP-ViT(72 px, 12 px patches) -> projector -> Llama with tied embeddings, 1.3 M parameters in all.

It is an ordinary `LlavaForConditionalGeneration` with an ordinary `LlavaProcessor`; nothing needs torchvision or a
network.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.pocket.language import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, TOKENS, build_tokenizer
from steer_plugin.pocket.scene import SIDE

PATCH = 12
IMAGE_TOKENS = (SIDE // PATCH) ** 2
WIDTH = 128
WEIGHTS = Path(__file__).parent / "weights"


def build_config() -> LlavaConfig:
    """Describe the pocket VLM."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=TOKENS.index(PAD),
        bos_token_id=TOKENS.index(BOS),
        eos_token_id=TOKENS.index(EOS),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKENS.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """Make an untrained pocket VLM whose weights depend on the seed alone; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config())
        # Word vectors of length about 3: patches are taught to point at them, which vanishing vectors would not bear.
        torch.nn.init.normal_(word_vectors(model), std=0.3)
    model.generation_config = GenerationConfig(
        bos_token_id=TOKENS.index(BOS),
        eos_token_id=TOKENS.index(EOS),
        pad_token_id=TOKENS.index(PAD),
        max_new_tokens=24,
        do_sample=False,
    )
    return model


def build_processor() -> LlavaProcessor:
    """Make the processor: PIL images to 72 x 72 in -1..1, text to tokens with 36 image tokens for each picture."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        do_resize=True,
        size=size,
        do_center_crop=False,
        crop_size=size,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def word_vectors(model: LlavaForConditionalGeneration) -> Float[Tensor, "vocabulary d_model"]:
    """Return the word vectors, which are the rows of the language head too."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def image_features(
    model: LlavaForConditionalGeneration, pixels: Float[Tensor, "batch 3 side side"]
) -> Float[Tensor, "batch patches d_model"]:
    """Return what the decoder gets to see of each picture."""
    found = cast(BaseModelOutputWithPooling, model.model.get_image_features(pixel_values=pixels))
    return torch.stack(list(cast(Sequence[Tensor], found.pooler_output)))


def encode(processor: LlavaProcessor, images: Sequence[Image.Image], texts: Sequence[str]) -> BatchFeature:
    """Turn pictures and prompts into a left-padded batch of tensors."""
    return processor(
        images=list(images),
        text=list(texts),
        padding=True,  # pyright: ignore[reportCallIssue]
        return_tensors="pt",  # pyright: ignore[reportCallIssue]
    )


def normalise(pixels: UInt8[Tensor, "batch side side 3"]) -> Float[Tensor, "batch 3 side side"]:
    """Turn bytes into what the processor makes of them: (x / 255 - 0.5) / 0.5, channels first."""
    return ((pixels.float() * (1 / 255) - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def trained(name: str = "steervlm") -> Path:
    """Return the folder of a steering trained on the packaged weights: "steervlm", "without_u", "without_gate".

    Raises InputError for another name.
    """
    folder = WEIGHTS.parent / "steering" / name
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*"))
        raise InputError(f"no steering {name!r} ships with the pocket VLM; known: {', '.join(known)}.")
    return folder


def load(path: str | Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the pocket VLM (float32, eval mode) and its processor, from the package or from a folder made by `train`.

    Never touches a network. Raises ArtefactError when the folder holds no finished pocket VLM.
    """
    folder = WEIGHTS if path is None else Path(path)
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise ArtefactError(
            f"{folder} is no folder of a trained pocket VLM: {', '.join(missing)} missing. Train one there."
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with warnings.catch_warnings():
        # Transformers advises to install torchvision; the PIL image processor is meant.
        warnings.simplefilter("ignore")
        processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor
