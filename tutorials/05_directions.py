# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 5. What is in a steering direction?
#
# What you will see:
#
# 1. contrastive (P2S) vectors of 200 pictures: how they lie, and how much of each the mean explains, how much L2S adds;
# 2. how alike the directions of layers, behaviours and methods are;
# 3. how far a steering moves the stream, in which layers and on which tokens;
# 4. what a direction says through the unembedding, and what the stream says layer by layer, steered and not;
# 5. the same at *image* tokens, drawn on the picture;
# 6. the gates of SteerVLM as directions: which words their steps push, and whether they open alike for every picture.
#
# Everything is in `sp.analysis`; each function returns a small object with `.plot()` and `.to_frame()`.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import torch
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin import analysis
from steer_plugin.contrast import pocket_pairs, pocket_request_pairs

logging.disable_progress_bar()
torch.set_num_threads(1)

model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
world = sp.pocket.World(0)

# %% [markdown]
# ## 1. Vectors of single inputs
#
# P2S makes one vector per input: the difference between the stream behind the right opening of the answer and behind
# the wrong one. Half of the questions are about things that are there. Learning to Steer (L2S) predicts the vector from the
# input's own context; mean steering takes the average for all.

# %%
pairs = pocket_pairs(world.questions(150, "train", ["adversarial"]))
held_out = pocket_pairs(world.questions(50, "validation", ["adversarial"]))
shifts = vlm.extract(pairs, write="resid_post.2", read="resid_post.3", progress=False)
fresh = vlm.extract(held_out, write="resid_post.2", read="resid_post.3", progress=False)

mean = sp.MeanSteering.fit(shifts, positions="last_prompt")
l2s = sp.L2S.fit(shifts, "fast", positions="last_prompt")
print({name: round(value, 2) for name, value in shifts.summary().items()})

analysis.shift_map(shifts).plot()

# %% [markdown]
# How to read it: the cross is the zero vector. "yes" and "no" pairs lie on opposite sides of it, so their mean is close to
# nothing: a single vector cannot push both ways. That is why mean steering does little here, and why a vector that depends
# on the input is worth having.
#
# How much of each *held-out* vector does a method give?

# %%
found = analysis.explained(fresh, {"mean": mean, "L2S": l2s})
found.summary().round(2)

# %%
found.plot()

# %% [markdown]
# One dot per held-out question, the black mark is their mean with a 95 % bootstrap interval over questions (two share a picture, so it is a
# little too narrow). A dozen dots lie near -1: there L2S predicts the wrong answer's vector, and steers the wrong way. `share` in the
# table is 1 - |z - v|² / |z|²: 1 is the whole vector, 0 no better than nothing.
#
# ## 2. Which directions are alike?
#
# Cosines between the behaviours' means, at two layers, and with behaviours of another kind: of requests, harmful ones, harmless
# ones, and advice that is an expert's.

# %%
requests = vlm.extract(pocket_request_pairs(world.requests(60, "train")), write="resid_post.2", progress=False)
early = vlm.extract(pairs, write="resid_post.1", progress=False)
directions = {
    "yes, layer 2": shifts.mean("yes"),
    "no, layer 2": shifts.mean("no"),
    "yes, layer 1": early.mean("yes"),
    "no, layer 1": early.mean("no"),
    **{f"{name}, layer 2": vector for name, vector in analysis.by_behaviour(requests).items()},
}
analysis.cosines(directions).plot()

# %% [markdown]
# "yes" and "no" are one axis, at each layer; the axes of the two layers are alike (0.83). So are harmful and harmless, by another axis
# that has little to do with existence (about 0.1). Advice has one of its own.
#
# ## 3. How far does a steering move the stream?
#
# The footprint compares the steered with the unsteered stream: the norm of the change in units of the stream's own norm, by
# layer and part of the prompt. We steer 24 questions about 12 pictures: L2S at the last prompt token, then a vector on the image tokens.

# %%
questions = world.questions(12, "test", ["adversarial"])
images = [question.image for question in questions]
inputs = vlm.inputs([question.text for question in questions], images)

steps = analysis.footprint(vlm, inputs, l2s * 2.0)
steps.to_frame().round(3)

# %%
steps.plot()

# %% [markdown]
# Nothing moves before layer 2, where the write is. Behind it the change can only reach later tokens, so a steering of the last
# prompt token leaves picture and question alone. At layer 2 the change is nearly as long as the stream itself; the last layer writes so much
# there that it is a quarter of it. Steering at the image tokens reaches the answer through attention:

# %%
on_image = sp.add("resid_post.0", 2.0 * shifts.mean("yes"), positions="image")
analysis.footprint(vlm, inputs, on_image).plot()

# %% [markdown]
# ## 4. What does a direction say?
#
# The lens reads a direction through the model's own last norm and unembedding: the words that it raises and lowers. With
# streams to stand on, the numbers are the change of the logits there.

# %%
last = vlm.observe(inputs, "resid_post.3")["resid_post.3"][:, -1]
said = analysis.direction_lens(vlm, {"yes pairs": shifts.mean("yes"), "no pairs": shifts.mean("no")}, last)
said.plot(5)

# %% [markdown]
# "yes" and "no" are among the words, but not alone: these vectors are made at layer 2, and the last layer still has to read
# them. A lens on early directions shows what they are near, not what they cause.
#
# And the stream itself: what would the model say if it ended at this layer? First unsteered, then with the mean of the
# "yes" pairs added at the last prompt token of a question whose answer is no, twice as long as it is.

# %%
row = next(k for k, question in enumerate(questions) if not question.label)
one = vlm.inputs(questions[row].text, images[row])
print(questions[row].text, "- true answer:", "yes" if questions[row].label else "no")

plain = analysis.logit_lens(vlm, one, ["yes", "no"])
pushed = analysis.logit_lens(
    vlm, one, ["yes", "no"], steering=sp.add("resid_post.2", 2.0 * shifts.mean("yes"), "last_prompt")
)
plain.plot("yes")

# %%
pushed.plot("yes")

# %% [markdown]
# All image tokens share one label. Without a target the figure names the likeliest word of each cell; in the table it is the
# column `top`:

# %%
table = pushed.to_frame()
table[table["class"] == "last_prompt"][["layer", "word", "top", "top_probability", "yes", "no"]].round(3)

# %% [markdown]
# ## 5. On the picture
#
# At image tokens the stream of a LLaVA says what a patch is taken for. We ask for a noun that is in the picture.

# %%
scene = world.scene(5)
nouns = sorted(scene.nouns)
seen = vlm.inputs("Describe the image.", scene.image)
print("in the picture:", ", ".join(nouns))
lens = analysis.logit_lens(vlm, seen, nouns)
best = max(nouns, key=lambda noun: float(lens.of(noun)[:, 0].max()))
layer = int(lens.of(best)[:, 0].amax(-1).argmax())
lens.plot_image([[scene.image]], best, sp.resid_post(layer))

# %% [markdown]
# The direction of the "yes" pairs, projected on image tokens:

# %%
analysis.project(vlm, seen, shifts.mean("yes")).plot_image([[scene.image]], "resid_post.2")

# %% [markdown]
# ## 6. Gates as directions
#
# SteerVLM adds g * s at every layer's attention output. Its mean step in each layer is a direction like any other.

# %%
steervlm = sp.SteerVLM.load(sp.pocket.trained())
pictures = [world.scene(index).image for index in range(12)]
captions = vlm.inputs(["Describe the image."] * len(pictures), pictures)
records = {
    name: vlm.record(steervlm.pair(*pair), captions, max_new_tokens=30, reduce="dim_mean")
    for name, pair in {
        "love rain": ("I love the rain.", "I hate the rain."),
        "hate rain": ("I hate the rain.", "I love the rain."),
        "love forest": ("I love the forest.", "I hate the forest."),
    }.items()
}
analysis.direction_lens(vlm, analysis.mean_steps(records["love rain"])).plot(4)

# %%
analysis.gate_overlap(records).plot()

# %%
analysis.gate_stability(records).plot()

# %% [markdown]
# The overlap is 0.8 to 1, far above chance: the gate opens mostly the same dimensions whatever the pair. Stability near 1 says that it does
# so for every picture. So the pairs must differ in the step s more than in the gate (exercise 5). Of the step's words only layer
# 0's top one, "rain", is about the topic.
#
# ## Exercises
#
# 1. Draw section 1 for `requests`: are its behaviours on opposite sides of zero too?
# 2. `analysis.explained` takes any function of the shifts: try the nearest neighbour of each context among the training
#    contexts. Does L2S beat it?
# 3. In section 3, steer with `positions="everywhere"`. Which part of the prompt moves most, and does the answer change more?
# 4. `analysis.interactive(plain, target="yes")` draws section 4 with plotly. Find the first layer that decides.
# 5. Compare the steps of two pairs: `analysis.cosines` of their `mean_steps`, layer by layer. Is it s that differs?
#
# ## Read on
#
# - [Patching and probing under steering](06_patching_and_probing.ipynb): what a direction *causes*.
# - [Analysis](../docs/analysis.md): every function with its formula and source.
# - Logit lens at image tokens: arXiv [2410.07149](https://arxiv.org/abs/2410.07149).
