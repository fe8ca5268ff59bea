"""The published L2S networks on models of their width and depth: random weights, everything else as small as can be.

What the package does from `from_published` to the decoded answer is compared with plain torch: the prompt is run once
to read the context, the paper's formula g(h) = W2 tanh(W1 h + b) is applied to the tensors of the file, and a hook adds
alpha g(h) while `generate` runs. Streams agree within 1e-5 of a stream whose values are of order 1 (float32).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _tiny import IMAGE, PAD, WORDS, greedy, plain_hooks, tiny_processor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import steer_plugin as sp

TOKENS, TOLERANCE = 5, 1e-5
QUESTIONS = ["w20 w21 w22", "w30 w31 w32 w33 w34"]
PICTURES = [Image.new("RGB", (16, 16), colour) for colour in ("teal", "orange")]
QWEN_WORDS = (
    "<pad>", "<s>", "</s>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<|im_start|>", "<|im_end|>", "\n", "user", "assistant", *(f"w{i}" for i in range(13, 64)),
)  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """A published file, from the authors' scripts: L', L*, alpha, and how many header tokens follow the context."""

    file: str
    made: str
    read: int
    write: int
    alpha: float
    header: int


CASES = {
    "llava, POPE": Case("llava_14_average_all_pope_train_-1.pt", "llava", 14, 14, 1.0, 0),
    # "ASSISTANT:" is one word of the tiny tokenizer; "<|im_start|>", "assistant" and the line break are three.
    "llava, safety": Case("llava_mmsb_steering_net_v3_multi_nobias_K100.pt", "llava", 30, 15, 2.2, 1),
    "qwen, safety": Case("qwen_14_last_input_multi_mmsb_train_-1_v2.pt", "qwen2_vl", 14, 14, 2.2, 3),
}


def llava() -> tuple[Any, Any]:
    """LLaVA at width 4096 and depth 32, with two heads of 8 numbers, and the tiny processor."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, vocab_size=len(WORDS), pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=IMAGE, image_seq_length=4, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return lively(LlavaForConditionalGeneration(config), special=5), tiny_processor()


def qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL at width 3584 and depth 28; its heads are as wide as the stream, so two matrices are factored."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "model_type": "qwen2_vl_text", "hidden_size": 3584, "num_hidden_layers": 1, "num_attention_heads": 28,
            "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": len(QWEN_WORDS), "pad_token_id": PAD,
            "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 3584, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "mlp_ratio": 2,
        },
        image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    layers = model.model.language_model.layers
    for name in ("q_proj", "o_proj"):
        narrow = nn.Sequential(nn.Linear(3584, 8, bias=False), nn.Linear(8, 3584, bias=False))
        setattr(layers[0].self_attn, name, narrow)
    for index in range(1, 28):
        layers.append(copy.deepcopy(layers[0]))
        layers[index].self_attn.layer_idx = index
    config.text_config.num_hidden_layers, config.text_config.layer_types = 28, ["full_attention"] * 28
    return lively(model, special=10), qwen_processor()


def qwen_processor() -> Any:
    """A Qwen2VLProcessor offline, with a word-level tokenizer and without the video part, which needs torchvision."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen2VLProcessor

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(QWEN_WORDS)}, unk_token="<unk>"))
    line = pre_tokenizers.Split(Regex("\n"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([line, pre_tokenizers.Split(" ", "removed")])
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in QWEN_WORDS[:10]])
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}, padding_side="left",
    )  # fmt: skip

    class WithoutVideo(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, name: str, argument: object) -> object:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 256}
    )
    return WithoutVideo(image_processor=images, tokenizer=words, video_processor=None, chat_template=QWEN_TEMPLATE)


@torch.no_grad()
def lively(model: Any, special: int) -> Any:
    """Redraw the weights so that streams are of order 1 and answers depend on the input; never say a special token."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.5 if "embed" in name else 0.5 * weight.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(special))
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, sp.AttachedModel]:
    """Both models, attached; the same ones are steered by hand."""
    torch.manual_seed(0)
    return {"llava": sp.attach(*llava()), "qwen2_vl": sp.attach(*qwen2_vl())}


def seeing(into: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda hidden: into.append(hidden.clone())


def vector_by_hand(model: Any, inputs: dict[str, Tensor], state: dict[str, Tensor], case: Case) -> Tensor:
    """g(h_{L'}), h at the last token of the prompt, the assistant header left off where the network wants it so."""
    width = inputs["input_ids"].shape[1]
    cut = {
        name: value[:, : width - case.header] if value.shape[:2] == inputs["input_ids"].shape else value
        for name, value in inputs.items()
    }
    seen: list[Tensor] = []
    with plain_hooks(model, ("resid_post", case.read, seeing(seen))):
        greedy(model, cut, 1)
    hidden = torch.tanh(seen[0][:, -1] @ state["encoder.weight"].T + state["encoder.bias"])
    return hidden @ state["decoder.weight"].T


def steered_by_hand(
    model: Any, inputs: dict[str, Tensor], vector: Tensor, case: Case, everywhere: bool
) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens, and the stream behind layer L* of each forward."""

    def add(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, slice(None) if everywhere else slice(-1, None)] += case.alpha * vector[:, None]
        return out

    seen: list[Tensor] = []
    with plain_hooks(model, ("resid_post", case.write, add), ("resid_pre", case.write + 1, seeing(seen))):
        return greedy(model, inputs, TOKENS), seen


@pytest.mark.parametrize("positions", ["paper", "authors_code"])
@pytest.mark.parametrize("name", CASES)
def test_context_prediction_steering_and_answer_equal_the_formula_by_hand(models, shared, name, positions):
    case = CASES[name]
    vlm = models[case.made]
    path, model = shared / "data" / "l2s_checkpoints" / case.file, vlm.parts.root
    state = torch.load(path, weights_only=True, map_location="cpu")
    state = state.get("steering_model", state)
    inputs = vlm.inputs(QUESTIONS, PICTURES)
    vector = vector_by_hand(model, inputs, state, case)
    wanted, streams = steered_by_hand(model, inputs, vector, case, positions == "authors_code")

    l2s = sp.L2S.from_published(path, positions=positions)
    seen: list[Tensor] = []
    with plain_hooks(model, ("resid_pre", case.write + 1, seeing(seen))):
        ids = vlm.generate(steering=l2s, **inputs, max_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(ids, wanted)
    assert not torch.equal(ids, greedy(model, inputs, TOKENS))
    # A read behind its write takes a pass of its own, unsteered, before the steered one.
    assert len(seen) - len(streams) == (case.read > case.write)
    real = inputs["attention_mask"].bool()
    for got, want in zip(seen[-len(streams) :], streams, strict=True):
        width = got.shape[1]  # the replay of a late read runs the last prompt token alone
        chosen = real[:, -width:] if want.shape[1] > 1 else torch.ones(2, 1, dtype=torch.bool)
        torch.testing.assert_close(got[chosen], want[:, -width:][chosen], atol=TOLERANCE, rtol=TOLERANCE)
    words = WORDS if case.made == "llava" else QWEN_WORDS
    assert vlm.decode(ids[:, -TOKENS:]) == [" ".join(words[i] for i in row[-TOKENS:]) for row in wanted.tolist()]


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_refused_by_the_other_model(models, shared, name):
    case = CASES[name]
    (other,) = (vlm for made, vlm in models.items() if made != case.made)
    l2s = sp.L2S.from_published(shared / "data" / "l2s_checkpoints" / case.file)
    with pytest.raises(sp.ArtefactError, match=rf"family '{case.made}'"):
        other.generate(steering=l2s, **other.inputs(QUESTIONS, PICTURES), max_new_tokens=1)
