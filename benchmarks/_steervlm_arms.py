"""What the SteerVLM benchmark runs: two models with prompts and pairs, and the paper's two passes in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

import steer_plugin as sp
from steer_plugin.adapters import AttachedModel
from steer_plugin.methods.steervlm import SteerVLMModule

PAIRS = {"pocket": ("The rain is great.", "The rain is poor."), "random": ("w20 w21 w22 w23 w24", "w30 w31")}


def word_processor() -> LlavaProcessor:
    """Build a processor of 64 words, w7 to w63 among them, and LLaVA-1.5's pictures."""
    words = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", *(f"w{i}" for i in range(7, 64)))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words[:5]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
        "{% endfor %}{% endfor %}ASSISTANT:"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def random_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Draw a LLaVA with LLaVA-1.5's picture geometry and a small vision tower, and a processor of 64 words."""
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=336,
        patch_size=14, projection_dim=256,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=576)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)  # so that tokens attend to others and logits differ
        # What was said last decides what is said next.
        model.get_parameter("model.language_model.embed_tokens.weight").mul_(30.0)
    return model, word_processor()


def load(name: str, batch: int) -> tuple[Any, LlavaProcessor, dict[str, Tensor]]:
    """Return a model that never stops by itself, its processor, and one batch of prompts of one length."""
    if name == "pocket":
        model, processor = sp.pocket.load()
        world = sp.pocket.World(0)
        pictures = [world.scene(number).image for number in range(batch)]
        prompt = "Is there a dog in the image?"
    else:
        model, processor = random_llava()
        noise = np.random.default_rng(0).integers(0, 256, (batch, 336, 336, 3), np.uint8)
        pictures = [Image.fromarray(one) for one in noise]
        prompt = " ".join(f"w{i}" for i in range(7, 19))
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [0, int(model.config.image_token_index)]  # pyright: ignore
    return model, processor, sp.attach(model, processor).inputs([prompt] * batch, pictures)


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention block of every decoder layer."""
    return [layer.get_submodule("self_attn") for layer in model.get_submodule("model.language_model.layers").children()]


def drawn_steering(name: str, vlm: AttachedModel) -> sp.SteerVLM:
    """Return SteerVLM bound to the model's pair; its weights are drawn here, large enough to change what is said."""
    made = sp.SteerVLM.new(sp.SteerVLMConfig(vlm.d_model, vlm.n_layers))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=draw) * weight.shape[1] ** -0.5)
    made.module.to(vlm.device)
    return made.pair(*PAIRS[name])


class Naive:
    """SteerVLM as the paper describes it: two forwards per token, each with its own cache, and nothing shared."""

    def __init__(self, model: Any, processor: Any, module: SteerVLMModule, texts: Sequence[str], where: str) -> None:
        self.model, self.module = model, module
        self.first = None if where == "everywhere" else -1  # of a prompt's columns, the first that is steered
        plus, minus = (self._read(processor, text) for text in texts)
        self.pair = list(zip(plus, minus, strict=True))
        self.recording = False
        self.unsteered: dict[int, Tensor] = {}

    def _read(self, processor: Any, text: str) -> list[Tensor]:
        turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        whole = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        coded = processor.tokenizer(whole, return_offsets_mapping=True)
        begin, end = whole.index(text), whole.index(text) + len(text)
        own = [i for i, (start, stop) in enumerate(coded["offset_mapping"]) if start < end and stop > begin]
        kept: list[Tensor] = []
        hooks = [
            one.register_forward_hook(lambda m, a, out: kept.append(out[0][:, own])) for one in attentions(self.model)
        ]
        with torch.no_grad():
            self.model(input_ids=torch.tensor([coded["input_ids"]], device=self.model.device))
        for hook in hooks:
            hook.remove()
        return kept

    def generate(self, **inputs: Any) -> Tensor:
        """Generate with both passes in every forward of `generate`."""
        real = [
            [torch.ones(side.shape[:2], dtype=torch.bool, device=side.device) for side in pair] for pair in self.pair
        ]
        with torch.no_grad():
            # Once per call, as ours does.
            self.memory = [
                self.module.remember(plus, plus_real, minus, minus_real)
                for (plus, minus), (plus_real, minus_real) in zip(self.pair, real, strict=True)
            ]
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        hooks = [self.model.register_forward_pre_hook(self._unsteered, with_kwargs=True)]
        hooks += [one.register_forward_hook(partial(self._at, n)) for n, one in enumerate(attentions(self.model))]
        try:
            return self.model.generate(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
            del self.cache, self.memory  # the next arm's memory is measured without them
            self.unsteered.clear()

    def _unsteered(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.recording:
            self.recording = True
            model(*args, **{**kwargs, "past_key_values": self.cache})
            self.recording = False

    def _at(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        if self.recording:
            self.unsteered[layer] = output[0]
            return None
        out = output[0].clone()
        part = out[:, self.first :]
        part += self.module(part, self.unsteered[layer][:, self.first :], self.memory[layer])[2].to(out)
        return out, *output[1:]
