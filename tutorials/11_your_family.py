# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 11. Your own model family
#
# What you will see:
#
# 1. a vision-language model that the package has never heard of, written in this notebook, and what `sp.attach` says to
#    it;
# 2. a record of six lines that makes it steerable, and `vlm.check()`, which tries it out;
# 3. what each field of the record means, and what `check` says when a field is wrong;
# 4. `replay` and `branches`: what may be left out of the work, counted in tokens;
# 5. how to test a family: against hooks of torch, in a batch, with a read behind the write, and in nnsight.
#
# A family is data: where the modules are, and a few habits. No code of the package knows a model by name
# ([families](../docs/families.md)). Everything runs on one CPU core in less than a minute.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import copy
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

import steer_plugin as sp

logging.disable_progress_bar()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. A model that nobody knows
#
# *Pebble* has eyes, a bridge and words: a CLIP tower, two linear layers, and a Llama decoder. Its modules have names of
# their own. What a model must bring to be steered is what `generate` needs anyway: a config with `vision_config`,
# `text_config` and an `image_token_id`, a forward that takes `input_ids` and `pixel_values`, and a decoder module that
# runs the layers and is called with the cache. `logits_to_keep` is asked for too, because nobody wants logits of 600
# picture tokens.


# %%
class PebbleConfig(PretrainedConfig):
    """A vision tower, a text decoder, and the token that stands for a patch."""

    model_type = "pebble"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(self, vision_config=None, text_config=None, image_token_id=None, **kwargs):
        self.vision_config, self.text_config, self.image_token_id = vision_config, text_config, image_token_id
        super().__init__(**kwargs)


class Pebble(PreTrainedModel, GenerationMixin):
    """Eyes, a bridge, words."""

    config_class = PebbleConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        wide, d_model = config.vision_config.hidden_size, config.text_config.hidden_size
        self.eyes = AutoModel.from_config(config.vision_config)
        self.bridge = nn.Sequential(nn.Linear(wide, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        self.words = AutoModel.from_config(config.text_config)
        self.speak = nn.Linear(d_model, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words.embed_tokens

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_to_keep=0,
        **kwargs,
    ):
        h = self.words.embed_tokens(input_ids)
        patches = input_ids == self.config.image_token_id
        if pixel_values is not None and bool(patches.any()):  # while decoding there is no picture to look at
            seen = self.eyes(pixel_values).last_hidden_state[:, 1:]
            h = h.masked_scatter(patches[..., None], self.bridge(seen).to(h))
        out = self.words(
            inputs_embeds=h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.speak(out.last_hidden_state[:, keep])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


# %% [markdown]
# So that it has something to say, Pebble gets the weights of the pocket VLM, part by part. It is another class with
# other names, and must give the same answers: that is a test that no line of the package can pass by accident.

# %%
twin, processor = sp.pocket.load()
world = sp.pocket.World(0)


def pebble():
    """A Pebble with the pocket VLM's weights."""
    parts = (copy.deepcopy(one) for one in (twin.config.vision_config, twin.config.text_config))
    config = PebbleConfig(*parts, twin.config.image_token_id)
    model = Pebble(config).eval()
    model.eyes.load_state_dict(twin.model.vision_tower.state_dict())
    projector = twin.model.multi_modal_projector
    for ours, theirs in ((model.bridge[0], projector.linear_1), (model.bridge[2], projector.linear_2)):
        ours.load_state_dict(theirs.state_dict())
    model.words.load_state_dict(twin.model.language_model.state_dict())
    model.speak.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    model.generation_config = twin.generation_config
    return model


model = pebble()
try:
    sp.attach(model, processor)
except sp.FamilyError as error:
    print(error)

# %% [markdown]
# ## 2. A record
#
# Paths are relative to the model. The vision tower's own type is CLIP, which the package knows, so its layers need not
# be spelled out; the decoder's layers call their parts `self_attn` and `mlp`, which is the default.

# %%
PEBBLE = sp.Family(
    name="pebble",
    model_types=("pebble",),
    decoder="words",
    layers="words.layers",
    vision="eyes",
    projector="bridge",
)
sp.register_family(PEBBLE)
vlm = sp.attach(model, processor)
print(vlm.check(progress=False))

# %% [markdown]
# Some fifty short forwards, on the model itself: every site fires and is as wide as it should be, what is called
# `attn_out` and `mlp_out` is what the stream gains, strength 0 changes no bit, one token asked for is one token
# written, cached equals uncached, a batch equals its rows, a read behind the write equals the same read done
# beforehand, and a hook of a few lines agrees. `steer-plugin check NAME` does the same from the command line.
#
# And the answers? The same steering on both models, on questions that it changes.

# %%
from steer_plugin.contrast import pocket_pairs
from steer_plugin.training.config import preset

reference = sp.attach(twin, processor)
asked = [q for q in world.questions(24, "test", ["popular"])]
inputs = vlm.inputs([q.text for q in asked], [q.image for q in asked])
prompt = inputs["input_ids"].shape[1]

pairs = pocket_pairs(world.questions(60, "train", ["popular"]))
shifts = vlm.extract(pairs, "resid_post.1", batch_size=40, progress=False)
theirs = reference.extract(pairs, "resid_post.1", batch_size=40, progress=False)
print(f"P2S vectors of both models differ by at most {float((shifts.vectors - theirs.vectors).abs().max()):.1e}")

l2s = sp.L2S.fit(shifts, preset("pope", learning_rate=1e-3), positions="last_prompt")
for name, steering in {"unsteered": None, "L2S": l2s * 2.0}.items():
    # An artefact remembers the family that it was fitted on; the same network without it fits both.
    other = None if steering is None else sp.L2S(l2s.network, l2s.write, positions="last_prompt") * 2.0
    ours = vlm.generate(**inputs, steering=steering, max_new_tokens=8)
    assert torch.equal(ours, reference.generate(**inputs, steering=other, max_new_tokens=8))
    said = vlm.decode(ours[:, prompt:])
    right = sum(text.startswith("yes" if q.label else "no") for text, q in zip(said, asked, strict=True))
    print(f"{name:>9}: {right} of {len(asked)} right, token for token what the pocket VLM says")

try:
    reference.generate(**inputs, steering=l2s, max_new_tokens=8)
except sp.ArtefactError as error:
    print("but:", error)

# %% [markdown]
# ## 3. The fields
#
# | field | what it says | when it is wrong |
# | --- | --- | --- |
# | `name`, `model_types` | how messages call it; `config.model_type` values | nobody finds the record |
# | `decoder` | the module whose forward runs the layers; twins and replay live at its boundary | late reads and SteerVLM fail |
# | `layers` | the decoder layers: `resid_pre` and `resid_post` are their input and output | sites of another tower |
# | `attention`, `mlp` | within a layer; `attn_raw` and `mlp_raw` are their outputs | such sites are refused |
# | `attn_added`, `mlp_added` | the norms behind them, where these are what is added (Gemma 2 and 3) | "added to the stream" fails |
# | `cross_attention`, `scaled` | layers that look at the picture; a factor outside any module (Granite) | the same |
# | `vision`, `vision_layers`, `vision_attention`, `vision_mlp`, `vision_width` | the tower; only the first is needed for towers that are known | no vision sites |
# | `projector` | what gives the decoder its picture tokens | no such site |
# | `assistant_headers` | what opens the answer, for models without a chat template | `user_end` is not known |
# | `positions` | do position ids count the mask ("mask"), from 1 ("mask+1"), or does the model make its own ("own", mRoPE)? | a batch differs from its rows |
# | `replay` | may the last token run again behind a cropped cache? | late reads differ |
# | `branches` | what may run once for several answers? | vectors differ |
#
# Four slips, and what comes of them:

# %%
slips = {
    "layers of the wrong tower": replace(PEBBLE, layers="eyes.encoder.layers"),
    "a module that is not there": replace(PEBBLE, mlp="feed_forward"),
    "Gemma's norm, which Llama has too": replace(PEBBLE, attn_added="post_attention_layernorm"),
    "positions of a model that counts from 1": replace(PEBBLE, positions="mask+1"),
}
for slip, record in slips.items():
    sp.register_family(record)
    try:
        report = sp.attach(model, processor).check(progress=False)
    except sp.SteeringError as error:
        print(f"{slip}\n    {type(error).__name__}: {error}")
        continue
    print(slip)
    odd = [check for check in report.checks if check.state == "failed" or "refused" in check.found]
    for check in odd[:2]:
        print(f"    {check.state}: {check.name}: {check.found[:128]}")
        if check.mend:
            print(f"        mend: {check.mend}")
    if not odd:
        print("    all checks passed")

sp.register_family(PEBBLE)  # a later record of the same model type takes the place of the earlier one
vlm = sp.attach(model, processor)

# %% [markdown]
# The third slip is an easy one: the name is right for Gemma, where that norm lies behind the attention; in Llama it
# lies before the MLP. The last slip goes unnoticed, and rightly: Pebble's decoder has rotary positions, which know
# distances alone, so counting from 1 changes nothing. A check finds what shows on your model.
#
# ## 4. What may be left out
#
# **`replay`** is about steering that reads behind its write ([notebook 2](02_caching_and_positions.ipynb)). "exact":
# the prompt runs once for the context, the KV cache is cropped by one and the last token runs again. "second_pass": the
# prompt runs again. Crop only what can be cropped: a cache with sliding windows forgets, and where the prompt attends
# both ways the last token was seen by the others.
#
# **`branches`** is about extraction ([notebook 3](03_p2s_and_l2s.ipynb)). "exact": any beginning of a prompt may run
# once for what follows. "prompt": whole prompts only. "none": each answer behind its own whole prompt.
#
# The slow choices are always right, so begin with them; then see whether the quick ones give the same. We count the
# tokens that go through layer 0.


# %%
def counted(job):
    """What a job gives, and how many tokens it sends through layer 0."""
    passed = []

    def count(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        passed.append(hidden.shape[0] * hidden.shape[1])

    handle = model.words.layers[0].register_forward_pre_hook(count, with_kwargs=True)
    result = job()
    handle.remove()
    return result, sum(passed)


late = sp.L2S(l2s.network, "resid_post.1", "resid_post.3", positions="paper")
eight = pairs[:8]
one = {key: value[:4] for key, value in inputs.items()}
used, results = {}, {}
for replay in ("second_pass", "exact"):
    sp.register_family(replace(PEBBLE, replay=replay))
    vlm = sp.attach(model, processor)
    key = f"replay\n{replay}"
    results[key], used[key] = counted(partial(vlm.generate, **one, steering=late * 2.0, max_new_tokens=4))
for branches in ("none", "prompt", "exact"):
    sp.register_family(replace(PEBBLE, branches=branches))
    vlm = sp.attach(model, processor)
    key = f"branches\n{branches}"
    found, used[key] = counted(partial(vlm.extract, eight, "resid_post.1", batch_size=8, progress=False))
    results[key] = found.vectors

figure, axes = plt.subplots(figsize=(7.5, 3))
colours = ["0.75" if key.startswith("replay") else "#1f5f8b" for key in used]
bars = axes.bar(list(used), list(used.values()), color=colours, width=0.6)
axes.bar_label(bars, fontsize=9)
axes.set_ylabel("tokens through layer 0")
axes.set_title("grey: 4 prompts answered with a late read;  blue: 8 pairs extracted", fontsize=10)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

assert torch.equal(results["replay\nsecond_pass"], results["replay\nexact"])
for branches in ("prompt", "exact"):
    apart = (results[f"branches\n{branches}"] - results["branches\nnone"]).abs().max()
    print(f"vectors with branches={branches!r} differ from those of whole forwards by at most {float(apart):.1e}")
sp.register_family(PEBBLE)
vlm = sp.attach(model, processor)

# %% [markdown]
# ## 5. Test it
#
# `check` is quick and knows nothing of your model. Four tests that a family should have; the package has them for each
# of its own (`tests/core/test_families.py`).
#
# **Every site against a hook of torch**, where *you* say which module is meant.

# %%
vector = torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(0)) * 2
layer = "words.layers.1"
by_hand = {
    "resid_pre.1": (layer, True),
    "attn_out.1": (f"{layer}.self_attn", False),
    "mlp_out.1": (f"{layer}.mlp", False),
    "resid_post.1": (layer, False),
    "projector": ("bridge", False),
}


def hooked(path, entering):
    """A generation with the vector added at a module by a plain hook: at every token of the prompt, and when decoding."""

    def pre(module, args, kwargs):
        return (args[0] + vector, *args[1:]), kwargs

    def post(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(pre, with_kwargs=True) if entering else module.register_forward_hook(post)
    with torch.no_grad():
        found = model.generate(**one, **scored)
    handle.remove()
    return found


scored = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
plain = model.generate(**one, **scored)
for site, (path, entering) in by_hand.items():
    # Padding is steered by the hook and not by us; nobody attends to it.
    with vlm.steering(sp.add(site, vector, "everywhere")) as steered:
        ours = steered.generate(**one, **scored)
    theirs = hooked(path, entering)
    assert torch.equal(ours.sequences, theirs.sequences)
    apart, moved = (float((ours.scores[0] - other.scores[0]).abs().max()) for other in (theirs, plain))
    print(f"{site:>13}: scores move by {moved:.1f}, and differ from those of a hook on {path} by {apart:.0e}")

# %% [markdown]
# **A batch equals its rows**, **a late read equals one done in a pass of its own**, and **nnsight gives the same
# tokens**. TransformerLens hosts architectures that have an adapter there; for Pebble one would have to be written and
# registered under `transformer_lens.architectures`, as this package does for five families.

# %%
from nnsight import NNsight

steering = l2s * 2.0
whole = vlm.decode(vlm.generate(**inputs, steering=steering, max_new_tokens=8)[:, prompt:])
rows = []
for q in asked[:8]:
    single = vlm.inputs(q.text, q.image)
    rows += vlm.decode(vlm.generate(**single, steering=steering, max_new_tokens=8)[:, single["input_ids"].shape[1] :])
assert whole[:8] == rows

contexts = vlm.cache(one, "resid_post.3", "last_prompt")["resid_post.3"][:, 0]
beforehand = sp.add("resid_post.1", late.predict(contexts) * 2.0, "paper")
assert torch.equal(
    vlm.generate(**one, steering=late * 2.0, max_new_tokens=8),
    vlm.generate(**one, steering=beforehand, max_new_tokens=8),
)

nn_model = NNsight(pebble())
nn_vlm = sp.attach(nn_model, processor)
with torch.no_grad(), nn_model.trace(**one):
    steering.apply(nn_vlm)
    seen = nn_model.words.layers[3].output.save()
assert torch.equal(
    nn_vlm.generate(**one, steering=steering, max_new_tokens=8),
    vlm.generate(**one, steering=steering, max_new_tokens=8),
)
print("batch = rows; late read = a pass of its own; nnsight = torch; your own read in the trace:", tuple(seen.shape))

# %% [markdown]
# ## Exercises
#
# 1. Give Pebble's record `assistant_headers=("ASSISTANT:",)` and attach it without a processor. What do
#    `vlm.show_positions(inputs, "user_end")` and the same without the header say?
# 2. Put an `nn.LayerNorm` behind the attention of each of Pebble's decoder layers. What does "added to the stream" say,
#    and what does the record have to say?
# 3. Let the prompt attend both ways (a 4-D attention mask). Which of `replay` and `branches` must change, and which
#    test finds it?
# 4. Where is a picture's token on the picture? `plot_positions` says that it does not know Pebble's geometry. Why is
#    that not part of the record?
#
# ## Read on
#
# - [Families](../docs/families.md): the records of thirteen families, and what was tested of each.
# - [Concepts](../docs/concepts.md): why a late read needs a replay, and what a twin is. [Limits](../docs/limits.md):
#   messages.
# - [Notebook 10](10_your_method.ipynb): your own method on any family.
