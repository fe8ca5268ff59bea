# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 7. The same in TransformerLens
#
# What you will see:
#
# 1. a `TransformerBridge` of a vision-language model, attached; hook names for sites;
# 2. steering as hooks of your own block, around any call, and as a whole job: the same tokens as plain Hugging Face;
# 3. TransformerLens' own caches and hooks beside a steering;
# 4. `transformer_lens.patching` with pictures, which by itself would leave them out, on steered and unsteered runs;
# 5. the functions of `sp.analysis` on the bridge.

# %%
import os
import warnings

os.environ["TQDM_DISABLE"] = (
    "1"  # TransformerLens' sweeps draw progress bars, which a saved notebook keeps line by line
)
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin import analysis
from steer_plugin.contrast import pocket_pairs

logging.disable_progress_bar()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. A bridge
#
# A bridge changes its Hugging Face model in place, so it gets a copy of its own. `sp.attach(..., framework="transformer_lens")`
# builds one; a bridge that you have already attaches in the same way.

# %%
plain, processor = sp.pocket.load()
plain_vlm = sp.attach(plain, processor)

vlm = sp.attach(sp.pocket.load()[0], processor, framework="transformer_lens")
bridge = vlm.model
print(vlm)
for site in (sp.resid_pre(2), sp.attn_out(2), sp.mlp_out(2), sp.resid_post(2), sp.projector()):
    print(f"{site!s:<14} {vlm.hook_name(site)}")

# %% [markdown]
# ## 2. Steer
#
# Mean steering from 60 pictures, three ways. Decoding goes through `bridge.original_model`: `bridge.generate` drops
# the picture in some settings.

# %%
world = sp.pocket.World(0)
pairs = pocket_pairs(world.questions(60, "train", ["adversarial"]))
shifts = vlm.extract(pairs, write="resid_post.1", progress=False)
steering = sp.MeanSteering.fit(shifts, "yes", positions="last_prompt") * 2.0

questions = world.questions(6, "test", ["adversarial"])
inputs = vlm.inputs([q.text for q in questions], [q.image for q in questions])
width = inputs["input_ids"].shape[1]

with bridge.hooks(fwd_hooks=steering.hooks(vlm)):  # 1: hooks of your own block
    first = bridge.original_model.generate(**inputs, max_new_tokens=3)
with vlm.steering(steering):  # 2: around any call
    second = bridge.original_model.generate(**inputs, max_new_tokens=3)
third = vlm.generate(**inputs, steering=steering, max_new_tokens=3)  # 3: a whole job
reference = plain_vlm.generate(**inputs, steering=steering, max_new_tokens=3)

print("unsteered:", vlm.decode(vlm.generate(**inputs, max_new_tokens=3)[:, width:]))
print("steered:  ", vlm.decode(third[:, width:]))
assert torch.equal(first, second) and torch.equal(second, third) and torch.equal(third, reference)

# %% [markdown]
# ## 3. Your own cache beside it
#
# `vlm.bound(inputs)` is the bridge with this batch's pictures bound to it: `run_with_cache` and `run_with_hooks` take token ids
# alone, and without the pictures a bridge would run on placeholder embeddings. Hooks of yours see what the steering wrote.

# %%
bound = vlm.bound(inputs)
with torch.no_grad():
    _, before = bound.run_with_cache()
    with bridge.hooks(fwd_hooks=steering.hooks(vlm)):
        _, after = bound.run_with_cache()

for layer in range(4):
    change = (after[f"blocks.{layer}.hook_out"] - before[f"blocks.{layer}.hook_out"])[:, -1].norm(dim=-1)
    print(
        f"layer {layer}: change at the last token {change.mean():.2f}, |v| = {1.0 * (steering.intervention.writes[0].delta.vector.norm() * 2):.2f}"
    )

# %% [markdown]
# ## 4. TransformerLens' own patching, with pictures
#
# The corrupt picture lacks the object that is asked for. TransformerLens sweeps layers and single tokens.

# %%
from transformer_lens import patching

yes_no = analysis.logit_difference(vlm, "yes", "no")
for index in range(100):
    scene = world.scene(index, "validation")
    noun = sorted(scene.nouns)[0]
    prompt = f"Is there a {noun} in the image?"
    clean = vlm.inputs(prompt, scene.image)
    corrupt = vlm.inputs(prompt, world.scene(index, "validation", without=noun).image)
    low, high = (float(yes_no(vlm.observe(one).logits)) for one in (corrupt, clean))
    if low < -1 and high > 1:
        break

with torch.no_grad():
    _, clean_cache = vlm.bound(clean).run_with_cache()
    sweep = patching.get_act_patch_resid_pre(
        vlm.bound(corrupt),
        corrupt["input_ids"],
        clean_cache,
        lambda logits: (yes_no(logits).mean() - low) / (high - low),
    )

tokens = analysis.Tokens.of(vlm, clean)
figure, axes = plt.subplots(figsize=(11, 2.8))
drawn = axes.imshow(sweep[:, tokens.columns(0)], aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
tokens.label(axes, 0)
axes.set_yticks(range(4))
axes.set_ylabel("resid_pre of layer")
axes.set_title(f"{prompt} One picture; clean streams put into the run without the {noun}", fontsize=10)
figure.colorbar(drawn, label="share of the effect")
plt.show()

# %% [markdown]
# Before layer 0 the answer lies in the two image tokens that show the object; from layer 1 on in the *noun* of the question, which has
# looked it up; a part of it moves on to the last token. The same sweep by `sp.analysis` gives the same numbers, and
# intervals where there are several prompts:

# %%
columns = {str(column): torch.arange(clean["input_ids"].shape[1])[None] == column for column in tokens.columns(0)}
ours = analysis.activation_patching(
    vlm, clean, corrupt, yes_no, [sp.resid_pre(layer) for layer in range(4)], columns, progress=False
)
print(
    "largest difference from TransformerLens' sweep:",
    float(abs(torch.tensor(ours.effect) - sweep[:, tokens.columns(0)]).max()),
)

# %% [markdown]
# A steering that is in force stays in force under TransformerLens' sweep: patches and steering meet in one run.

# %%
with torch.no_grad(), vlm.steering(steering):
    steered = patching.get_act_patch_resid_pre(
        vlm.bound(corrupt), corrupt["input_ids"], clean_cache, lambda logits: yes_no(logits).mean()
    )
    base = float(yes_no(vlm.observe(corrupt).logits))
print(f"yes - no: corrupt {low:.2f}, corrupt and steered {base:.2f}, clean {high:.2f}")
print(
    "largest push by a patch on top of the steering, by layer:", [round(float(row.max()) - base, 2) for row in steered]
)

# %% [markdown]
# ## 5. Analysis on the bridge
#
# Everything of tutorials [5](05_directions.ipynb) and [6](06_patching_and_probing.ipynb) takes this `vlm`.

# %%
analysis.localise(vlm, inputs, steering, yes_no, progress=False).plot()

# %%
analysis.logit_lens(vlm, clean, ["yes"]).plot("yes")

# %% [markdown]
# ## Exercises
#
# 1. Patch `attn_out` and `mlp_out` with `patching.get_act_patch_attn_out` and `get_act_patch_mlp_out`. Which of them moves
#    the object's information to the last token?
# 2. Add a hook of your own to `fwd_hooks` behind `steering.hooks(vlm)` that reads `blocks.1.hook_out`. Does it see the written
#    value?
# 3. Steer with `sp.SteerVLM` and look at `vlm.record` on the bridge. Do its gates agree with those on the plain model?
#
# ## Read on
#
# - [Patching and probing under steering](06_patching_and_probing.ipynb); [concepts](../docs/concepts.md); [families](../docs/families.md)
#   that TransformerLens hosts, five of them through adapters of this package.
