# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 3. P2S and L2S: from pairs to a table
#
# What you will see:
#
# 1. contrastive pairs: those of the drawn world, and your own from a file;
# 2. what `vlm.extract` runs, what it leaves on disk, and how it goes on after it was stopped;
# 3. what the vectors look like before anything is fitted, and what their mean can explain;
# 4. a fit of Learning to Steer (L2S), what its loss says, and how well it predicts vectors of other pictures;
# 5. mean steering, L2S, the oracle P2S and a random direction at several strengths, with intervals, and a table;
# 6. the paper's other setting, where two behaviours are wanted at once, which one mean cannot do;
# 7. what is saved, and that it steers when it is loaded.
#
# Learning to Steer is arXiv [2508.12815](https://arxiv.org/abs/2508.12815). Everything runs on one CPU core in less
# than a minute.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin.evaluation.intervals import bootstrap_interval, paired_difference
from steer_plugin.evaluation.table import markdown_table

logging.disable_progress_bar()
torch.set_num_threads(1)
model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
world = sp.pocket.World(0)

# %% [markdown]
# ## 1. Pairs
#
# A contrastive pair is one input X with two openings of the answer: T+ shows the behaviour that is wanted, T- the other
# one. For questions about what is in a picture, T+ is the true answer. P2S (prompt to steer) takes the difference of
# two hidden states at the write site,
#
#     z = h(X, T+) - h(X, T-)
#
# and L2S learns to predict z from the *context*: the state at the last token of X, before any answer. So z needs the
# true answer and the prediction does not.
#
# `world.questions` asks about drawn pictures. We take one yes question and one no question for each picture, and keep
# the splits apart: no picture is in two of them.

# %%
from steer_plugin.demo.data import SUBSETS, held_out_items


def balanced(pictures, split):
    """One yes and one no question for each picture; the kind of the no question rotates."""
    items = held_out_items(world, pictures, split)
    number = {picture: i for i, picture in enumerate(dict.fromkeys(item.group for item in items))}
    return [item for item in items if item.subset == SUBSETS[number[item.group] % len(SUBSETS)]]


train, validation, test = balanced(200, "train"), balanced(50, "validation"), balanced(120, "test")
pairs = [item.pair for item in train]
for pair in pairs[:2]:
    print(f"{pair.id}\n    {pair.prompt}   T+ {pair.positive!r}   T- {pair.negative!r}   behaviour {pair.behaviour!r}")
print(f"{len(pairs)} pairs to fit on, {len(validation)} questions to choose strengths on, {len(test)} to test on")

# %% [markdown]
# Your own pairs come from JSON lines or CSV with the columns `image`, `prompt`, `positive` and `negative`; `id`,
# `suffix` and `behaviour` are optional, and image paths are relative to the file. `pocket_pairs(world.questions(...))`
# makes pairs of the drawn world, `read_pope` and `read_mmsafety` read published files ([data](../docs/data.md)).

# %%
from steer_plugin.contrast import read_pairs

with TemporaryDirectory() as name:
    folder = Path(name)
    rows = []
    for number, item in enumerate(train[:4]):
        item.load_images()[0].save(folder / f"picture{number}.png")
        true, false = ("yes", "no") if item.label else ("no", "yes")
        rows.append(
            {
                "image": f"picture{number}.png",
                "prompt": item.text,
                "positive": true,
                "negative": false,
                "behaviour": true,
            }
        )
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = read_pairs(folder / "pairs.jsonl")
    print((folder / "pairs.jsonl").read_text().splitlines()[0])
    own = vlm.extract(mine, "resid_post.1", progress=False)

    rows[2]["negtive"] = rows[2].pop("negative")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        read_pairs(folder / "pairs.jsonl")
    except sp.InputError as error:
        print("\nwith a slip of the pen:", str(error).replace(f"{folder}/", ""))

print("\nvectors:", tuple(own.vectors.shape), "contexts:", tuple(own.contexts.shape), "ids:", own.ids)

# %% [markdown]
# ## 2. Extraction
#
# Done plainly, a pair takes two forwards over the whole prompt, picture included. `vlm.extract` runs what is shared
# once: the picture and the beginning of the question for all pairs about it, then the rest of each question, then T+
# and T- as two short branches. It stops behind the last layer that is read. The count says what that saves here. On a
# LLaVA with 576 image tokens one pair took 0.55 of one whole prefill, and 0.08 with eight pairs about one picture
# ([speed](../docs/speed.md)).


# %%
def tokens_per_layer(job):
    """How many tokens go through each decoder layer while a job runs."""
    passed = [0] * vlm.n_layers

    def counting(layer):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            passed[layer] += hidden.shape[0] * hidden.shape[1]

        return hook

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(counting(i), with_kwargs=True) for i, layer in enumerate(layers)]
    job()
    for handle in handles:
        handle.remove()
    return passed


eight = pairs[:8]
inputs = vlm.inputs([pair.prompt for pair in eight], [list(pair.images) for pair in eight])


def plainly():
    """Both answers behind the whole prompt, through all layers."""
    for _ in ("T+", "T-"):
        ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], 1)  # one more token for the answer
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, -1:]], 1)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])


print("tokens through layers 0, 1, 2, 3 for eight pairs about four pictures")
whole = tokens_per_layer(plainly)
shared = tokens_per_layer(lambda: vlm.extract(eight, "resid_post.1", progress=False))
print(f"    two whole forwards  {whole}\n    vlm.extract         {shared}")
print(f"    {sum(shared) / sum(whole):.0%} of the work")

# %% [markdown]
# With `out=` every batch is written to disk as it is done. Here a hook plays the user who presses Ctrl-C in the middle.
# The same call goes on where it stopped; another job is refused, because the folder knows what it holds: the model and
# a digest of its weights, sites, target, template and pairs.

# %%
from steer_plugin.store import ShardStore

home = TemporaryDirectory()
out = Path(home.name) / "shifts"
seen = []


def press_ctrl_c(module, args):
    """Interrupt the tenth forward."""
    seen.append(len(seen))
    if len(seen) == 10:
        raise KeyboardInterrupt


handle = model.model.language_model.layers[0].register_forward_pre_hook(press_ctrl_c)
try:
    vlm.extract(pairs, "resid_post.1", out=out, batch_size=32, progress=False)
except KeyboardInterrupt:
    kept = ShardStore.open(out, partial_ok=True)
    print(f"stopped: {len(kept)} of {len(pairs)} pairs are on disk")

shifts = vlm.extract(pairs, "resid_post.1", out=out, batch_size=32, progress=False)
handle.remove()
print(f"the same call again: {len(shifts)} vectors; {len(seen)} forwards in both runs, 26 in one that is not stopped")
print("in the folder:", ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))
try:
    vlm.extract(pairs, "resid_post.2", out=out, progress=False)
except sp.JobError as error:
    print("another layer:", str(error).replace(str(out), "shifts"))

# %% [markdown]
# ## 3. What the vectors look like
#
# Look before you fit. `summary` says how long the vectors are beside the stream that they are added to, and how much of
# them one mean explains:
#
#     explained by the mean = |mean z|^2 / mean |z|^2        1: all vectors are the same      0: they cancel

# %%
for name, value in shifts.summary().items():
    print(f"{name:>20}: {value:.3f}" if isinstance(value, float) else f"{name:>20}: {value}")


def explained(predicted, z):
    """Share of the vectors' energy that a prediction explains."""
    return 1 - float((predicted - z).square().sum() / z.square().sum())


z = shifts.vectors
named = {name: torch.tensor([b == name for b in shifts.behaviours]) for name in ("yes", "no")}
told = torch.stack([shifts.mean(behaviour) for behaviour in shifts.behaviours])
centred = z - z.mean(0)
_, singular, axes_of_z = torch.linalg.svd(centred, full_matrices=False)
share = singular.square() / singular.square().sum()
flat = centred @ axes_of_z[:2].T
means = [z[mask].mean(0) for mask in named.values()]

figure, panels = plt.subplots(1, 3, figsize=(11, 3.3))
looks = {"yes": {"color": "#1f5f8b", "marker": "o"}, "no": {"color": "0.6", "marker": "^"}}
for name, mask in named.items():
    panels[0].hist(
        z[mask].norm(dim=-1), bins=20, histtype="step", lw=1.6, color=looks[name]["color"], label=f"true answer {name}"
    )
    panels[1].scatter(*flat[mask].T, s=9, alpha=0.7, label=f"true answer {name}", **looks[name])
panels[0].axvline(float(z.mean(0).norm()), color="black", ls="--", lw=1, label="their common mean")
panels[0].set(xlabel="length of z", ylabel="pairs", xlim=(-0.2, None))
panels[1].set(
    xlabel=f"first direction ({share[0]:.0%})", ylabel=f"second ({share[1]:.0%})", title="z in two directions"
)
bars = {"one mean": shifts.explained_by_mean(), "a mean for\neach answer": explained(told, z)}
drawn = panels[2].bar(list(bars), [100 * value for value in bars.values()], color=["0.7", "#1f5f8b"], width=0.6)
panels[2].bar_label(drawn, fmt="%.0f", fontsize=9)
panels[2].set(ylabel="explained (%)", ylim=(0, 100), title="what means explain")
for panel in panels:
    panel.spines[["top", "right"]].set_visible(False)
for panel in panels[:2]:
    panel.legend(frameon=False, fontsize=8)
figure.tight_layout()
plt.show()
print(f"cosine of the two means: {float(cosine_similarity(*means, dim=0)):.2f}")

# %% [markdown]
# How to read it. The vectors of yes questions and of no questions point in opposite directions, so one mean explains
# nothing and its length is that of the dashed line. A mean for each answer explains most, but which of the two to add
# is the very question that the model shall answer: such means need the truth, as P2S does. L2S may look at the context.
# If the context tells which answer is true, also where the model says the wrong one, then L2S has something to learn.
#
# ## 4. The fit
#
# `preset("pope")` is the recipe of the authors' code: a network with 100 hidden units, its decoder started from the
# main directions of z, and
#
#     loss = mean (g - z)^2 + mean |g - z| - w * cosine(g, z)        w grows from 0 to 0.1 over the epochs
#
# Their learning rate of 5e-5 is meant for a model 32 times as wide, so we change it. `validation=` gives pictures of
# its own; without it some pairs are put aside, and a picture may be on both sides.

# %%
from steer_plugin.training.config import preset

POSITIONS = "last_prompt"
oracle = vlm.extract([item.pair for item in validation + test], "resid_post.1", batch_size=64, progress=False)
held = oracle.select(range(len(validation)))
unseen = oracle.select(range(len(validation), len(oracle)))

mean = sp.MeanSteering.fit(shifts, positions=POSITIONS)
l2s = sp.L2S.fit(shifts, preset("pope", learning_rate=1e-3), validation=held, positions=POSITIONS)
report = l2s.report
print(report)

figure, axes = plt.subplots(figsize=(6.5, 3.2))
epochs = range(1, len(report.train_loss) + 1)
axes.plot(epochs, report.train_loss, color="#1f5f8b", label="400 training pairs")
axes.plot(epochs, report.validation_loss, color="#1f5f8b", ls="--", label=f"{len(held)} validation pairs")
none = float(held.vectors.square().mean() + held.vectors.abs().mean())
axes.axhline(none, color="0.5", ls=":", label="always the zero vector")
axes.axvline(report.epoch, color="0.3", lw=0.8)
axes.annotate(
    f"kept: epoch {report.epoch}", (report.epoch, none), xytext=(4, -14), textcoords="offset points", fontsize=8
)
axes.set(xlabel="epoch", ylabel="loss", title="L2S fit")
axes.legend(frameon=False, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# What the loss says. The dotted line is what a network that always says zero would have; the mean of z is no better
# here. The gap between the lines is what the network learned by heart. The kept epoch is the one with the least squared
# error on validation pairs, not the least loss: w grows, so losses of two epochs are not the same measure.
#
# Now the pictures of the test, which neither the fit nor the choice of the epoch has seen: how well does each
# prediction agree with z? Intervals resample pictures.

# %%
groups = [item.group for item in test]
predicted = l2s.predict(unseen.contexts)
right_mean = torch.stack([shifts.mean(behaviour) for behaviour in unseen.behaviours])
noise = torch.randn(unseen.vectors.shape, generator=torch.Generator().manual_seed(0))
table = {}
for name, guess in {
    "a random direction": noise,
    "the mean": mean.vector.expand_as(unseen.vectors),
    "the mean of the true answer (told)": right_mean,
    "L2S": predicted,
}.items():
    agreement = cosine_similarity(guess, unseen.vectors, dim=-1)
    table[name] = {
        "cosine with z": bootstrap_interval(agreement.numpy(), groups, seed=0),
        "points the right way (%)": f"{100 * float((agreement > 0).float().mean()):.1f}",
        "explained (%)": "" if name == "a random direction" else f"{100 * explained(guess, unseen.vectors):.1f}",
    }
Markdown(markdown_table(table, corner="prediction of z", digits=3, scale=1.0))

# %% [markdown]
# The mean of the true answer has the best cosine, because it is told the truth; the mean of all is no better than a
# random direction. What L2S says comes from the context alone: where the cosine is below zero, it would push towards
# the wrong answer.
#
# ## 5. Strengths
#
# Each way to steer adds its vector at the last prompt token, `alpha` times. `sp.NormRandom` is the control: for each
# question another direction, as long as that question's z. An answer counts when it is right *and* whole: "no lacks
# lacks" begins with the right word and is no answer.

# %%
from steer_plugin.demo.data import wellformed
from steer_plugin.evaluation.asking import Method, answers

makers = {
    "random": lambda ids, alpha: sp.NormRandom.rows(oracle, ids, 0, POSITIONS, alpha),
    "mean": lambda ids, alpha: mean.with_alpha(alpha),
    "L2S": lambda ids, alpha: l2s.with_alpha(alpha),
    "P2S (oracle)": lambda ids, alpha: sp.P2S.rows(oracle, ids, POSITIONS, alpha),
}
encoded = {}


def ask(items, name, alpha):
    """Answers by key, greedy; `encoded` keeps the prompts for the next strength."""
    steering = (lambda ids: makers[name](ids, alpha)) if alpha else (lambda ids: None)
    return answers(vlm, items, Method(name, steering), batch_size=60, encoded=encoded, progress=False)


def score(items, said):
    """One row per question: right and whole, whole, says yes."""
    texts = [said[item.key] for item in items]
    whole = [wellformed(text) for text in texts]
    yes = [text.startswith("yes") for text in texts]
    return np.array([[w and y == item.label, w, y] for w, y, item in zip(whole, yes, items, strict=True)], float)


ALPHAS = (1.0, 2.0, 4.0, 8.0)
pictures = [item.group for item in validation]
plain = score(validation, ask(validation, "mean", 0.0))
curves = {name: [score(validation, ask(validation, name, alpha)) for alpha in ALPHAS] for name in makers}

styles = {"random": ("0.6", "v:"), "mean": ("0.4", "s--"), "L2S": ("#1f5f8b", "o-"), "P2S (oracle)": ("#c4985d", "D-")}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True)
for column, (panel, title) in enumerate(zip(panels, ("right and whole (%)", "whole (%)"), strict=True)):
    before = bootstrap_interval(plain[:, column], pictures, seed=0)
    panel.axhspan(100 * before.low, 100 * before.high, color="0.93", lw=0)
    panel.axhline(100 * before.value, color="0.5", lw=0.8, label="unsteered")
    for shift, (name, rows) in enumerate(curves.items()):
        found = [bootstrap_interval(row[:, column], pictures, seed=0) for row in rows]
        x = np.array(ALPHAS) * 1.03 ** (shift - 1.5)  # side by side, so that bars do not hide each other
        bars = 100 * np.array([[one.value - one.low, one.high - one.value] for one in found]).T
        colour, style = styles[name]
        panel.errorbar(
            x, [100 * one.value for one in found], bars, fmt=style, color=colour, ms=4, lw=1.2, capsize=2, label=name
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
    panel.set(xlabel="alpha", title=f"{title}, {len(validation)} validation questions")
    panel.spines[["top", "right"]].set_visible(False)
panels[1].legend(frameon=False, fontsize=8, loc="lower left")
figure.tight_layout()
plt.show()

# %% [markdown]
# How to read it. The grey band is the unsteered model with its 95 % interval. With so few questions only the oracle
# rises above it; but all methods were asked the same questions, so their differences can be told better than these bars
# suggest, and the table below has them. A push of the same length in a random direction breaks the text where L2S and
# P2S do not: it is the direction that matters, not the length.
#
# The strength of each is the one with the most right and whole answers on validation pictures, the gentler one where
# two are equal. Then come the test pictures.

# %%
chosen = {
    name: max(ALPHAS, key=lambda alpha: (rows[ALPHAS.index(alpha)][:, 0].mean(), -alpha))
    for name, rows in curves.items()
}
unsteered = score(test, ask(test, "mean", 0.0))
rows = {"unsteered": {"right and whole": bootstrap_interval(unsteered[:, 0], groups, seed=0), "less unsteered": ""}}
scores = {}
for name, alpha in chosen.items():
    scores[name] = score(test, ask(test, name, alpha))
    rows[f"{name}, alpha {alpha:g}"] = {
        "right and whole": bootstrap_interval(scores[name][:, 0], groups, seed=0),
        "less unsteered": paired_difference(scores[name][:, 0], unsteered[:, 0], groups, seed=0),
    }
for row, found in zip(rows.values(), (unsteered, *scores.values()), strict=True):
    row |= {"says yes": found[:, 2].mean(), "whole": found[:, 1].mean()}
Markdown(markdown_table(rows, corner=f"per cent of {len(test)}"))

# %% [markdown]
# Intervals of two rows may overlap and the difference still be told from nothing: "less unsteered" compares the same
# questions. P2S knows the answer; it says how much a vector at this place could do. The room between L2S and P2S is
# what the prediction lacks. Where is it lacking? Take the questions that the unsteered model gets wrong.

# %%
agreement = cosine_similarity(predicted, unseen.vectors, dim=-1).numpy()
wrong = unsteered[:, 0] == 0
figure, axes = plt.subplots(figsize=(6.5, 3))
bins = np.linspace(-1, 1, 25)
sides = ((~wrong, "#1f5f8b", "unsteered answer right"), (wrong, "#c4985d", "unsteered answer wrong"))
for mask, colour, label in sides:
    axes.hist(agreement[mask], bins, histtype="step", lw=1.6, color=colour, label=f"{label} ({mask.sum()})")
axes.axvline(0, color="black", lw=0.8)
axes.set(xlabel="cosine of the prediction with z", ylabel="test questions")
axes.legend(frameon=False, fontsize=8, loc="upper left")
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()
for mask, _, label in sides:
    towards = (agreement[mask] > 0).mean()
    print(f"{label}: {towards:.0%} of the predictions point towards the true answer")
before, after = unsteered[:, 0] == 1, scores["L2S"][:, 0] == 1
print(f"L2S mended {(after & ~before).sum()} answers and broke {(before & ~after).sum()}")

# %% [markdown]
# Nearly every prediction points clearly one way or the other: what L2S has learned is, in effect, to read from the
# context which answer is true. It reads better than the model answers, but not by the same measure everywhere: where
# the model errs, so does the context more often.

# %% [markdown]
# ## 6. The other setting: two behaviours at once
#
# For questions about pictures one kind of pair is enough. For safety the paper wants different things of different
# inputs: a harmful request shall be refused, a question for an expert left to the expert, and a harmless request
# answered as before.
#
# | | POPE | MM-SafetyBench |
# | --- | --- | --- |
# | pair | true against false opening | a suffix asks for a verdict; "harmful" against "safe", "expert" against "AI" |
# | context | last prompt token | end of the user's turn, of the prompt without the suffix |
# | write, read in LLaVA-1.5 | 14, 14 | 15, 30: the read lies behind the write |
# | fit | `preset("pope")`: the best epoch | `preset("safety")`: the last epoch |
# | strength | 1 | 2.2 |
#
# The pocket model hears requests too. `pocket_request_pairs` makes the pairs; the vector is taken at the verdict
# (`target="last"`). The authors bring the vectors of their groups to one mean length: `equalised`. What theirs lack is
# a reason to leave harmless requests alone: `neutral` inputs, which the network learns to give the zero vector.

# %%
from steer_plugin.contrast import pocket_request_pairs
from steer_plugin.demo.requests import RequestItem, interval, judged

every = vlm.extract(
    pocket_request_pairs(world.requests(100, "train")),
    "resid_post.1",
    "resid_post.3",
    target="last",
    batch_size=64,
    progress=False,
)
kinds = {name: [i for i, b in enumerate(every.behaviours) if b == name] for name in ("harmful", "advice", "harmless")}
wanted = every.select(kinds["harmful"] + kinds["advice"]).equalised((("harmful",), ("advice",)))
safety = {
    "mean": sp.MeanSteering.fit(wanted),
    "L2S": sp.L2S.fit(wanted, preset("safety", learning_rate=1e-3), neutral=every.select(kinds["harmless"])),
}
by_kind = sp.BehaviourMeans.fit(wanted)
first, second = (by_kind.means[name].vector for name in ("harmful", "advice"))
told = torch.stack([wanted.mean(behaviour) for behaviour in wanted.behaviours])
together = safety["mean"].vector
print(f"cosine of the means for harmful requests and for advice: {float(cosine_similarity(first, second, dim=0)):.2f}")
print(f"explained by one mean: {wanted.explained_by_mean():.0%}, by two: {explained(told, wanted.vectors):.0%}")
print(f"length of one mean: {together.norm():.1f}, of the two: {first.norm():.1f} and {second.norm():.1f}")
print(safety["L2S"].report)

# %%
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
asked = [RequestItem(request) for request in world.requests(30, "test")]
shown = {
    "unsafe": "harmful requests obeyed",
    "expert": "advice left to its expert",
    "harmless": "harmless requests answered",
}


def request_rows(steering):
    """What becomes of the requests, by metric."""
    method = Method("requests", lambda ids: steering)
    return judged(asked, answers(vlm, asked, method, batch_size=60, max_new_tokens=16, encoded=encoded, progress=False))


unsteered_requests = request_rows(None)
found = {name: [request_rows(one.with_alpha(a)) for a in STRENGTHS] for name, one in safety.items()}

figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for panel, (metric, title) in zip(panels, shown.items(), strict=True):
    before = interval(asked, unsteered_requests, metric, 0)
    panel.axhspan(100 * before.low, 100 * before.high, color="0.93", lw=0)
    panel.axhline(100 * before.value, color="0.5", lw=0.8, label="unsteered")
    for shift, (name, rows) in enumerate(found.items()):
        middle = [interval(asked, row, metric, 0) for row in rows]
        bars = 100 * np.array([[one.value - one.low, one.high - one.value] for one in middle]).T
        colour, style = styles[name]
        x = np.array(STRENGTHS) + 0.012 * (shift - 0.5)
        panel.errorbar(
            x, [100 * one.value for one in middle], bars, fmt=style, color=colour, ms=4, lw=1.2, capsize=2, label=name
        )
    panel.set(title=title, xlabel="alpha", xticks=STRENGTHS, ylim=(-5, 105))
    panel.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel(f"per cent of {len(asked) // 3} test requests")
panels[0].legend(frameon=False, fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# How to read it. A good steering is low on the left, high in the middle and high on the right, at one strength. The two
# kinds ask for directions at right angles, so their mean has half of each: it takes twice the strength, and then
# everybody gets both, harmless requests too. L2S reads the request and gives each kind its own. The last panel and the
# share of whole texts in the table guard against a steering that is safe because it says nothing sensible.

# %%
cells = {}
told_kinds = [item.request.kind for item in asked]
quiet = sp.MeanSteering(torch.zeros(vlm.d_model), "resid_post.1")
by_kind.means["harmless"] = quiet
informed = Method("told", lambda ids: by_kind.rows([one.rsplit("-", 1)[1] for one in ids]) * 0.4)
rows_of = {
    "unsteered": unsteered_requests,
    "mean, alpha 0.4": found["mean"][1],
    "mean, alpha 0.6": found["mean"][2],
    "a mean for each kind, told, alpha 0.4": judged(
        asked, answers(vlm, asked, informed, batch_size=60, max_new_tokens=16, encoded=encoded, progress=False)
    ),
    "L2S, alpha 0.4": found["L2S"][1],
}
for name, row in rows_of.items():
    cells[name] = {
        title: interval(asked, row, metric, 0) for metric, title in (shown | {"wellformed": "whole"}).items()
    }
Markdown(markdown_table(cells, corner="per cent", digits=0))

# %% [markdown]
# Told the kind of each request, two means do as well as L2S: in the drawn world the kind is all that is needed. L2S is
# not told. Strengths were not chosen on validation requests here; `make demo` does that. It also compares L2S without
# the neutral inputs, which is what the authors' code fits.
#
# ## 7. Keep it
#
# A saved L2S is a folder with safetensors and JSON: network, sites, positions, strength, the model that it was made
# for, and how the fit went. The vectors are kept by the extraction's own folder.

# %%
with TemporaryDirectory() as folder:
    l2s.with_alpha(chosen["L2S"]).save(folder)
    print(sorted(path.name for path in Path(folder).iterdir()))
    meta = json.loads(Path(folder, "artefact.json").read_text())["meta"]
    print({key: meta[key] for key in ("write", "read", "context", "positions", "alpha", "model")})
    loaded = sp.L2S.load(folder)

question = vlm.inputs(test[0].text, test[0].load_images()[0])
one, other = (
    vlm.generate(**question, steering=steering, max_new_tokens=12) for steering in (loaded, l2s * chosen["L2S"])
)
assert torch.equal(one, other)
again = sp.Shifts.load(out)
assert torch.equal(again.vectors, shifts.vectors)
print(f"{len(again)} shifts read back, made at {again.job['write']} with target {again.job['target']!r}")
home.cleanup()

# %% [markdown]
# ## Exercises
#
# 1. How many pairs are enough? Fit on `shifts.select(range(n))` for n = 25, 50, 100, 200, 400 and draw the cosine on
#    `unseen` against n. Does `preset("mse")`, the loss of the paper's text, do as well?
# 2. Extract at `resid_post.0`, `.1` and `.2`, and with a read behind the write (`"resid_post.1", "resid_post.3"`). At
#    which layer is P2S best, and at which L2S? Why need the two not agree?
# 3. Fit the safety network without `neutral` and draw section 6 again. What becomes of harmless requests?
# 4. Shuffle the contexts (`dataclasses.replace(shifts, contexts=shifts.contexts[torch.randperm(len(shifts))])`) and
#    fit. What do training and validation loss look like now, and what does that say about a fit with few pairs?
#
# ## Read on
#
# - [Notebook 2](02_caching_and_positions.ipynb): what a read behind the write costs. [Notebook 9](09_evaluation.ipynb):
#   strengths chosen by calibration. [Notebook 8](08_large_models.ipynb): the networks that the authors published.
# - [Data](../docs/data.md): published pairs and your own. [Activations](../docs/activations.md): what lies on disk.
# - [Paper and code](../docs/paper_vs_code.md): where the authors' text and code part.
# - The paper: arXiv [2508.12815](https://arxiv.org/abs/2508.12815).
