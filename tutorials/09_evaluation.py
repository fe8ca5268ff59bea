# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 9. Evaluation and calibration
#
# What you will see:
#
# 1. a whole evaluation in one call: methods, their controls, intervals, differences, costs, and the folder that it
#    leaves;
# 2. how to read such a table: what an interval over pictures is, when a difference is told, what a control is for;
# 3. what steering costs in text, and why a score alone is not enough;
# 4. a strength chosen by `sp.calibrate` within a bound on damage, and a grid of layers and strengths by `sp.sweep`;
# 5. both in one: `sp.Strengths`, which chooses before anything is tested;
# 6. `sp.steerability`: how far each single input moves, and which ones move the wrong way.
#
# Samples are small, so that everything runs on one CPU core in less than a minute: read the intervals, not the digits.

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
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin.evaluation.table import markdown_table

logging.disable_progress_bar()
torch.set_num_threads(1)
vlm = sp.attach(*sp.pocket.load())
world = sp.pocket.World(0)
home = TemporaryDirectory()
folder = Path(home.name)

# %% [markdown]
# ## 1. One call
#
# A *benchmark* has items to ask, what to fit on, what to choose strengths on, and metrics. Five come with the package,
# on the drawn world and on the published files (`open_benchmark`). A *lineup* says who takes part. `mean` and `l2s` are
# fitted here, on other pictures than those tested; `prompt` is an instruction in words.
#
# Strength and layers are set by hand first; section 4 chooses them.

# %%
from steer_plugin.demo.benchmarks import pocket_benchmark

benchmark = pocket_benchmark("pope", world, pictures=40, train=200, validation=60)
lineup = sp.Lineup(
    ("none", "prompt", "mean", "l2s"),
    write="resid_post.2",
    read="resid_post.3",
    positions="last_prompt",
    alpha=2.0,
)
found = sp.evaluate(vlm, benchmark, lineup, folder / "pope", costed=20, progress=False)
print(f"{found.n} questions about {len(set(found.groups))} pictures; headline: {found.headline}")
Markdown(found.table(["mean accuracy", "mean yes-ratio", "mean well-formed"]))

# %% [markdown]
# Rows with a dash are controls. In brackets are 95 % intervals; ° marks what cannot be told from unsteered: a
# permutation test, its p-value corrected by Holm over all methods of a metric, at 5 %.
#
# The same call again asks nothing: answers, verdicts and costs are on disk, and a killed run goes on. A folder of
# another strength, model or set of questions is refused.

# %%
forwards = []
handle = vlm.root.register_forward_pre_hook(lambda module, args: forwards.append(1))
again = sp.evaluate(vlm, benchmark, lineup, folder / "pope", costed=20, progress=False)
handle.remove()
assert again.as_json()["scores"] == found.as_json()["scores"]
print("forwards of the model in the second call:", len(forwards))
print("in the folder:", ", ".join(sorted(path.name + "/" * path.is_dir() for path in (folder / "pope").iterdir())))
metrics = json.loads((folder / "pope" / "metrics.json").read_text())
print("provenance:", ", ".join(sorted(metrics["provenance"])))
try:
    other = sp.Lineup(("none", "l2s"), write="resid_post.2", read="resid_post.3", positions="last_prompt", alpha=4.0)
    sp.evaluate(vlm, benchmark, other, folder / "pope", progress=False)
except sp.JobError as error:
    print("another strength:", str(error).replace(str(folder), "...")[:160])

# %% [markdown]
# ## 2. How to read the table
#
# **Intervals are over pictures.** Several questions are about one picture and err together. An interval that takes them
# for independent promises too much: below it is narrower by about a third.

# %%
from steer_plugin.evaluation.intervals import bootstrap_interval, paired_difference

right = {name: runs[0]["mean accuracy"][:, 0] for name, runs in found.runs.items()}
rows = {}
for name in ("none", "l2s"):
    rows[name] = {
        "pictures resampled": bootstrap_interval(right[name], found.groups, seed=0),
        "questions resampled": bootstrap_interval(right[name], seed=0),
    }
rows["l2s less none"] = {
    "pictures resampled": paired_difference(right["l2s"], right["none"], found.groups, seed=0),
    "questions resampled": paired_difference(right["l2s"], right["none"], seed=0),
}
Markdown(markdown_table(rows, corner="accuracy, %"))

# %% [markdown]
# **Differences are paired.** Whether two intervals overlap decides nothing: the difference on the same questions does,
# which is the last row. `compare` holds any two methods against each other.
#
# **Controls.** `swapped` turns the sign, `random` is another direction of the same length at every token. What a method
# gains over *both* is due to its direction; if the random one gains as much, the pushing did it.

# %%
for first, second in (("l2s", "none"), ("l2s", "mean"), ("l2s", "l2s, random"), ("l2s", "l2s, swapped")):
    gap = found.compare(first, second)
    low, high = 100 * gap.difference.low, 100 * gap.difference.high
    print(
        f"{first} less {second:<12}: {100 * gap.difference.value:+5.1f} [{low:+.1f}, {high:+.1f}], p = {gap.p_value:.2g}"
    )

names = list(found.scores)
figure, axes = plt.subplots(figsize=(8, 3.6))
for row, name in enumerate(names):
    score = found.score(name)
    control = name in found.controls
    bars = [[100 * (score.value - score.low)], [100 * (score.high - score.value)]]
    axes.errorbar(
        100 * score.value, row, xerr=bars, fmt="s" if control else "o", color="0.6" if control else "#1f5f8b", capsize=2
    )
base = found.score("none")
axes.axvspan(100 * base.low, 100 * base.high, color="0.93", lw=0)
axes.axvline(100 * base.value, color="0.5", lw=0.8)
axes.set_yticks(range(len(names)), [f"- {name}" if name in found.controls else name for name in names])
axes.invert_yaxis()
axes.set_xlabel(
    f"mean accuracy (%) of {found.n} questions, 95 % over {len(set(found.groups))} pictures; grey: controls"
)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 3. What it costs
#
# Every evaluation measures what steering does to text beside what it does to the score: KL to the unsteered model along
# the method's own answers, their perplexity under the unsteered model, lengths, empty and unfinished answers, and how
# varied the words are.

# %%
Markdown(found.cost_table())

# %% [markdown]
# How to read it. An answer that is meant to change costs KL too, so KL is no fault by itself; but L2S moves the model
# no more than its random control does, and gains more. Perplexity and unfinished answers rise when text breaks. Answers
# of one word say little about variety: distinct-n is for captions.
#
# ## 4. A strength within a bound
#
# `calibrate` takes one steering or several by name, items to choose on, a score per item, and a bound on damage. It
# brackets and refines on a log scale, and chooses the gentlest point that cannot be told from the best; if nothing
# beats the unsteered model, it chooses nothing ([calibration](../docs/calibration.md)). Score and quality here: right,
# and whole.

# %%
from steer_plugin.contrast import pocket_pairs
from steer_plugin.demo.data import fitting_items, held_out_items, wellformed
from steer_plugin.evaluation.pope import predictions
from steer_plugin.training.config import preset

pairs = [item.pair for item in fitting_items(world, 200)]
choices = {}
for write, read in ((1, 1), (2, 3)):
    shifts = vlm.extract(pairs, sp.resid_post(write), sp.resid_post(read), batch_size=64, progress=False)
    choices[f"{write} from {read}"] = sp.L2S.fit(
        shifts, preset("pope", learning_rate=1e-3, epochs=60), positions="last_prompt"
    )

items = held_out_items(world, 30, "validation")
pictures = [item.group for item in items]
labels = np.array([item.label for item in items])


def right_and_whole(texts):
    """1 for an answer that is right and whole, else 0."""
    whole = np.array([wellformed(texts[item.key]) for item in items])
    return ((predictions(items, texts) == labels) & whole).astype(float).tolist()


def whole_answers(texts):
    """1 for an answer that is whole."""
    return [float(wellformed(texts[item.key])) for item in items]


chosen = sp.calibrate(
    vlm, choices["2 from 3"], items, right_and_whole, bound=sp.QualityBound(whole_answers, 0.05),
    groups=pictures, alphas=(1.0, 16.0), max_points=7, progress=False,
)  # fmt: skip
print(chosen.why)
print(f"share of prompt tokens that were not run again: {chosen.reused:.0%}")
chosen.plot()

# %% [markdown]
# How to read it. Above, the score with its interval, the dotted line in the grey band is the unsteered model; crosses
# break the bound, and the ring is the choice. Below, the damage with the bound dashed: here the share of whole answers
# that is lost. `KLBound` needs no judge of quality, but forbids the change that is wanted where the first token is the
# behaviour.
#
# `sweep` fills a grid. The prompts run once for all its cells.

# %%
grid = sp.sweep(
    vlm, choices, items, right_and_whole, alphas=(1, 2, 4, 8, 16), damage=sp.QualityBound(whole_answers, 0.05),
    groups=pictures, progress=False,
)  # fmt: skip
print(grid.best().why)
grid.plot("behaviour")

# %%
grid.plot("damage")

# %% [markdown]
# Rows are layers, write from read. Hatched cells break the bound. Two cells beside each other that differ by a point or
# two cannot be told apart with so few questions: `best` takes the gentlest of those within one standard error of the
# best.
#
# ## 5. Chosen before it is tested
#
# `sp.Strengths` does this inside an evaluation, for every method that is fitted, on the benchmark's validation items.
# Test items are not looked at.

# %%
strengths = sp.Strengths(
    alphas=(1.0, 8.0), layers=(("resid_post.1", "resid_post.1"), ("resid_post.2", "resid_post.3")), max_points=4
)
small = sp.Lineup(("none", "l2s"), positions="last_prompt", controls=False)
calibrated = sp.evaluate(vlm, benchmark, small, folder / "calibrated", strengths=strengths, costed=0, progress=False)
for name, one in strengths.found.items():
    print(f"{name}: {one.name or 'unsteered'}, alpha {one.alpha:g}")
Markdown(calibrated.table(["mean accuracy", "mean well-formed"]))

# %% [markdown]
# A method that calibration would rather leave out is tested at its best strength within the bound all the same: the
# table shows what it does, and `found` says why not. The best of many points looks better on validation than it is; the
# test is what counts.
#
# ## 6. One input at a time
#
# An average can hide that a steering helps most inputs and harms the rest. `steerability` measures the log odds of the
# true opening over the false one at several strengths, and the slope of each input's curve
# ([steerability](../docs/steerability.md)). Below 0: this input is pushed the wrong way.

# %%
asked = pocket_pairs(world.questions(30, "test", ["adversarial"]))
oracle = vlm.extract(asked, "resid_post.2", "resid_post.3", batch_size=64, progress=False)
shifts = vlm.extract(pairs, "resid_post.2", "resid_post.3", batch_size=64, progress=False)
steerings = {
    "mean": sp.MeanSteering.fit(shifts, positions="last_prompt", alpha=2.0),
    "l2s": choices["2 from 3"] * 2.0,
    "p2s": lambda ids: sp.P2S.rows(oracle, ids, "last_prompt", 2.0),
}
measured = {
    name: sp.steerability(vlm, one, asked, (-1, -0.5, 0, 0.5, 1), batch_size=40, progress=False)
    for name, one in steerings.items()
}
rows = {}
for name, one in measured.items():
    summary = one.summary()
    rows[name] = {"slope (nats)": summary.slope, "anti-steerable": summary.anti, "rank": summary.rank}
print(markdown_table(rows, digits=3, scale=1.0))
measured["l2s"].plot(f"L2S, {len(asked)} questions about 30 test pictures")

# %% [markdown]
# How to read it. Left: the mean curve with its interval, and the middle 80 % of the inputs. Right: the slopes; dark and
# hatched is the share that is pushed the wrong way. In the table, the mean has half of all inputs there: what little it
# adds helps every yes question and harms every no question. Which questions does L2S push the wrong way? Mostly those
# on which the unsteered model itself leans to the wrong side.

# %%
one = measured["l2s"]
before = one.propensity[:, list(one.alphas).index(0)]
figure, axes = plt.subplots(figsize=(5.5, 3.4))
for name, marker, colour in (("yes", "o", "#1f5f8b"), ("no", "^", "0.6")):
    mask = np.array(one.behaviours) == name
    axes.scatter(before[mask], one.slopes[mask], s=18, marker=marker, color=colour, label=f"true answer {name}")
axes.axhline(0, color="black", lw=0.8)
axes.axvline(0, color="black", lw=0.8)
axes.set(xlabel="log odds of the true answer, unsteered", ylabel="slope under L2S")
axes.legend(frameon=False, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()
leaning, anti = before < 0, one.slopes < 0
print(
    f"anti-steerable: {anti[leaning].mean():.0%} of the {leaning.sum()} that the model gets wrong, {anti[~leaning].mean():.0%} of the {(~leaning).sum()} others"
)
home.cleanup()

# %% [markdown]
# ## Exercises
#
# 1. Run section 1 with `seeds=(0, 1, 2)` in the lineup. Which rows get a ±, and why not all?
# 2. Calibrate with `sp.KLBound(0.1)`, `0.5` and `2.0`. Which strength is the largest feasible one, and what becomes of
#    the accuracy?
# 3. Write a benchmark of your own: a subclass of `steer_plugin.evaluation.benchmark.Benchmark` with items, groups,
#    metrics and `values`. Which of the methods can take part without `training`?
# 4. Ask the same questions in other words (`steer_plugin.evaluation.wording`), and correlate the slopes:
#    `one.agreement(other)`.
#
# ## Read on
#
# - [Evaluation](../docs/evaluation.md), [calibration](../docs/calibration.md), [steerability](../docs/steerability.md):
#   every option, and what was measured at full size.
# - [Notebook 3](03_p2s_and_l2s.ipynb): how the vectors are made. [Notebook 10](10_your_method.ipynb): your own method
#   in the table.
# - Steerability: Tan et al., arXiv [2407.12404](https://arxiv.org/abs/2407.12404). POPE: arXiv
#   [2305.10355](https://arxiv.org/abs/2305.10355).
