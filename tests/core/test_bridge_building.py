"""Building a TransformerLens bridge around a model in memory: what it leaves alone, what it brings, what it refuses."""

from __future__ import annotations

import copy
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import _zoo
import pytest
import torch
import transformers as hf
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

import steer_plugin as sp
from steer_plugin.adapters import architectures
from steer_plugin.adapters.transformer_lens import build_bridge

GROUP = "transformer_lens.architectures"


def declared() -> dict[str, str]:
    project = tomllib.loads((Path(sp.__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["entry-points"][GROUP]


def test_entry_points_are_declared_and_resolve():
    files = {path.stem for path in Path(architectures.__path__[0]).glob("[!_]*.py")}
    assert {value.split(":")[0].removeprefix(f"{architectures.__name__}.") for value in declared().values()} == files
    for name, value in declared().items():
        adapter = EntryPoint(name, value, GROUP).load()
        assert issubclass(adapter, ArchitectureAdapter)
        assert issubclass(getattr(hf, name), hf.PreTrainedModel)


def test_an_installed_package_brings_them():
    """Fails after an editable install that is older than pyproject.toml: install again."""
    assert {point.name: point.value for point in entry_points(group=GROUP)}.items() >= declared().items()


def test_adapters_stay_as_they_were():
    """Building without torchvision leaves nothing behind in TransformerLens' registry."""
    ArchitectureAdapterFactory.discover_entry_points()
    before = dict(ArchitectureAdapterFactory._adapters)
    build_bridge(_zoo.tiny("qwen2_5_vl"))
    with pytest.raises(sp.FrameworkError):
        build_bridge(misfit())
    assert ArchitectureAdapterFactory._adapters == before
    assert before["Qwen2_5_VLForConditionalGeneration"].required_libraries == ["torchvision"]


def test_weights_stay_as_they_are():
    """TransformerLens' own adapter ties OneVision's lm_head where the decoder's config says so, not the model's."""
    model = _zoo.tiny("llava_onevision")
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = False, True
    weight = model.lm_head.weight
    assert build_bridge(model).original_model.lm_head.weight is weight


def test_a_tower_that_transformer_lens_takes_for_another():
    """Pixtral 12B is a LLaVA; its tower becomes one component, hooked underneath."""
    inputs, like = _zoo.inputs_of("mistral3"), _zoo.tiny("mistral3").config
    vision = {**_zoo.VISION, "model_type": "pixtral", "image_size": 32, "head_dim": 8}
    config = hf.LlavaConfig(
        vision_config=vision, text_config=like.text_config, image_token_index=like.image_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = hf.LlavaForConditionalGeneration(config).eval()
    plain = copy.deepcopy(model)
    vlm = sp.attach(build_bridge(model))
    assert vlm.hook_name(sp.projector()) == "vision_projector.hook_out"
    with pytest.raises(sp.SiteError, match="as a whole"):
        vlm.hook_name(sp.vision_mlp_raw(0))
    assert vlm.ends(sp.vision_mlp_raw(0))[0] is model.model.vision_tower.transformer.layers[0].feed_forward
    with torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_users_tokenizer_stays_as_it_is(name: str):
    processor = copy.deepcopy(_zoo.processor_of(name))
    tokenizer = processor.tokenizer
    before, ids = copy.deepcopy(tokenizer.__dict__["init_kwargs"]), tokenizer("w1 w2")["input_ids"]
    state = (tokenizer.padding_side, tokenizer.special_tokens_map)
    bridge = build_bridge(_zoo.tiny(name), processor)
    assert tokenizer.init_kwargs == before and (tokenizer.padding_side, tokenizer.special_tokens_map) == state
    assert bridge.processor is processor and bridge.tokenizer is not tokenizer
    assert tokenizer("w1 w2")["input_ids"] == ids
    assert bridge.to_tokens("w1 w2", prepend_bos=name == "llava")[0].tolist() == ids
    assert bridge.cfg.tokenizer_prepends_bos == (name == "llava")
    assert sp.attach(bridge).processor is processor


# -- refusals ----------------------------------------------------------------------------------------------------


def misfit() -> hf.LlavaForConditionalGeneration:
    """LLaVA over a decoder of another layout."""
    text = hf.PhiConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, pad_token_id=0
    )
    vision = hf.CLIPVisionConfig(**_zoo.VISION, projection_dim=16)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))


def test_models_that_no_bridge_holds():
    with pytest.raises(sp.FrameworkError, match=r"got Linear.*merge_and_unload.*sp\.attach\(model\)"):
        build_bridge(nn.Linear(2, 2))
    with pytest.raises(sp.FrameworkError, match=r"already inside a TransformerBridge.*sp\.attach\(bridge\)"):
        build_bridge(build_bridge(_zoo.tiny("llava")).original_model)
    with pytest.raises(sp.FrameworkError, match=r"'llava' model apart.*Load the model again.*NNsight\(model\)"):
        build_bridge(misfit())


def test_a_text_only_model_is_refused_before_it_is_changed():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**_zoo.TEXT, "num_hidden_layers": 1}))
    before = [type(module) for module in model.modules()]
    with pytest.raises(sp.FamilyError, match="text-only"):
        build_bridge(model)
    assert [type(module) for module in model.modules()] == before


def test_a_family_that_transformer_lens_lacks():
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_zoo.VISION, projection_dim=16), text_config=hf.LlamaConfig(**_zoo.TEXT),
        image_token_index=5, vision_feature_layers=[-1],
    )  # fmt: skip
    lm = "model.language_model"
    sp.register_family(sp.Family(name="vip", model_types=("vipllava",), decoder=lm, layers=f"{lm}.layers"))
    wanted = r"cannot host family 'vip'.*no architecture 'VipLlava.*sp\.attach\(model\).*NNsight\(model\)"
    with pytest.raises(sp.FrameworkError, match=wanted):
        build_bridge(hf.VipLlavaForConditionalGeneration(config))
