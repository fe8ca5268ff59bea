"""Law 5: every site that is accepted fires; one that cannot be written faithfully is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from _tiny import ADAPTERS, D_MODEL, D_VISION, DECODER_KINDS, LAYERS, VISION_KINDS, VISION_LAYERS, draw, forward_logits

import steer_plugin as sp

SITES = [
    *[f"{kind}.{layer}" for kind in DECODER_KINDS for layer in (0, LAYERS - 1, -1)],
    *[f"{kind}.{layer}" for kind in VISION_KINDS for layer in range(VISION_LAYERS)],
    "projector",
]


@pytest.mark.parametrize("site", SITES)
def test_a_large_write_changes_the_logits(vlm, plain, placed, site: str):
    width = D_VISION if site.startswith("vision") else D_MODEL
    with torch.no_grad():
        expected = plain(**placed).logits[:, -1]
    with vlm.steering(sp.add(site, 20 * draw(width), "everywhere")) as steered:
        got = forward_logits(vlm, steered, placed)[:, -1]
    assert ((got - expected).abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize("site", SITES)
def test_every_site_can_be_read(vlm, inputs, site: str):
    width = D_VISION if site.startswith("vision") else D_MODEL
    values = vlm.cache(inputs, [site]).values
    assert [v.shape[-1] for v in values.values()] == [width]
    assert all(v.any() for v in values.values())


@pytest.mark.parametrize("kind", ["resid_mid", "attn_scores", "attn_pattern"])
def test_refused_with_the_reason(kind: str):
    with pytest.raises(sp.SiteError, match=rf"{kind}.*cannot be used: .{{30,}}"):
        sp.Site(kind, 3)
    with pytest.raises(sp.SiteError, match=kind):
        sp.add(f"{kind}.3", draw(D_MODEL))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("resid_pots", "resid_post"), ("atn_out", "attn_out"), ("mlpout", "mlp_out"), ("vision_mlp_ot", "vision_mlp_out")],
)
def test_unknown_site_proposes_the_nearest(wrong: str, meant: str):
    with pytest.raises(sp.SiteError, match=rf"'{wrong}'.*Did you mean '{meant}'"):
        sp.Site.parse(f"{wrong}.3")


@pytest.mark.parametrize(
    "text", ["resid_post", "resid_post.", "resid_post.x", "resid_post.1.2", "projector.3", "", ".", "resid_post.1.5"]
)
def test_broken_site_texts(text: str):
    with pytest.raises(sp.SiteError) as caught:
        sp.Site.parse(text)
    assert "integer" in str(caught.value) or "layer" in str(caught.value) or "Known sites" in str(caught.value)


@pytest.mark.parametrize("text", [*SITES, "resid_post.0014", "resid_pre.-2"])
def test_texts_of_sites_round_trip(text: str):
    site = sp.Site.parse(text)
    assert sp.Site.parse(str(site)) == site
    assert sp.Site.parse(site) is site


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1, 99])
def test_layer_out_of_range(vlm, inputs, layer: int):
    steering = sp.add(sp.resid_post(layer), draw(D_MODEL))
    for act in (
        lambda: vlm.generate(**inputs, steering=steering, max_new_tokens=1),
        lambda: vlm.steering(steering).__enter__(),
        lambda: vlm.cache(inputs, [sp.resid_post(layer)]),
    ):
        with pytest.raises(sp.SiteError, match=rf"{layer}.*{LAYERS} decoder layers.*0 to {LAYERS - 1}"):
            act()


def test_vision_layer_out_of_range(vlm, inputs):
    with pytest.raises(sp.SiteError, match=rf"7.*{VISION_LAYERS} vision layers"):
        vlm.generate(**inputs, steering=sp.add("vision_mlp_out.7", draw(D_VISION), "everywhere"), max_new_tokens=1)


def test_negative_layers_count_from_the_end(vlm, inputs):
    one = vlm.generate(**inputs, steering=sp.add("resid_post.-2", 5 * draw(D_MODEL)), max_new_tokens=3, do_sample=False)
    two = vlm.generate(**inputs, steering=sp.add("resid_post.2", 5 * draw(D_MODEL)), max_new_tokens=3, do_sample=False)
    assert torch.equal(one, two)
    assert torch.equal(
        vlm.cache(inputs, ["resid_post.-1"])["resid_post.3"], vlm.cache(inputs, ["resid_post.3"])["resid_post.3"]
    )


def test_a_cached_negative_layer_is_found_by_its_own_name(torch_vlm, inputs):
    assert torch_vlm.cache(inputs, [sp.resid_post(-1)])[sp.resid_post(-1)].shape[-1] == D_MODEL


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_hidden_states_that_transformers_returns_are_the_written_ones(name: str, placed):
    """`output_hidden_states=True` is a user's own read: it must see the written value, at the first call and later."""
    vlm = ADAPTERS[name]()
    steering = sp.add("resid_post.1", 9 * draw(D_MODEL), "everywhere")
    with torch.no_grad():
        vlm.root(**placed, output_hidden_states=True)
        with vlm.steering(steering) as steered:
            call = vlm.root if name == "transformer_lens" else steered
            states = call(**placed, output_hidden_states=True).hidden_states
    written = vlm.cache(placed, ["resid_post.1"], "last_prompt", steering=steering)["resid_post.1"]
    torch.testing.assert_close(states[2][:, -1:], written)


def test_vision_sites_know_patches_only(vlm, inputs):
    with pytest.raises(sp.InputError, match=r"'last_prompt'.*patches.*everywhere"):
        vlm.generate(**inputs, steering=sp.add("vision_mlp_out.0", draw(D_VISION), "last_prompt"), max_new_tokens=1)
    with pytest.raises(sp.InputError, match=r"patches"):
        vlm.cache(inputs, ["projector"], positions="text")


def test_picture_and_decoder_sites_are_cached_apart(vlm, inputs):
    with pytest.raises(sp.InputError, match="apart"):
        vlm.cache(inputs, ["vision_mlp_out.0", "resid_post.1"])
    with pytest.raises(sp.InputError, match="at least one site"):
        vlm.cache(inputs, [])


def test_reads_in_the_vision_tower_are_refused(vlm, inputs):
    write = sp.Write(
        sp.resid_post(1),
        sp.Positions.parse("paper"),
        lambda h, c: h,
        reads=(sp.Read.at("vision_mlp_out.0", "everywhere"),),
    )
    with pytest.raises(sp.SiteError, match=r"resid_pre\(0\)"):
        vlm.generate(**inputs, steering=sp.Intervention((write,)), max_new_tokens=1)
