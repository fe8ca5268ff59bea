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
# # 4. SteerVLM: pairs, gates and the paper's three experiments
#
# What you will see:
#
# 1. captions that love or hate the rain, by one trained module and a pair of prompts; strengths, and two pairs in one
#    batch;
# 2. the same steering in nnsight and in TransformerLens, with the same tokens;
# 3. what becomes of the captions when the pair is swapped, equal or unrelated, on topics that the module was trained on
#    and on topics that it was not;
# 4. the gate: how far it opens in each layer, for which task, and on which dimensions;
# 5. modules without the unsteered activation and without the gate, and two methods that need no training.
#
# SteerVLM (arXiv [2510.26769](https://arxiv.org/abs/2510.26769)) adds to the attention output x of every layer
#
#     x <- x + lambda * g * s        s = steerer(x, u, p+, p-)        g = gate(s, p+, p-)
#
# where u is the output of an unsteered run at the same token, p+ and p- the activations of a target and a converse
# prompt. The authors' module is not public. This is a reconstruction, trained on the pocket VLM; [its
# page](../docs/steervlm.md) says what is published and what is ours.
#
# Everything runs on one CPU core in less than a minute. The samples are small: shares move by a few points with other
# pictures.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown
from transformers.utils import logging

import steer_plugin as sp

logging.disable_progress_bar()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. A module and a pair
#
# The packaged module was trained on pairs such as "I love the rain." and "I hate the rain.". The answers it was taught
# are the model's own captions with one more sentence: "The rain is nice." or "The rain is awful.". `pair` binds the two
# prompts. They are read on their own and never stand in the caption's prompt.

# %%
model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
steervlm = sp.SteerVLM.load(sp.pocket.trained())
world = sp.pocket.World(0)


def caption(images, steering=None):
    """Greedy captions of a batch of pictures."""
    inputs = vlm.inputs(["Describe the image."] * len(images), images)
    ids = vlm.generate(**inputs, steering=steering, max_new_tokens=40)
    return vlm.decode(ids[:, inputs["input_ids"].shape[1] :])


image = world.scene(1, "test").image
love, hate = "I love the rain.", "I hate the rain."
pairs = {"(p+, p-)": (love, hate), "swapped: (p-, p+)": (hate, love), "equal: (p+, p+)": (love, love)}

lines = ["| pair | lambda | caption |", "| --- | --- | --- |", f"| none | | {caption([image])[0]} |"]
for name, pair in pairs.items():
    for alpha in (0.0, 0.5, 1.0, 1.5):
        said = caption([image], steervlm.pair(*pair) * alpha)[0]
        lines.append(f"| {name} | {alpha} | {said} |")

plt.figure(figsize=(2.4, 2.4))
plt.imshow(image, interpolation="nearest")
plt.axis("off")
plt.show()
Markdown("\n".join(lines))

# %% [markdown]
# Lambda 0 is the unsteered caption: nothing is added. Lambda 1 is what the module was trained at; beyond it there is no
# promise, and a strength that is too large breaks the text. Equal prompts should ask for nothing, because the module
# was shown equal pairs with the model's own captions.
#
# Lists bind one pair to each row of the batch. Lambda may be one number per row as well.

# %%
two = steervlm.pair(
    ["I love the rain.", "We fear the forest."],
    ["I hate the rain.", "We enjoy the forest."],
)
for (plus, minus), said in zip(two.pairs, caption([image, image], two), strict=True):
    print(f"{plus} / {minus}\n    {said}")

# %% [markdown]
# ## 2. In nnsight and in TransformerLens
#
# The bound module is a steering like any other: `vlm.steering(...)` around any call, `apply` in a trace of your own,
# `hooks` for TransformerLens. What u needs, the unsteered twin of the stream, is looked after in all three.

# %%
from nnsight import NNsight

love_rain = steervlm.pair(love, hate)
inputs = vlm.inputs("Describe the image.", image)
reference = vlm.generate(**inputs, steering=love_rain, max_new_tokens=40)

hf, _ = sp.pocket.load()
nn_model = NNsight(hf)
nn_vlm = sp.attach(nn_model, processor)

with nn_vlm.steering(love_rain) as steered:
    ids = steered.generate(**inputs, max_new_tokens=40)

with torch.no_grad(), nn_model.trace(**inputs):
    love_rain.apply(nn_vlm)
    last_layer = nn_model.model.language_model.layers[3].output.save()

print("nnsight:", vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0])
print("your own read of layer 3:", tuple(last_layer.shape))
assert torch.equal(ids, reference)

# %%
from transformer_lens.model_bridge.sources import build_bridge_from_module

hf, _ = sp.pocket.load()  # a bridge changes its model in place
bridge = build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config, tokenizer=None)
tl_vlm = sp.attach(bridge, processor)

with bridge.hooks(fwd_hooks=love_rain.hooks(tl_vlm)):
    ids = bridge.original_model.generate(**inputs, max_new_tokens=40)

print("TransformerLens:", vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0])
assert torch.equal(ids, reference)

# %% [markdown]
# While a generation decodes, the twins ride in the same forward as further rows. Hooks of your own see them there:
# take `hidden[:rows]`.
#
# ## 3. Experiment 1: does the pair matter?
#
# `world.stances` pairs pictures with prompts. We caption 40 test pictures with each pair as it is, swapped, equal, and
# with a converse about something else ("I love the rain." against "I hate the snow."): "p+, other" below. A caption is
# in the *target stance* if it closes with the topic and the attitude of p+, in the *converse stance* if it closes with
# the opposite attitude on the same topic.
#
# Twice: on topics of the training pairs, and on `HELD_TOPICS`, which were in none. The wordings are those of training
# both times.

# %%
from steer_plugin.demo.stances import TRAINED_TOPICS

PICTURES = 40
GROUPS = {"topics of the training": TRAINED_TOPICS, "held-out topics": sp.pocket.HELD_TOPICS}
OUTCOMES = ("target stance", "converse stance", "another closing", "no closing")


def outcome(said, pair):
    """How a caption closes, seen from its pair of stances."""
    for name, stance in zip(OUTCOMES, (pair.target, pair.converse), strict=False):
        if sp.pocket.shown(said, stance.topic) == stance.loved:
            return name
    return "another closing" if "nice" in said or "awful" in said else "no closing"


def shares(cases, steering):
    """Per cent of the captions with each outcome."""
    said = caption([case.image for case in cases], steering)
    found = [outcome(text, case.pair) for text, case in zip(said, cases, strict=True)]
    return {name: 100 * found.count(name) / len(found) for name in OUTCOMES}


def prompts(cases):
    """Target and converse prompts of the cases."""
    return [case.pair.target.text for case in cases], [case.pair.converse.text for case in cases]


results, drawn = {}, {}
for group, topics in GROUPS.items():
    cases = drawn[group] = world.stances(PICTURES, "test", topics=topics, wordings="train")
    plus, minus = prompts(cases)
    # The same pictures and targets; only the converse is about another topic.
    elsewhere = prompts(world.stances(PICTURES, "test", ["unrelated"], topics=topics, wordings="train"))[1]
    asked = {
        "(p+, p-)": (plus, minus),
        "(p-, p+)": (minus, plus),
        "(p+, p+)": (plus, plus),
        "(p+, other)": (plus, elsewhere),
    }
    results[group] = {"unsteered": shares(cases, None)}
    results[group] |= {name: shares(cases, steervlm.pair(*pair)) for name, pair in asked.items()}

# %%
COLOURS = {"target stance": "#1f5f8b", "converse stance": "#c4985d", "another closing": "0.6", "no closing": "0.9"}


def draw(results, title):
    """Stacked bars, one panel per group of topics."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True)
    for axes, (group, bars) in zip(panels, results.items(), strict=True):
        for k, found in enumerate(bars.values()):
            bottom = 0
            for name, share in found.items():
                axes.bar(
                    k,
                    share,
                    0.7,
                    bottom,
                    color=COLOURS[name],
                    edgecolor="black",
                    linewidth=0.4,
                    label=None if k else name,
                )
                bottom += share
        axes.set_xticks(range(len(bars)), bars, fontsize=9)
        axes.set_title(group, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"captions (% of {PICTURES})")
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    plt.show()


draw(results, "How captions close, by pair")

# %% [markdown]
# How to read it. If the module follows the *difference* of the prompts, the first bar shows the target, the second the
# converse, and the third no closing. If it copied p+ alone, the third bar would look like the first. An unrelated
# converse leaves p+ as the only stance on its topic. Training had pairs of all three kinds: opposed, equal and
# unrelated. On held-out topics look at "another closing": the attitude can be right while the topic is not. The next
# cell tells these apart.

# %%
for group, cases in drawn.items():
    said = caption([case.image for case in cases], steervlm.pair(*prompts(cases)))
    right = sum(sp.pocket.attitude(text) == case.pair.target.loved for text, case in zip(said, cases, strict=True))
    print(f"{group}: {right} of {len(cases)} captions have the target's attitude, whatever they are about")
    for text, case in list(zip(said, cases, strict=True))[:3]:
        print(f"    {case.pair.target.text} -> {text}")

# %% [markdown]
# ## 4. Experiment 2: where does the gate open?
#
# The gate g is one factor between 0 and 1 for each hidden dimension, at each token and layer. `vlm.record` generates as
# `vlm.generate` does and keeps what the module computed. We ask three things about the same pictures with the same
# pairs. The module was trained on captions alone, so the other two show what it does where nothing was asked of it.

# %%
from steer_plugin.analysis.gates import plot_gates, plot_profile

cases = drawn["topics of the training"][:24]
images = [case.image for case in cases]
bound = steervlm.pair(*prompts(cases))
tasks = {
    "caption": "Describe the image.",
    "existence question": "Is there a dog in the image?",
    "advice": "Can my employer cut my pay?",
}

records = {}
for task, text in tasks.items():
    inputs = vlm.inputs([text] * len(images), images)
    records[task] = vlm.record(bound, inputs, max_new_tokens=40, reduce=("mean", "dim_mean"))
    plain = vlm.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    print(f"{task}\n    unsteered: {vlm.decode(plain)[1]}\n    steered:   {vlm.decode(records[task].generated)[1]}")

plot_profile(records)

# %% [markdown]
# A caption has many more tokens than "yes.", and its closing is where the steering has work to do. A fairer comparison
# looks at one kind of token at a time: `last_prompt`, which decides the first word, and `generated`.

# %%
parts = {task: record.summary(("layer", "class"), "gate") for task, record in records.items()}
table = pd.concat(parts, names=["task"]).reset_index("task")
table.pivot(index=["class", "task"], columns="layer", values="mean").round(3).rename_axis(columns="mean gate in layer")

# %% [markdown]
# One caption, token by token. `plot_gates` draws a heat map; we write the tokens that were read below the columns. The
# first column is the end of the prompt, and each column decides the word of the next. If the caption closes with a
# stance, look at the last "the", where the topic is chosen, and at the last "is", where the attitude is.

# %%
record, row = records["caption"], 1
figure = plot_gates(record, row=row)
figure.set_size_inches(8.5, 3)
columns = record.data["token"].values[record.data["valid"].values[0, row]]
axes = figure.axes[0]
axes.set_xticks(
    range(len(columns)),
    processor.tokenizer.convert_ids_to_tokens(record.ids[row, columns]),
    rotation=60,
    ha="right",
    rotation_mode="anchor",
)
axes.set_xlabel("token")
figure

# %% [markdown]
# The same gates by hidden dimension, as means over all steered tokens of the 24 captions.

# %%
figure = plot_gates(records["caption"], x="dim")
figure.set_size_inches(10, 2.8)
figure


# %% [markdown]
# Are these dimensions those of the pair, or of the module? We take the ten that open widest in each layer under two
# pairs, on the same pictures, and count how many they share. Two random choices of ten among 128 share fewer than one
# on average. The same for `change`, the product g * s that is really added.


# %%
def top(pair, name, k=10):
    """The k dimensions of largest mean in each layer, as sets."""
    record = recorded[pair]
    return record.top_dimensions(name, k).groupby("layer")["dim"].apply(set)


inputs = vlm.inputs(["Describe the image."] * len(images), images)
chosen = {
    "love rain": ("I love the rain.", "I hate the rain."),
    "hate rain": ("I hate the rain.", "I love the rain."),
    "love forest": ("I love the forest.", "I hate the forest."),
}
recorded = {
    name: vlm.record(steervlm.pair(*pair), inputs, max_new_tokens=40, reduce="dim_mean")
    for name, pair in chosen.items()
}
print(recorded["love rain"].top_dimensions("gate", 3).round(3).to_string(index=False))

shared = {
    f"{name}: love rain, {other}": [len(a & b) for a, b in zip(top("love rain", name), top(other, name), strict=True)]
    for name in ("gate", "change")
    for other in ("love forest", "hate rain")
}
pd.DataFrame(shared).T.rename_axis(index="top ten shared", columns="layer")

# %% [markdown]
# Much in common means that the gate is a property of the module and its layers more than of the pair; little, that
# pairs use dimensions of their own. Compare the two kinds of change: another topic with the same attitude, and the same
# topic with the other attitude.
#
# ## 5. Experiment 3: without u, without the gate
#
# Two more modules come with the package, trained on the same rows: one never sees the unsteered activation, one has
# no gate (g = 1). Same pictures, same pairs, lambda 1.

# %%
modules = {"full": steervlm} | {
    f"without {name}": sp.SteerVLM.load(sp.pocket.trained(f"without_{name}")) for name in ("u", "gate")
}
ablated = {
    group: {name: shares(cases, module.pair(*prompts(cases))) for name, module in modules.items()}
    for group, cases in drawn.items()
}
for name, module in modules.items():
    print(f"{name}: sees u {module.module.config.unsteered}, has a gate {module.module.config.gate}")
draw(ablated, "How captions close, by module")

# %% [markdown]
# A difference of a few captions says nothing at this size, and each module was trained once, with one seed. What the
# parts are worth at larger strengths, or where the module must leave a text alone, is another question: exercise 2.
#
# ## 6. Against ActAdd and CAA
#
# Both take one vector from the pair and add it to the residual stream of one layer:
#
# - **ActAdd**: h(p+) - h(p-) at the last token of the two bare prompts;
# - **CAA**: the mean difference of the two closings as forced answers, over their tokens and eight training pictures.
#
# Here both write at layer 2 with alpha 1, which nobody tuned: it may be far too weak or too strong for a vector, and
# alpha 1 is what the module was trained at. `steer-plugin experiments steervlm` chooses layer and strength on
# validation pictures; that is the comparison to quote. `prompt` puts the target's prompt before the task: it is allowed
# to read the stance. *Recall* is the share of the nouns in a picture that the caption names: a steering should leave it
# alone.

# %%
from pathlib import Path

from steer_plugin.demo.bench import Bench
from steer_plugin.demo.stances import StanceItem, StanceMethods, counted
from steer_plugin.evaluation.table import markdown_table

bench = Bench(vlm, world, Path("unused"), seed=0, progress=False)
methods = StanceMethods(bench, steervlm)
rows = {}
for group, cases in drawn.items():
    for name in ("none", "prompt", "actadd", "caa", "steervlm"):  # layer and alpha matter to the two vectors alone
        items = [StanceItem(case, group, worded=name == "prompt") for case in cases]
        said = bench.try_out(items, methods.method(name, items, layer=2, alpha=1.0), max_new_tokens=40)
        found = counted(items, said)[group]
        rows[f"{group}, {name}"] = {metric: values[:, 0].sum() / values[:, 1].sum() for metric, values in found.items()}
Markdown(markdown_table(rows, corner="per cent"))

# %% [markdown]
# The two vectors are made in a moment and need no training; the module is trained on thousands of rows. They have
# different jobs: a vector pushes in one direction at every token, the module decides at each token what to add.
#
# ## 7. Train your own
#
# `sp.SteerVLM.fit` takes rows of picture, task, p+, p- and the answer that is wanted, and trains the module through the
# frozen model. Here two steps on eight rows, to see that it runs; such a module steers nothing yet. The packaged one is
# made by
#
#     steer-plugin train steervlm
#
# and with `--model`, `--data` and `--images` the same command trains on the authors' VNIA rows for a large model.

# %%
from tempfile import TemporaryDirectory

from steer_plugin.demo.stance_training import pocket_config, stance_rows

rows = stance_rows(vlm, world, pictures=1, progress=False)
print(f"{len(rows)} rows; the first:")
print(f"    p+ {rows[0].p_plus}   p- {rows[0].p_minus}\n    {rows[0].task} -> {rows[0].answer}")

training = sp.SteerVLMTraining(steps=2, batch_size=8, log_every=1)
young = sp.SteerVLM.fit(vlm, rows, pocket_config(vlm), training, progress=False)
print("loss by step:", [round(step["loss"], 2) for step in young.report["history"]])

with TemporaryDirectory() as folder:
    young.save(folder)
    print(sp.SteerVLM.load(folder))

# %% [markdown]
# ## Exercises
#
# 1. Is a negative lambda the same as swapping the pair? Compare `steervlm.pair(love, hate) * -1.0` with
#    `steervlm.pair(hate, love)` and say what in the formula makes them differ.
# 2. Draw section 5 again at lambda 1.5, and once with equal pairs. Which of the three modules keeps the captions whole?
# 3. Steer only some tokens: `love_rain.with_positions("generated")`, then `"last_prompt"`. Then let lambda depend on
#    the step: `love_rain.with_alpha(lambda step: float(step >= 4))`. From which step on is it too late?
# 4. Draw section 3 with `wordings="test"`, prompts that no training pair was worded like. Does more go wrong than with
#    held-out topics?
#
# ## Read on
#
# - [SteerVLM](../docs/steervlm.md): what is published, what was chosen, what it costs. [The pocket
#   VLM](../docs/pocket.md).
# - The paper: arXiv [2510.26769](https://arxiv.org/abs/2510.26769).
# - `steer-plugin experiments steervlm` does the above on more pictures, with validation and confidence intervals.
# - [Notebook 1](01_quick_start.ipynb) and [notebook 2](02_caching_and_positions.ipynb): attaching, positions, reads.
# - [Notebook 3](03_p2s_and_l2s.ipynb): the other paper, Learning to Steer. [Notebook 9](09_evaluation.ipynb):
#   comparisons with controls.
