"""Tiny random vision-language models, inputs and plain reference hooks: what the tests of the core share.

Nothing here uses the package except the two lines of ADAPTERS that attach a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT, FIRST_WORD = range(8)
VOCAB, D_MODEL, D_VISION, LAYERS, VISION_LAYERS, PATCHES = 64, 32, 16, 4, 2, 4
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", *(f"w{i}" for i in range(7, VOCAB)))
DECODER_KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
VISION_KINDS = tuple(f"vision_{kind}" for kind in DECODER_KINDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def _built(seed: int, attn: str) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=D_VISION, intermediate_size=32, num_hidden_layers=VISION_LAYERS, num_attention_heads=2,
            image_size=16, patch_size=8, projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=D_MODEL, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE, image_seq_length=PATCHES, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that pictures, prompts and steering really change the answer
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, IMAGE]
    with torch.no_grad():  # transformers puts hooks of its own on the vision layers at the first forward
        model(**tiny_inputs(1))
    return model


def tiny_llava(seed: int = 0, attn: str = "eager") -> LlavaForConditionalGeneration:
    """Return a fresh copy: 4 decoder layers of width 32, 2 vision layers of width 16, 4 image tokens."""
    return copy.deepcopy(_built(seed, attn))


def row_lengths(rows: int) -> list[int]:
    """Real tokens of each row that `tiny_inputs` makes: <s> USER: 4 x <image>, words, ASSISTANT:."""
    return [7 + 4 + 2 * (row % 3) for row in range(rows)]


def tiny_inputs(rows: int = 3, seed: int = 1, *, side: str = "left", positions: bool = False) -> dict[str, Tensor]:
    """Build a padded batch of different prompts and pictures; `positions` adds the position_ids of `generate`."""
    draw = torch.Generator().manual_seed(seed)
    texts = [
        [BOS, USER, *[IMAGE] * PATCHES, *torch.randint(FIRST_WORD, VOCAB, (n - 7,), generator=draw).tolist(), ASSISTANT]
        for n in row_lengths(rows)
    ]
    width = max(map(len, texts))

    def padded(row: list[int], fill: list[int]) -> list[int]:
        return fill * (width - len(row)) + row if side == "left" else row + fill * (width - len(row))

    out = {
        "input_ids": torch.tensor([padded(row, [PAD]) for row in texts]),
        "attention_mask": torch.tensor([padded([1] * len(row), [0]) for row in texts]),
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=draw),
    }
    return with_position_ids(out) if positions else out


def with_position_ids(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the position_ids that `generate` gives a left-padded batch."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def single_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Cut one row out of a left-padded batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row][real][None],
        "attention_mask": inputs["attention_mask"][row][real][None],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


def tiny_processor() -> Any:
    """Build a LlavaProcessor offline: a word-level tokenizer of 64 words and CLIP's PIL image processor."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in WORDS[:5]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_resize=True
        ),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _torch(hf: nn.Module, processor: Any) -> Any:
    return hf


def _nnsight(hf: nn.Module, processor: Any) -> Any:
    from nnsight import NNsight

    return NNsight(hf)


def _transformers_model(hf: nn.Module, processor: Any) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(hf, task="image-text-to-text", processor=processor or tiny_processor())


def _bridge(hf: nn.Module, processor: Any) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config, tokenizer=None)


WRAP: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch": _torch,
    "nnsight": _nnsight,
    "transformer_lens": _bridge,
    "transformers_model": _transformers_model,
}


def _attacher(name: str) -> Callable[..., Any]:
    def attached(processor: Any = None, seed: int = 0, attn: str = "eager") -> Any:
        import steer_plugin as sp

        return sp.attach(WRAP[name](tiny_llava(seed, attn), processor), processor)

    return attached


# Each makes an attached model from an identical fresh copy.
ADAPTERS: dict[str, Callable[..., Any]] = {name: _attacher(name) for name in ("torch", "nnsight", "transformer_lens")}

# -- plain torch: what the package is compared with --------------------------------------------------------------

_MODULES = {"resid_pre": "", "resid_post": "", "attn_out": ".self_attn", "mlp_out": ".mlp"}
Act = Callable[[Tensor], Tensor | None]


def plain_module(kind: str, layer: int | None) -> tuple[str, bool]:
    """Module path of a site in a plain LLaVA, and whether the site is the module's input."""
    if kind == "projector":
        return "model.multi_modal_projector", False
    bare = kind.removeprefix("vision_")
    root = "model.vision_tower.encoder.layers" if kind != bare else "model.language_model.layers"
    return f"{root}.{layer}{_MODULES[bare]}", bare == "resid_pre"


def hook_plainly(module: nn.Module, entering: bool, act: Act) -> Any:
    """Let `act` see the tensor that enters or leaves a module, and return the one to go on with; returns the handle."""

    def pre(module: nn.Module, args: Any, kwargs: Any) -> Any:
        new = act(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def post(module: nn.Module, args: Any, output: Any) -> Any:
        new = act(output[0] if isinstance(output, tuple) else output)
        return output if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

    if entering:
        return module.register_forward_pre_hook(pre, with_kwargs=True)
    # Before the hooks by which transformers collects hidden states (LLaVA takes its picture features there).
    return module.register_forward_hook(post, prepend=True)


@contextmanager
def plain_hooks(hf: nn.Module, *sites: tuple[str, int | None, Act]) -> Iterator[None]:
    """Hook (kind, layer, act) with torch alone; `act` may return the tensor to go on with."""
    handles = []
    for kind, layer, act in sites:
        path, entering = plain_module(kind, layer)
        handles.append(hook_plainly(hf.get_submodule(path), entering, act))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(vector: Tensor, prompt_mask: Tensor | None, decoding: bool) -> Act:
    """Add a vector, or one per row, on a mask of the prompt and on all or none of the tokens fed back, cached."""

    def act(hidden: Tensor) -> Tensor:
        extra = vector
        if vector.ndim == 2:
            extra = vector.repeat_interleave(hidden.shape[0] // vector.shape[0], 0)[:, None]
        if prompt_mask is None:
            return hidden + extra
        out = hidden.clone()
        if hidden.shape[1] == 1:
            return hidden + extra if decoding else out
        chosen = prompt_mask.repeat_interleave(hidden.shape[0] // prompt_mask.shape[0], 0)
        out[chosen] = (hidden + extra)[chosen]
        return out

    return act


def hand_masks(inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
    """Masks of a left-padded batch by hand: expression -> (mask over the prompt, whether fed-back tokens count)."""
    real, image = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    last = torch.zeros_like(real)
    last[:, -1] = True
    none = torch.zeros_like(real)
    return {
        "last_prompt|generated": (last, True),
        "everywhere": (real, True),
        "image": (image, False),
        "generated": (none, True),
        "prompt": (real, False),
        "text": (real & ~image, True),
        "last_prompt": (last, False),
        "prompt & ~(image|last_prompt)": (real & ~image & ~last, False),
    }


def greedy(model: Any, inputs: dict[str, Tensor], new: int = 5, **options: Any) -> Tensor:
    """Greedy tokens of a plain Hugging Face model, prompt included."""
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw a random tensor from a seed of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def hook_count(*modules: nn.Module) -> int:
    """Count all torch hooks on all modules, TransformerLens' hook points included, those of transformers left out."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for root in modules for m in root.modules() for name in names for hook in getattr(m, name).values()]
    return sum(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def forward_logits(vlm: Any, steered: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of one forward inside `with vlm.steering(...) as steered`, as a user of that framework would call it."""
    with torch.no_grad():
        call = vlm.root if vlm.framework == "transformer_lens" else steered
        return call(**inputs).logits


class Recorder:
    """A LogitsProcessor that keeps the scores of every step."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores
