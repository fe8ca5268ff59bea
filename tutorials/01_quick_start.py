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
# # 1. Quick start
#
# What you will see:
#
# 1. a small vision-language model that affirms things that are not in the picture, and denies some that are;
# 2. two steerings fitted on 200 pictures: one fixed vector (mean steering), and a vector that is predicted from the
#    input itself (Learning to Steer, L2S);
# 3. what each does to the answers, at several strengths, on pictures that neither was fitted on;
# 4. the three ways to steer, in nnsight, TransformerLens and plain Hugging Face, and that all give the same tokens.
#
# Everything runs on one CPU core in less than a minute. The model and its drawn pictures are part of the package.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from transformers.utils import logging

import steer_plugin as sp

logging.disable_progress_bar()
torch.set_num_threads(1)

# %% [markdown]
# ## A model, a picture, a question
#
# `sp.pocket.load()` returns an ordinary `LlavaForConditionalGeneration` and its processor. `sp.attach` makes the one
# object that everything else goes through. `vlm.inputs` applies the chat template and pads on the left.

# %%
model, processor = sp.pocket.load()
world = sp.pocket.World(0)
vlm = sp.attach(model, processor)

scene = world.scene(0)
inputs = vlm.inputs("Is there a dog in the image?", scene.image)
ids = vlm.generate(**inputs, max_new_tokens=12)

print("in the picture:", ", ".join(sorted(scene.nouns)))
print("prompt:", tuple(inputs["input_ids"].shape), "tokens, new:", ids.shape[1] - inputs["input_ids"].shape[1])
print("answer:", vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0])

# %% [markdown]
# ## Where it errs
#
# The world draws pictures, so the truth is known. `world.questions` asks the POPE way: about a thing that is there, and
# about one that is not: chosen at random, because it is popular, or because it usually keeps company with what is there
# (adversarial). We take one question of each kind per picture, so that yes and no are equally often right.

# %%
SUBSETS = ("random", "popular", "adversarial")


def balanced(pictures, split):
    """One true and one false question per picture; the kind of the false one rotates."""
    asked = world.questions(pictures, split)
    number = {scene: i for i, scene in enumerate(dict.fromkeys(q.scene_id for q in asked))}
    return [q for q in asked if q.subset == SUBSETS[number[q.scene_id] % 3]]


def ask(questions, steering=None, batch=64):
    """Greedy answers, in batches."""
    said = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        inputs = vlm.inputs([q.text for q in part], [q.image for q in part])
        ids = vlm.generate(**inputs, steering=steering, max_new_tokens=12)
        said += vlm.decode(ids[:, inputs["input_ids"].shape[1] :])
    return said


def right(questions, said):
    """Which answers begin with the true word."""
    return [text.startswith("yes" if q.label else "no") for q, text in zip(questions, said, strict=True)]


test = balanced(150, "test")
unsteered = ask(test)
accuracy = sum(right(test, unsteered)) / len(test)
yes = sum(text.startswith("yes") for text in unsteered) / len(test)
print(f"{len(test)} questions, {accuracy:.1%} right; says yes to {yes:.1%} of them (50.0% would be true)")

# %%
wrong = [i for i, ok in enumerate(right(test, unsteered)) if not ok][:8]
figure, grid = plt.subplots(2, 4, figsize=(11, 7.4))
for axes, i in zip(grid.flat, wrong, strict=True):
    question = test[i]
    axes.imshow(question.image, interpolation="nearest")
    axes.set_title(f"{question.text}\nsays: {unsteered[i]}\ntruth: {'yes' if question.label else 'no'}", fontsize=9)
    axes.axis("off")
figure.suptitle("Eight wrong answers")
figure.tight_layout(h_pad=2.5)
plt.show()

# %% [markdown]
# ## Fit two steerings on 200 other pictures
#
# A contrastive pair is one question with two openings of the answer: the true one (positive) and the false one
# (negative). Its P2S vector is the difference of the two hidden states at a site. `vlm.extract` makes one per pair,
# together with the *context*: the hidden state at the last prompt token, before any answer.
#
# - **Mean steering** takes the mean of all these vectors. Here the vectors of yes-questions and of no-questions point
#   in opposite directions, so almost nothing is left of the mean.
# - **L2S** fits a small network that predicts the vector from the context.
#
# `preset("pope")` is the authors' recipe; its learning rate is meant for a model 32 times as wide.

# %%
from steer_plugin.contrast import pocket_pairs
from steer_plugin.training.config import preset

shifts = vlm.extract(pocket_pairs(balanced(200, "train")), "resid_post.1", batch_size=64, progress=False)
mean = sp.MeanSteering.fit(shifts, positions="last_prompt")
l2s = sp.L2S.fit(shifts, preset("pope", learning_rate=1e-3), positions="last_prompt")

print(
    f"{len(shifts)} P2S vectors, mean length {shifts.vectors.norm(dim=-1).mean():.2f}, "
    f"length of their mean {mean.vector.norm():.2f}"
)
print(l2s.report)

# %% [markdown]
# ## How strong?
#
# Steering scales: `l2s * 2.0` is twice as strong. We choose the strength on validation pictures, and we look at two
# things: is the answer right, and is it still an answer? A strength that wrecks the text can look good in a score that
# reads the first word only.

# %%
from steer_plugin.demo.data import wellformed
from steer_plugin.evaluation.intervals import bootstrap_interval

validation = balanced(60, "validation")


def share(values):
    """Share of the validation questions, with its 95 % interval over pictures."""
    return bootstrap_interval([float(value) for value in values], [q.scene_id for q in validation], seed=0)


alphas = [0.0, 1.0, 2.0, 4.0, 8.0, 12.0]
tried = {"l2s": l2s, "mean": mean}
curves = {}
for name, steering in tried.items():
    said = [ask(validation, steering * alpha) for alpha in alphas]
    curves[name] = [(share(right(validation, texts)), share(map(wellformed, texts))) for texts in said]

figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
for k, (axes, title) in enumerate(zip(panels, ("right (%)", "well-formed (%)"), strict=True)):
    for name, style in (("l2s", "o-"), ("mean", "s--")):
        found = [values[k] for values in curves[name]]
        bars = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
        colour = "#1f5f8b" if name == "l2s" else "0.5"
        axes.errorbar(alphas, [100 * one.value for one in found], bars, fmt=style, label=name, color=colour, capsize=2)
    axes.set_xlabel("alpha")
    axes.set_title(f"{title}, {len(validation)} validation questions, 95 % over pictures", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
panels[0].legend(frameon=False)
figure.tight_layout()
plt.show()


def best(name):
    """Strength with the most right answers among those that keep 98 % of the text whole."""
    points = zip(curves[name], alphas, strict=True)
    kept = [(score.value, -alpha) for (score, whole), alpha in points if whole.value >= 0.98]
    return -max(kept)[1]


chosen = {name: best(name) for name in tried}
print("chosen on validation:", chosen)

# %% [markdown]
# ## On pictures that nothing was fitted or chosen on

# %%
from steer_plugin.evaluation.table import markdown_table

answers = {"unsteered": unsteered}
for name, steering in tried.items():
    answers[f"{name}, alpha {chosen[name]:g}"] = ask(test, steering * chosen[name])

rows = {}
for name, texts in answers.items():
    ok = right(test, texts)
    rows[name] = {
        s: sum(o for o, q in zip(ok, test, strict=True) if q.subset == s) / sum(q.subset == s for q in test)
        for s in SUBSETS
    }
    rows[name] |= {
        "all": sum(ok) / len(ok),
        "says yes": sum(t.startswith("yes") for t in texts) / len(texts),
        "well-formed": sum(map(wellformed, texts)) / len(texts),
    }
Markdown(markdown_table(rows, corner="per cent"))

# %%
steered = answers[f"l2s, alpha {chosen['l2s']:g}"]
before, after = right(test, unsteered), right(test, steered)
mended = [i for i in range(len(test)) if after[i] and not before[i]]
broken = [i for i in range(len(test)) if before[i] and not after[i]]
print(f"L2S mended {len(mended)} answers and broke {len(broken)}")

figure, grid = plt.subplots(1, 4, figsize=(11, 3.4))
for axes, i in zip(grid, [*mended[:3], *broken[:1]], strict=True):
    axes.imshow(test[i].image, interpolation="nearest")
    axes.set_title(
        f"{test[i].text}\nunsteered: {unsteered[i]}\nL2S: {steered[i]} ({'right' if after[i] else 'wrong'})", fontsize=9
    )
    axes.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Three ways in
#
# The steering above is one object. It works on the same model through nnsight, through TransformerLens and on the plain
# model. From here on we use one question, whose answer L2S changes.

# %%
question = test[mended[0]]
inputs = vlm.inputs(question.text, question.image)
steering = l2s * chosen["l2s"]
prompt = inputs["input_ids"].shape[1]


def answer(ids):
    return vlm.decode(ids[:, prompt:])[0]


# Way 3, a whole job: token ids, whatever the framework.
reference = vlm.generate(**inputs, steering=steering, max_new_tokens=12)
# Way 2, around any call of the plain model.
with vlm.steering(steering) as steered_model:
    around = steered_model.generate(**inputs, max_new_tokens=12)

print(question.text, "| unsteered:", answer(vlm.generate(**inputs, max_new_tokens=12)), "| steered:", answer(reference))
assert torch.equal(reference, around)

# %% [markdown]
# ### nnsight
#
# Way 1 is a block of your own. `apply` steers there, and your own reads see the steered stream. A generation wants an
# empty `tracer.invoke()` for the steering, because nnsight's loop over steps never returns to the lines after it.

# %%
from nnsight import NNsight

hf, _ = sp.pocket.load()
nn_model = NNsight(hf)
nn_vlm = sp.attach(nn_model, processor)

with torch.no_grad(), nn_model.trace(**inputs):
    steering.apply(nn_vlm)
    last_layer = nn_model.model.language_model.layers[3].output.save()
    logits = nn_model.lm_head.output.save()

print("your own read of layer 3:", tuple(last_layer.shape))
print("first answer token:", processor.tokenizer.decode(logits[0, -1].argmax()))

# %%
with nn_model.trace(fn=hf.generate) as tracer:
    with tracer.invoke(**inputs, max_new_tokens=12):
        first_pass = nn_model.model.language_model.layers[2].output.save()
    with tracer.invoke():
        steering.apply(nn_vlm, tracer)
    with tracer.invoke():
        traced = tracer.result.save()

with nn_vlm.steering(steering) as steered_model:
    around = steered_model.generate(**inputs, max_new_tokens=12)

assert torch.equal(traced, reference)
assert torch.equal(around, reference)
assert torch.equal(nn_vlm.generate(**inputs, steering=steering, max_new_tokens=12), reference)
print("nnsight:", answer(traced))

# %% [markdown]
# ### TransformerLens
#
# `hooks` gives the list that `bridge.hooks(fwd_hooks=...)` wants. Generate through the model underneath the bridge:
# `bridge.original_model`. Building a bridge changes the Hugging Face model in place, so it gets a copy of its own.

# %%
from transformer_lens.model_bridge.sources import build_bridge_from_module

hf, _ = sp.pocket.load()
bridge = build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config, tokenizer=None)
tl_vlm = sp.attach(bridge, processor)

with bridge.hooks(fwd_hooks=steering.hooks(tl_vlm)):
    hooked = bridge.original_model.generate(**inputs, max_new_tokens=12)

print([name for name, _ in steering.hooks(tl_vlm)])
print("TransformerLens:", answer(hooked))
assert torch.equal(hooked, reference)
assert torch.equal(tl_vlm.generate(**inputs, steering=steering, max_new_tokens=12), reference)

# %% [markdown]
# ## Keep it
#
# A saved steering is a folder with safetensors and JSON. It carries its sites, positions and strength, and the model
# that it was made for.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

with TemporaryDirectory() as folder:
    l2s.with_alpha(chosen["l2s"]).save(f"{folder}/l2s")
    print(sorted(path.name for path in Path(folder, "l2s").iterdir()))
    loaded = sp.L2S.load(f"{folder}/l2s")

assert torch.equal(vlm.generate(**inputs, steering=loaded, max_new_tokens=12), reference)
print(loaded.write, "|", loaded.positions, "| alpha", loaded.alpha)

# %% [markdown]
# ## Exercises
#
# 1. Steer the generated tokens too: fit with `positions="paper"` (that is `"last_prompt|generated"`). At which strength
#    does the text break, and what does it say then?
# 2. Extract at `"resid_post.2"` and at `"resid_post.0"`. Which layer serves L2S best on the validation questions?
# 3. Fit on every *different* question of `world.questions(200, "train")`: a picture's yes question comes three times,
#    keep it once. Now about three of four true answers are no. Why is mean steering suddenly of use on questions drawn
#    the same way, and what single number would do the same? (`steer_plugin.evaluation.threshold`)
# 4. Subtract instead of adding: what does the model answer under `-(l2s * 2.0)`?
#
# ## Read on
#
# - [Notebook 2](02_caching_and_positions.ipynb): reading activations, which tokens are meant, and patching.
# - [Notebook 3](03_p2s_and_l2s.ipynb): the way from pairs to a table, step by step. [Notebook 9](09_evaluation.ipynb):
#   strengths, intervals and controls by the package's own functions. [Notebook 8](08_large_models.ipynb): large models.
# - [Concepts](../docs/concepts.md), [Paper and code](../docs/paper_vs_code.md), [Limits and errors](../docs/limits.md).
# - `make demo` does the above at full size, with controls and confidence intervals.
