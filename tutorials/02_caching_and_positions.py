# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Caching, positions, late reads and patching
#
# What you will see:
#
# 1. which tokens a vision-language model sees, and how to name them;
# 2. the image tokens drawn on the picture, and what their hidden states look like;
# 3. activations read at several sites and positions in one call, and a direction that tells yes from no;
# 4. what happens when a steering reads *behind* the place where it writes, and how many tokens that runs again;
# 5. a patch: an activation of one picture put into another one.
#
# Everything runs on one CPU core in less than a minute.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging

import steer_plugin as sp

logging.disable_progress_bar()
torch.set_num_threads(1)

model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
world = sp.pocket.World(0)
scene = world.scene(0)
inputs = vlm.inputs("Is there a dog in the image?", scene.image)
print(f"{vlm.n_layers} decoder layers of width {vlm.d_model}; in the picture: {', '.join(sorted(scene.nouns))}")

# %% [markdown]
# ## Positions
#
# Positions name groups of tokens. `show_positions` says token by token what a name selects (`>`), and which names hold
# for each token. The default of every method is `"last_prompt|generated"`.

# %%
_ = vlm.show_positions(inputs, "last_prompt|generated")

# %% [markdown]
# Names combine with `|`, `&` and `~`, as text or in Python. Padding is never selected: rows of a batch may have
# different lengths.

# %%
batch = vlm.inputs(["Is there a dog in the image?", "Describe the image."], [scene.image, world.scene(1).image])
for positions in ("image", "text", "prompt & ~image", sp.image | sp.last_prompt, "user_end", "everywhere"):
    shown = vlm.show_positions(batch, positions, show=False)
    then = "and every token fed back" if shown.while_decoding else "and none of those fed back"
    print(f"{positions!s:>20}: {shown.counts} prompt tokens per row, {then}")

# %% [markdown]
# ## The image tokens on the picture
#
# The pocket model cuts a picture of 72 x 72 pixels into 6 x 6 patches: 36 image tokens, in reading order. `vlm.cache`
# runs the prompt once and returns a mapping from site to activations, (row, pos, d_model), with a mask and the column
# of each token.
#
# Left: the patches and their columns in the prompt. Middle: how long each image token's hidden state is at the input of
# the decoder. Right: cosine with the word vector of *dog*. In this model patches were taught to point at word vectors.

# %%
cache = vlm.cache(inputs, [sp.resid_pre(0), sp.resid_post(2)], positions=sp.image)
tokens = cache[sp.resid_pre(0)][0]
columns = cache.columns[0].reshape(6, 6)
dog = model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("dog")].detach()

length = tokens.norm(dim=-1).reshape(6, 6)
likeness = torch.cosine_similarity(tokens, dog[None], dim=-1).reshape(6, 6)

figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=(1, 1.2, 1.2))
for axes in panels:
    axes.imshow(scene.image, interpolation="nearest", extent=(0, 6, 6, 0))
    axes.set_xticks(range(7), [])
    axes.set_yticks(range(7), [])
panels[0].grid(color="white", linewidth=0.8)
for row in range(6):
    for column in range(6):
        panels[0].text(
            column + 0.5, row + 0.5, int(columns[row, column]), ha="center", va="center", fontsize=8, color="black"
        )
panels[0].set_title("columns of the image tokens", fontsize=10)
for axes, values, title in ((panels[1], length, "length of the token"), (panels[2], likeness, "cosine with 'dog'")):
    shown = axes.imshow(values, extent=(0, 6, 6, 0), alpha=0.65, cmap="viridis")
    figure.colorbar(shown, ax=axes, shrink=0.75)
    axes.set_title(title, fontsize=10)
box = next(thing.box for thing in scene.objects if thing.noun == "dog")
for axes in panels[1:]:
    left, top, right, bottom = (side / 12 for side in box)
    axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="red", linewidth=2))
panels[2].set_xlabel("red: where the dog is")
figure.tight_layout()
plt.show()

# %% [markdown]
# `plot_positions` does this in one line, for every family: it knows their grids, tiles and thumbnails. It takes a
# number for each image token, or shades the tokens that a name selects.

# %%
from steer_plugin.analysis.pictures import plot_positions

plot_positions(
    model.config, inputs, [[scene.image]], values=likeness.flatten(), label="cosine with 'dog'", processor=processor
)

# %% [markdown]
# ## Many prompts at once
#
# One call reads several sites on a batch. Here: the last prompt token of 200 questions at every layer. How well does
# the difference of the two means (true yes against true no) tell the questions apart, if it is taken from the first
# half and tried on the second?

# %%
asked = [q for q in world.questions(100, "train", ["adversarial"])]
sites = [sp.resid_post(layer) for layer in range(vlm.n_layers)]
many = vlm.inputs([q.text for q in asked], [q.image for q in asked])
states = vlm.cache(many, sites, positions=sp.last_prompt)
truth = torch.tensor([q.label for q in asked])
half = len(asked) // 2

separated = []
for site in sites:
    h = states[site][:, 0]
    direction = h[:half][truth[:half]].mean(0) - h[:half][~truth[:half]].mean(0)
    score = h @ direction
    cut = score[:half].mean()
    separated.append(float(((score > cut) == truth)[half:].float().mean()))

said = vlm.generate(**many, max_new_tokens=1)[:, -1]
answered = float(((said == processor.tokenizer.convert_tokens_to_ids("yes")) == truth)[half:].float().mean())

figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(range(vlm.n_layers), [100 * s for s in separated], "o-", color="#1f5f8b", label="difference of means")
axes.axhline(100 * answered, color="0.5", linestyle="--", label="the model's own answers")
axes.set_xticks(range(vlm.n_layers))
axes.set_xlabel("layer of resid_post")
axes.set_ylabel("right (%)")
axes.set_title(f"yes or no at the last prompt token, {half} questions", fontsize=10)
axes.legend(frameon=False, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# A cache also shows what a steering does. Reads at a site see the written value.

# %%
vector = torch.nn.functional.normalize(torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(0)), dim=-1)
steering = sp.add(sp.resid_post(1), 5 * vector, positions="last_prompt")
plain = vlm.cache(inputs, sites, positions="last_prompt")
steered = vlm.cache(inputs, sites, positions="last_prompt", steering=steering)
for site in sites:
    print(f"{site}: changed by {float((steered[site] - plain[site]).norm()):.2f}")

# %% [markdown]
# ## Reading behind the write
#
# Learning to Steer may read its context at a later layer than it writes: for safety, the authors write at layer 15 and
# read at layer 30. One pass cannot do that. `vlm.steering` and the whole-job calls then run the prompt once for the
# context, and
#
# - with positions that touch the last prompt token only (and generated ones), they crop that one token from the KV
#   cache and run it again, steered;
# - with other positions, such as `everywhere`, they run the prompt a second time.
#
# The number of tokens that pass the last layer tells which.

# %%
from steer_plugin.contrast import pocket_pairs
from steer_plugin.training.config import preset

pairs = pocket_pairs(world.questions(60, "train", ["adversarial"]))
shifts = vlm.extract(pairs, write="resid_post.1", read="resid_post.3", batch_size=64, progress=False)
late = sp.L2S.fit(shifts, preset("pope", learning_rate=1e-3))
print(f"reads {late.read.site}, writes {late.write}, on {late.positions}")


def tokens_per_forward(steering):
    passed = []
    layer = model.model.language_model.layers[3]
    handle = layer.register_forward_hook(lambda module, args, output: passed.append(output.shape[1]))
    vlm.generate(**inputs, steering=steering, max_new_tokens=3)
    handle.remove()
    return passed


everywhere = sp.L2S(late.network, late.write, late.read.site, positions="everywhere")
early = sp.add("resid_post.1", vector)
prompt = inputs["input_ids"].shape[1]
print(f"prompt of {prompt} tokens; tokens that pass the last layer, forward by forward:")
for name, one in (("no late read", early), ("late, last_prompt|generated", late), ("late, everywhere", everywhere)):
    print(f"{name:>28}: {tokens_per_forward(one)}")

# %% [markdown]
# In a block that you wrote yourself there is exactly one pass. A late read is refused there, with the reason. `prepare`
# does the read beforehand; the result fits into one pass over the same inputs.

# %%
from nnsight import NNsight

hf, _ = sp.pocket.load()
nn_model = NNsight(hf)
nn_vlm = sp.attach(nn_model, processor)

try:
    with nn_model.trace(**inputs):
        late.apply(nn_vlm)
except sp.FrameworkError as error:
    print(str(error).splitlines()[-1])

prepared = late.prepare(nn_vlm, inputs)
with torch.no_grad(), nn_model.trace(**inputs):
    prepared.apply(nn_vlm)
    logits = nn_model.lm_head.output.save()

ids = vlm.generate(**inputs, steering=late, max_new_tokens=1)
assert int(logits[0, -1].argmax()) == int(ids[0, -1])
print("prepared, in a trace of your own:", processor.tokenizer.decode(logits[0, -1].argmax()))

# %% [markdown]
# ## A patch
#
# `sp.patch` puts a value in place of an activation. Two pictures, the same question, different true answers: take the
# last prompt token's state of one picture and put it into the other one. At which layer does the answer change sides?

# %%
text = "Is there a fish in the image?"
scenes = [world.scene(i) for i in range(40)]
both = vlm.inputs([text] * len(scenes), [s.image for s in scenes])
with torch.no_grad():
    logits = model(**both).logits[:, -1]
yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
margin = logits[:, yes] - logits[:, no]
# The picture with a fish that gets the clearest yes, and the one without that gets the clearest no.
with_fish = max((i for i, s in enumerate(scenes) if "fish" in s.nouns), key=lambda i: float(margin[i]))
without = min((i for i, s in enumerate(scenes) if "fish" not in s.nouns), key=lambda i: float(margin[i]))
source, target = (vlm.inputs(text, scenes[i].image) for i in (with_fish, without))

states = vlm.cache(source, sites, positions="last_prompt")
image_states = vlm.cache(source, sites, positions="image")


def margin_with(steering):
    with torch.no_grad(), vlm.steering(steering) as steered:
        out = steered(**target).logits[0, -1]
    return float(out[yes] - out[no])


at_last = [margin_with(sp.patch(site, states[site][0, 0], "last_prompt")) for site in sites]

figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1, 1, 1.6))
for axes, i, name in ((panels[0], with_fish, "source: a fish"), (panels[1], without, "target: no fish")):
    axes.imshow(scenes[i].image, interpolation="nearest")
    axes.set_title(f"{name}\nmargin {float(margin[i]):+.1f}", fontsize=10)
    axes.axis("off")
panels[2].bar(range(len(sites)), at_last, color="#1f5f8b")
panels[2].axhline(float(margin[without]), color="0.5", linestyle="--", label="target, unpatched")
panels[2].axhline(float(margin[with_fish]), color="0.2", linestyle=":", label="source")
panels[2].axhline(0, color="black", linewidth=0.8)
panels[2].set_xticks(range(len(sites)), [str(site) for site in sites], fontsize=8)
panels[2].set_ylabel("logit yes - logit no")
panels[2].set_title("target with the source's last prompt token", fontsize=10)
panels[2].legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
panels[2].spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# At the last layer the patch decides everything; earlier, the layers above still read the picture. A replacement cannot
# be scaled, because half a replacement means nothing; scale the value that you put there.

# %%
try:
    sp.patch("resid_post.1", states["resid_post.1"][0, 0], "last_prompt") * 0.5
except sp.InputError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# 1. `sp.patch` takes one vector for all tokens that the positions select. Put the mean image token of the source
#    (`image_states`) on `"image"` of the target at each layer. Does the answer change?
# 2. Draw the cosine map for *chair* instead of *dog*, and at `sp.resid_post(2)` instead of `sp.resid_pre(0)`.
# 3. `vlm.cache` reads the vision tower too: `vlm.cache(inputs, [sp.vision_resid_post(2)])`. How many tokens are there,
#    and why one more than image tokens?
# 4. Fit `late` with `context="user_end"` in `vlm.extract`. Which token is that, and does the fit get better?
#
# ## Read on
#
# - [Notebook 1](01_quick_start.ipynb): fit, steer and compare. [Notebook 3](03_p2s_and_l2s.ipynb): vectors and contexts
#   in bulk.
# - [Notebook 5](05_directions.ipynb): what a direction does. [Notebook 6](06_patching_and_probing.ipynb): patches and
#   probes at every layer, under steering.
# - [Concepts](../docs/concepts.md): sites, positions, and how many passes a steering takes.
# - [Decisions](../docs/decisions.md): how late reads work, and why.
