# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 6. Patching and probing under steering
#
# What you will see:
#
# 1. activation patching between a picture and the same picture without one object, in both directions;
# 2. all patches at once by one backward pass (attribution patching), and how far to trust it;
# 3. where a steering acts: which streams are enough for its effect, and which layers carry it after the write;
# 4. linear probes with a control task, and whether steering moves what they read;
# 5. what the picture adds to the stream, as a probe's input;
# 6. two steerings at once: do their effects add up?
# 7. your own `with model.trace()` that steers, reads, patches and takes gradients in one block.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin import analysis
from steer_plugin.contrast import pocket_pairs

logging.disable_progress_bar()
torch.set_num_threads(1)

model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
world = sp.pocket.World(0)

# %% [markdown]
# ## 1. Clean and corrupt
#
# The drawn world can leave one object out and change no other pixel. Clean: the picture with the object; corrupt: without it.
# The question asks for that object, so the right answers are yes and no. We keep pictures on which the model
# gets both right.

# %%
yes_no = analysis.logit_difference(vlm, "yes", "no")
kept = []
for index in range(60):
    scene = world.scene(index, "validation")
    noun = sorted(scene.nouns)[0]
    without = world.scene(index, "validation", without=noun)
    prompt = f"Is there a {noun} in the image?"
    clean, corrupt = vlm.inputs(prompt, scene.image), vlm.inputs(prompt, without.image)
    if yes_no(vlm.observe(clean).logits)[0] > 0 > yes_no(vlm.observe(corrupt).logits)[0]:
        kept.append((index, noun, scene, without, prompt))

kept = kept[:16]
prompts = [prompt for *_, prompt in kept]
clean = vlm.inputs(prompts, [scene.image for _, _, scene, _, _ in kept])
corrupt = vlm.inputs(prompts, [without.image for _, _, _, without, _ in kept])

figure, (left, right) = plt.subplots(1, 2, figsize=(5, 2.6))
left.imshow(kept[0][2].image), right.imshow(kept[0][3].image)
left.set_title(f"clean: {kept[0][1]}"), right.set_title("corrupt")
for axes in (left, right):
    axes.set_axis_off()
plt.show()
print(
    f"{len(kept)} pairs of pictures; mean yes-no logit: clean {yes_no(vlm.observe(clean).logits).mean():.2f}, "
    f"corrupt {yes_no(vlm.observe(corrupt).logits).mean():.2f}"
)

# %% [markdown]
# Which streams carry the object? `activation_patching` puts the clean stream into the corrupt run, one layer and part of the
# prompt at a time. Parts are expressions or masks of your own; here the image tokens on the object, the other ones, the noun in
# the question, the other words, and the last prompt token. 1 means that the answer becomes that of the clean picture.

# %%
from steer_plugin.pictures import sections, token_boxes

ids = clean["input_ids"]
image = ids == model.config.image_token_id
on_object, on_noun = torch.zeros_like(image), torch.zeros_like(image)
rows = sections(model.config, clean, processor, [[scene.image] for _, _, scene, _, _ in kept])
for row, (_, noun, scene, _, _) in enumerate(kept):
    on_noun[row] = ids[row] == processor.tokenizer.convert_tokens_to_ids(noun)
    x0, y0, x1, y1 = (side / 72 for side in next(thing.box for thing in scene.objects if thing.noun == noun))
    for column, token in zip(image[row].nonzero()[:, 0], token_boxes(rows[row]), strict=True):
        a, b, c, d = token.box
        on_object[row, column] = a < x1 and c > x0 and b < y1 and d > y0
last = torch.zeros_like(image)
last[:, -1] = True
parts = {
    "on the object": on_object,
    "other image": image & ~on_object,
    "the noun": on_noun,
    "other words": ~(image | on_noun | last),
    "last_prompt": "last_prompt",
}
streams = [*(sp.resid_pre(layer) for layer in range(4)), sp.resid_post(3)]
denoise = analysis.activation_patching(vlm, clean, corrupt, yes_no, streams, parts, progress=False)
denoise.plot()

# %%
noise = analysis.activation_patching(vlm, clean, corrupt, yes_no, streams, parts, direction="noise", progress=False)
noise.plot()

# %% [markdown]
# How to read it: before layer 0 nearly everything lies on the object's own image tokens. Layer 0 already carries it to the noun of the
# question, which looks its object up; layer 1 brings a part of it to the last prompt token, and the last layer the rest. "denoise" asks
# what is enough, "noise" what cannot be done without; where they agree there is one way.
#
# %% [markdown]
# ## 2. All patches by one backward pass
#
# Attribution patching multiplies the difference of the streams by the gradient of the metric. It costs three
# forwards and one backward for any number of places.

# %%
sites = [site for layer in range(4) for site in (sp.attn_out(layer), sp.mlp_out(layer), sp.resid_post(layer))]
exact = analysis.activation_patching(vlm, clean, corrupt, yes_no, sites, parts, progress=False)
guess = analysis.attribution_patching(vlm, clean, corrupt, yes_no, sites, parts)
table = exact.compared(guess)

figure, axes = plt.subplots(figsize=(4, 3.6))
axes.scatter(table["effect"], table["other"], s=18, color="#1f3b5c")
axes.plot([-0.2, 1.2], [-0.2, 1.2], color="0.6", linewidth=0.8)
axes.set_xlabel("patched")
axes.set_ylabel("estimated")
axes.spines[["top", "right"]].set_visible(False)
plt.show()
worst = (table["effect"] - table["other"]).abs()
print(
    f"{len(table)} places: largest error {worst.max():.2f}, at {table.loc[worst.idxmax(), ['kind', 'layer', 'part']].tolist()}"
)

# %% [markdown]
# ## 3. Where does a steering act?
#
# We steer the corrupt pictures towards "yes" with the mean of "yes" pairs, at the last prompt token behind layer 1, and patch
# between steered and unsteered runs of the same prompts.

# %%
pairs = pocket_pairs(world.questions(150, "train", ["adversarial"]))
shifts = vlm.extract(pairs, write="resid_post.1", progress=False)
towards_yes = sp.MeanSteering.fit(shifts, "yes", positions="last_prompt") * 1.5

analysis.steering_patching(vlm, corrupt, towards_yes, yes_no, way="insert", progress=False).plot()

# %%
carried = analysis.localise(vlm, corrupt, towards_yes, yes_no, progress=False)
carried.plot()

# %% [markdown]
# `localise` gives each attention and MLP behind the write what it would be without steering. What is lost went through it. Here the
# shares are *negative*: without the MLPs' reaction the steering would do more. It acts straight through the residual stream, and the later
# layers work against it: one reason why a change that is large in the stream can do little to the answer.

# %%
carried.to_frame().round(3)

# %% [markdown]
# ## 4. Probes
#
# Can "the object is there" be read off the stream? Questions about 100 pictures; folds never part questions about one
# picture. The control task gives each *noun* a label by lot: a probe that does well there knows nouns, not pictures.

# %%
questions = world.questions(100, "train", ["random"])
batches = [
    vlm.inputs([q.text for q in questions[at : at + 40]], [q.image for q in questions[at : at + 40]])
    for at in range(0, len(questions), 40)
]
places = [sp.resid_post(layer) for layer in range(4)]
values = analysis.read_parts(vlm, batches, places, ["image", "last_prompt"], progress=False)
labels = [question.label for question in questions]
probes = analysis.probe(values, labels, types=[q.noun for q in questions], groups=[q.scene_id for q in questions])
probes.plot()

# %% [markdown]
# Image tokens come before the question, so their mean cannot know what will be asked: each picture has one question of either kind, and
# exactly half is all there is. At the last
# prompt token the answer can be read from layer 1 on. But the control does as well there: the noun itself can be read off that token, at
# layer 0 already, and any labels of nouns with it. Accuracy alone does not show that "there or not" has a direction of its own; most nouns
# are asked for with both answers, so knowing nouns cannot be all of it, and the patches show what is used.
#
# Does steering move what the probe reads? The same probe, on fresh pictures, before and after:

# %%
fresh = world.questions(40, "validation", ["random"])
asked = vlm.inputs([q.text for q in fresh], [q.image for q in fresh])
last = {place: found for place, found in values.items() if place[1] == "last_prompt"}
probes = analysis.probe(last, labels, groups=[q.scene_id for q in questions])
before = analysis.read_parts(vlm, asked, places, progress=False)
after = analysis.read_parts(vlm, asked, places, steering=towards_yes, progress=False)
probes.moved(before, after).plot()

# %%
probes.moved(before, after).to_frame().round(2)

# %% [markdown]
# A probe that moves shows that the steering writes along what the probe reads; it does not show that the model *uses* it there.
# The patches above do.
#
# ## 5. What the picture adds
#
# TaskTracker compares a prompt with and without its data. Here: the stream at the last prompt token with the picture minus
# without. Does the difference tell whether the object is there?

# %%
subset = questions[:120]
deltas = analysis.image_deltas(vlm, [q.text for q in subset], [q.image for q in subset], places, progress=False)
analysis.probe(deltas, [q.label for q in subset], groups=[q.scene_id for q in subset]).plot()

# %% [markdown]
# ## 6. Two at once
#
# The mean of "yes" pairs at the last prompt token, and SteerVLM's stance on rain: does one disturb what the other is for?

# %%
stance = sp.SteerVLM.load(sp.pocket.trained()).pair("I love the rain.", "I hate the rain.")
both = analysis.compose(
    vlm,
    corrupt,
    {"towards yes": towards_yes, "love rain": stance},
    {"yes - no": yes_no, "log p(yes or no)": analysis.log_probability(vlm, ["yes", "no"])},
)
both.plot()

# %%
both.to_frame().round(3).T

# %% [markdown]
# A hollow ring shows where the sum of the two effects would be; the `interaction` in the table is the distance to it, with
# an interval over prompts. These two do not add up at all: alone the stance (trained on captions, not on questions) pushes towards no,
# together with the other it nearly triples the push towards yes. "yes" and "no" stay nearly the only first words all the while.
#
# ## 7. In a block of your own
#
# Everything above can be written in nnsight too. One trace that steers, reads a layer, patches one row's stream into another's,
# and takes the gradient of the answer by what it read:

# %%
from nnsight import NNsight

nn_model = NNsight(sp.pocket.load()[0])
nn_vlm = sp.attach(nn_model, processor)
two = nn_vlm.inputs(prompts[:2], [kept[0][2].image, kept[1][2].image])
layers = nn_model.model.language_model.layers
yes, no = analysis.logit_difference(vlm, "yes", "no").first, analysis.logit_difference(vlm, "yes", "no").second

with nn_model.trace(**two):
    towards_yes.apply(nn_vlm)  # steers behind layer 1
    read = layers[2].output
    read.requires_grad_(True)
    late = layers[3].output
    late[1, -1] = late[0, -1]  # row 1 answers with row 0's last token
    logits = nn_model.lm_head.output
    answer = (logits[:, -1, yes] - logits[:, -1, no]).save()
    with answer.sum().backward():
        slope = read.grad.save()

print("yes - no:", [round(value, 2) for value in answer.tolist()], "(equal, since row 1 was patched)")
print("gradient at the last token, by row:", [round(value, 3) for value in slope[:, -1].norm(dim=-1).tolist()])

# %% [markdown]
# Row 1's own stream no longer matters: its gradient is zero, and row 0 answers for both.
#
# ## Exercises
#
# 1. Swap two pictures instead of leaving an object out: `activation_patching(vlm, clean, swapped, ...)` with the pictures of
#    other prompts. Do the same layers matter?
# 2. Patch single columns: parts are masks by name, so `{word: column mask}` draws token by token. Where does the noun matter?
# 3. Steer at `image` instead of `last_prompt` in section 3 and localise again. Which attention layer carries it now?
# 4. Fit the probe on steered activations and test it on unsteered ones. What does that say about the direction?
#
# ## Read on
#
# - [Directions](05_directions.ipynb), and [the same in TransformerLens](07_transformer_lens.ipynb).
# - Patching and its traps: arXiv [2404.15255](https://arxiv.org/abs/2404.15255). Control tasks: arXiv
#   [1909.03368](https://arxiv.org/abs/1909.03368). TaskTracker: arXiv [2406.00799](https://arxiv.org/abs/2406.00799).
