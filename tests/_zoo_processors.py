"""Processors of every family, built offline and without torchvision: a word-level tokenizer and PIL image processors.

Pictures are some tens of pixels wide, so that grids, tiles, thumbnails and row tokens come out as in the real models,
only fewer. Words are "w0" to "w39"; a line break is a token of its own, as in the real chat templates.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = tuple(f"w{i}" for i in range(40))
BASE = ("<pad>", "<s>", "</s>", "<unk>", "\n")
ROLES = ("user", "assistant", "model", "User:", "Assistant:", "USER:", "ASSISTANT:")
CONTENT = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def template(image: str, before: str, after: str, header: str) -> str:
    """Chat template of user turns: what stands before and behind each, how a picture and the answer are announced."""
    turn = f"{{{{ {before!r} }}}}" + CONTENT.replace("'IMAGE'", repr(image)) + f"{{{{ {after!r} }}}}"
    opened = f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    return "{% for message in messages %}" + turn + "{% endfor %}" + opened


def chatml(image: str) -> str:
    return template(image, "<|im_start|> user\n", "<|im_end|>\n", "<|im_start|>assistant\n")


def tokenizer(*special: str, bos: bool = True, **named: str) -> Any:
    """A fast tokenizer that knows the words, the roles and these special tokens; `named` become its attributes."""
    tokens = (*BASE, *dict.fromkeys((*special, *named.values())), *ROLES, *WORDS)
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in tokens[: -len(WORDS + ROLES)]]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=dict(named), padding_side="left",
    )  # fmt: skip


def without_video(kind: type[Any]) -> type[Any]:
    """A processor class that takes no video processor: every one of them needs torchvision."""

    def check(self: Any, name: str, argument: object) -> object:
        return None if argument is None else super(made, self).check_argument_for_proper_class(name, argument)

    made: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    return made


def clip_images(size: int = 16) -> Any:
    return hf.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def siglip_images(size: int = 16, **more: Any) -> Any:
    return hf.SiglipImageProcessorPil(size={"height": size, "width": size}, **more)


def llava() -> Any:
    return hf.LlavaProcessor(
        image_processor=clip_images(), tokenizer=tokenizer(image_token="<image>"), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>\n", "USER: ", " ", "ASSISTANT:"),
    )  # fmt: skip


def llava_next() -> Any:
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return hf.LlavaNextProcessor(
        image_processor=images, tokenizer=tokenizer("[INST]", "[/INST]", image_token="<image>"), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>\n", "[INST] ", " [/INST]", ""),
    )  # fmt: skip


def llava_onevision() -> Any:
    images = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return without_video(hf.LlavaOnevisionProcessor)(
        image_processor=images, video_processor=None, num_image_tokens=4, vision_feature_select_strategy="full",
        tokenizer=tokenizer("<|im_start|>", "<|im_end|>", bos=False, image_token="<image>", video_token="<video>"),
        chat_template=chatml("<image>\n"),
    )  # fmt: skip


def qwen(kind: str) -> Any:
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 32}
    )
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", bos=False, image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    return without_video(getattr(hf, kind))(
        image_processor=images, tokenizer=words, video_processor=None,
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip


def gemma3() -> Any:
    words = tokenizer(
        "<start_of_turn>", "<end_of_turn>", image_token="<image_soft_token>", boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )  # fmt: skip
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer=words,
        image_seq_length=4,
        chat_template="{{ '<s>' }}"
        + template("<start_of_image>", "<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n"),
    )  # fmt: skip


def paligemma() -> Any:
    """PaliGemma has no chat: the picture, the prompt and a line break."""
    return hf.PaliGemmaProcessor(
        image_processor=siglip_images(image_seq_length=4), tokenizer=tokenizer(bos=False, image_token="<image>")
    )


def idefics3(kind: str) -> Any:
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    words = tokenizer(
        "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows, "<|im_start|>", image_token="<image>"
    )
    images = getattr(hf, f"{kind}ImageProcessorPil")(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    chat = template("<image>", "<|im_start|>User: ", "<end_of_utterance>\n", "Assistant:")
    if kind == "SmolVLM":
        from transformers.models.smolvlm import processing_smolvlm

        processing_smolvlm.num2words = str  # spells the numbers of video frames, and is not installed
        made = without_video(hf.SmolVLMProcessor)(
            images, words, video_processor=None, image_seq_len=4, chat_template=chat
        )
        made.video_processor = SimpleNamespace(num_frames=1, fps=1, size={"longest_edge": 16}, do_sample_frames=False)
        return made
    return hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=chat)


def internvl() -> Any:
    words = tokenizer(
        "<|im_start|>", "<|im_end|>", bos=False, start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    images = hf.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return without_video(hf.InternVLProcessor)(
        image_processor=images, tokenizer=words, video_processor=None, image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )  # fmt: skip


def mllama() -> Any:
    words = tokenizer(
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", image_token="<|image|>"
    )
    headed = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return hf.MllamaProcessor(
        image_processor=hf.MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4),
        tokenizer=words,
        chat_template="{{ '<s>' }}"
        + template("<|image|>", headed.format("user"), "<|eot_id|>", headed.format("assistant")),
    )  # fmt: skip


def mistral3() -> Any:
    words = tokenizer("[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    # The module takes one function from the image processor that needs torchvision; its PIL twin has the same one.
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", pil)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    return PixtralProcessor(
        image_processor=hf.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}),
        tokenizer=words, patch_size=4, spatial_merge_size=2,
        chat_template="{{ '<s>' }}" + template("[IMG]", "[INST] ", " [/INST]", ""),
    )  # fmt: skip
