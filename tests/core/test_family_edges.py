"""Corners of the families: decoders that scale what they add, bridged models attached plainly, silent places."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator

import _zoo
import _zoo_processors as processors
import pytest
import torch
import transformers as hf
from nnsight import NNsight
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin import families
from steer_plugin.adapters._chat import chat_text, completion_ids
from steer_plugin.cli import app
from steer_plugin.contrast import ContrastivePair


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(families._registry.by_type)
    yield
    families._registry.by_type = before


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def granite(request: pytest.FixtureRequest) -> sp.AttachedModel:
    """LLaVA-NeXT over Granite, which adds 0.22 of what its attention and MLP give."""
    config = _zoo.llava_next(_zoo.processor_of("llava_next").tokenizer.convert_tokens_to_ids)
    config.text_config = hf.GraniteConfig(**_zoo.TEXT, residual_multiplier=0.22)
    torch.manual_seed(0)
    model = hf.LlavaNextForConditionalGeneration(config).eval().to(request.param)
    return sp.attach(model, _zoo.processor_of("llava_next"))


def test_a_decoder_that_scales_what_it_adds(granite: sp.AttachedModel):
    inputs = _zoo.inputs_of("llava_next", 1)
    for kind in ("attn", "mlp"):
        with pytest.raises(sp.SiteError, match=rf"residual_multiplier=0\.22.*'{kind}_raw\.1'"):
            granite.cache(inputs, f"{kind}_out.1")
    sites = [sp.Site(kind, 1) for kind in ("resid_pre", "attn_raw", "mlp_raw", "resid_post")]
    got = granite.cache(inputs, sites)
    before, attention, mlp, after = (got[site][got.mask].float() for site in sites)
    torch.testing.assert_close(before + 0.22 * (attention + mlp), after, rtol=2e-2, atol=2e-2)
    assert granite.check(inputs, progress=False).ok


def test_a_factor_that_the_record_does_not_know_is_found_in_any_precision(
    granite: sp.AttachedModel, registered: None, monkeypatch: pytest.MonkeyPatch
):
    object.__setattr__(granite.parts, "family", dataclasses.replace(granite.parts.family, scaled=None))
    report = granite.check(_zoo.inputs_of("llava_next", 1), progress=False)
    assert [check.name for check in report.checks if check.state == "failed"] == ["added to the stream"]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_bridged_model_attached_plainly_steers_its_vision_layers(name: str):
    model, inputs = _zoo.tiny(name), _zoo.inputs_of(name)
    before = sp.attach(model, _zoo.processor_of(name))
    bridged = sp.attach(model, _zoo.processor_of(name), framework="transformer_lens")
    last = before.parts.last_vision_layer
    steering = sp.MeanSteering(torch.ones(16) * 5, site=sp.vision_resid_post(last), positions="everywhere")
    with torch.no_grad():
        unsteered = model(**inputs).logits
        logits = []
        for vlm in (before, bridged):
            with vlm.steering(steering):
                logits.append(model(**inputs).logits)
    assert not torch.equal(logits[0], unsteered)
    assert torch.equal(*logits)


def test_places_that_do_not_run_without_a_picture():
    vlm, text = sp.attach(_zoo.tiny("llava"), _zoo.processor_of("llava")), None
    text = vlm.inputs(["w1 w2"])
    projector = sp.MeanSteering(torch.ones(_zoo.D), site=sp.projector(), positions="everywhere")
    with pytest.raises(sp.SiteError, match=r"projector did not run in \d+ forward.*without a picture"):
        vlm.generate(**text, steering=projector, max_new_tokens=2)
    with pytest.raises(sp.SiteError, match="projector did not run"):
        vlm.cache(text, sp.projector())
    mllama = sp.attach(_zoo.tiny("mllama"), _zoo.processor_of("mllama"))
    bare = mllama.inputs(["w1 w2"])
    with pytest.raises(sp.SiteError, match=r"resid_post\.1 did not run"):
        mllama.cache(bare, [sp.resid_post(1), sp.resid_post(2)])
    with pytest.raises(sp.SiteError, match=r"resid_post\.1 did not run"):
        mllama.generate(**bare, steering=sp.add("resid_post.1", torch.ones(_zoo.D)), max_new_tokens=2)
    assert mllama.cache(bare, sp.resid_post(2))[sp.resid_post(2)].isfinite().all()


def test_a_newer_record_is_used_by_the_next_attach(registered: None):
    model = _zoo.tiny("gemma3")
    vlm = sp.attach(model)
    record = next(one for one in families.known_families() if one.name == "gemma3")
    sp.register_family(dataclasses.replace(record, attn_added="self_attn"))
    newer = sp.attach(model)
    assert newer is not vlm
    assert newer.parts.family.attn_added == "self_attn"
    assert sp.attach(model) is newer


def test_a_bridge_that_nobody_holds_is_found_again():
    model, processor = _zoo.tiny("llava"), _zoo.processor_of("llava")
    bridge = sp.attach(model, processor, framework="transformer_lens").model
    name = id(bridge)
    del bridge
    gc.collect()
    assert id(sp.attach(model, processor, framework="transformer_lens").model) == name
    assert not any("bridge" in key for key in model.state_dict())


def test_torch_as_a_framework_is_the_plain_attach():
    model, processor = _zoo.tiny("llava"), _zoo.processor_of("llava")
    assert sp.attach(model, processor, framework="torch") is sp.attach(model, processor)
    with pytest.raises(sp.InputError, match="framework='torch' takes a plain Hugging Face model, got NNsight"):
        sp.attach(NNsight(model), framework="torch")


def gemma_like() -> hf.PaliGemmaProcessor:
    """PaliGemma's processor with a tokenizer that, like Gemma's, makes a space part of the word behind it."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "\n", "<image>", *(f"{a}w{i}" for a in ("", "▁") for i in range(9))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|\n"), "isolated")
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return hf.PaliGemmaProcessor(image_processor=processors.siglip_images(image_seq_length=4), tokenizer=tokenizer)


def test_answers_of_paligemma_stand_on_a_line_of_their_own():
    """The tokens that its own processor gives for a suffix, end of sequence aside."""
    processor = gemma_like()
    own = processor(text=["<image>w1 w2"], images=[[_zoo.picture(16, 16)]], suffix=["w3 w4"])["input_ids"][0]
    ours = completion_ids(processor, "w1 w2", "w3 w4", "pair")
    assert own[-1 - len(ours) : -1] == ours
    assert processor.tokenizer.convert_ids_to_tokens(ours) == ["w3", "▁w4"]


def test_a_template_that_only_the_tokenizer_has():
    processor = processors.qwen("Qwen2VLProcessor")
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    vlm = sp.attach(_zoo.tiny("qwen2_vl"), processor)
    assert chat_text(processor, "w1", 1) == _zoo.chat(_zoo.processor_of("qwen2_vl"), "w1")
    assert vlm.show_positions(vlm.inputs(["w1"], [_zoo.picture(32, 16)]), "user_end", show=False).counts == [1]


@pytest.mark.parametrize("site", ["projector", "vision_resid_post.0"])
def test_extraction_is_of_the_decoder(site: str, tmp_path):
    vlm = sp.attach(_zoo.tiny("llava"), _zoo.processor_of("llava"))
    pair = ContrastivePair("p", (_zoo.picture(16, 16),), "w1", "w2", "w3")
    with pytest.raises(sp.SiteError, match=r"extraction cannot use.*site of the decoder"):
        vlm.extract([pair], write=site, out=tmp_path / "shifts", progress=False)
    assert not (tmp_path / "shifts").exists()


def test_the_command_fails_for_a_framework_that_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    """Unknown names are refused before the model is loaded; one that cannot host the model is a failure, not a note."""
    from steer_plugin import adapters

    loaded: list[str] = []
    monkeypatch.setattr("steer_plugin.loading.load_plain", lambda *a: loaded.append("model"))
    done = CliRunner().invoke(app, ["check", "pocket", "--framework", "torch", "--framework", "tensorflow"])
    assert isinstance(done.exception, sp.InputError)
    assert not loaded
    monkeypatch.undo()

    def missing(name: str) -> object:
        raise sp.FrameworkError(f"{name} is not installed.")

    real = adapters.load_adapter
    monkeypatch.setattr(adapters, "load_adapter", lambda name: missing(name) if name == "nnsight" else real(name))
    done = CliRunner().invoke(app, ["check", "pocket", "--framework", "nnsight"], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "not hosted: nnsight is not installed" in done.output


def test_a_record_with_the_wrong_layers_gets_a_report(registered: None):
    """Layers that do not run for text alone: no crash, but a line that says which site never fired."""
    record = next(one for one in families.known_families() if one.name == "llava")
    sp.register_family(dataclasses.replace(record, layers="model.vision_tower.encoder.layers"))
    vlm = sp.attach(_zoo.tiny("llava"), _zoo.processor_of("llava"))
    report = vlm.check(vlm.inputs(["w1 w2"]), progress=False)
    assert not report.ok
    assert "never fires" in str(report) or "did not run" in str(report)
