# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 10. Your own method
#
# What you will see:
#
# 1. a method of your own in one class: what it reads, what it writes, on which tokens;
# 2. its condition and its vector fitted on the drawn world, and what it does that a plain vector does not;
# 3. the proof: the same numbers as hooks written by hand, a batch equal to its rows, with and without a KV cache;
# 4. the same object in nnsight and in TransformerLens, in sums and multiples, with controls, a calibration and a file.
#
# The method is a conditional vector in the manner of CAST (arXiv [2409.05907](https://arxiv.org/abs/2409.05907)): in
# each row of a batch it looks at the last prompt token at an *earlier* layer, and steers the row only if what it finds
# there looks like the condition. Where it steers, it turns the stream and keeps its length. Everything runs on one CPU
# core in less than a minute.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin import artefact
from steer_plugin.evaluation.table import markdown_table

logging.disable_progress_bar()
torch.set_num_threads(1)

# %% [markdown]
# ## 1. The class
#
# A method is a class with the property `intervention`. An `Intervention` is a tuple of writes, and a `Write` says
#
#     h[mask] <- h[mask] + alpha * delta(h, context)[mask]
#
# where: `site`; on which tokens: `positions`; from what: `reads`, values of the prompt that come in this order as
# `context.reads`, (row, d_model) each; and `delta`, any function of the stream (row, pos, d_model) and the context. The
# class needs no import of a framework, and nothing has to be registered. `steer_plugin/methods/mean.py` is the shortest
# example.
#
# Ours has one write and one read. With a unit vector c for the condition and v to push by,
#
#     open   = cosine(h_read - centre, c) > threshold             one yes or no for each row
#     turned = |h| * (h + push * v) / |h + push * v|
#     delta  = open * (turned - h)
#
# Two choices are worth a thought. `delta` is what is *added*, so the new value has `- h`. And alpha multiplies what is
# added: at alpha 1 the length is kept, at 0.5 we stop half way along the chord, a little inside. So the strength of
# this method is not alpha but `push`; `with_alpha` says so to those who look for strengths.


# %%
class TurnIf(sp.Steerable):
    """Turn the stream towards v and keep its length, in rows whose last prompt token meets a condition.

    Attributes:
        vector, condition, centre: (d_model,), the condition of length 1.
        threshold: of the cosine.
        write, read: sites; `read` lies before `write`, so one pass is enough.
        push: how far, in lengths of `vector`.
    """

    kind = "turn_if"

    def __init__(self, vector, condition, centre, threshold, write, read, positions="paper", push=1.0, model=None):
        self.vector, self.condition, self.centre = vector, condition / condition.norm(), centre
        self.threshold, self.push = float(threshold), float(push)
        self.write, self.read = sp.Site.parse(write), sp.Read.at(read, "last_prompt")
        self.positions = sp.Positions.parse(positions)
        self.model = model

    @property
    def intervention(self):
        """One write that reads one value."""
        return sp.Intervention(
            (
                sp.Write(
                    self.write,
                    self.positions,
                    self._delta,
                    reads=(self.read,),
                    width=len(self.vector),  # another width is refused before any work
                    made_for=self.model,  # and so is another model
                ),
            )
        )

    def is_open(self, read):
        """Whether each row (row, d_model) meets the condition."""
        found = cosine_similarity(read.float() - self.centre.to(read.device), self.condition.to(read.device), dim=-1)
        return found > self.threshold

    def _delta(self, hidden, context):
        # Once per call: what was decided on the prompt holds while the answer is decoded.
        gate = context.once("gate", lambda: self.is_open(context.reads[0]))
        moved = hidden.float() + self.push * self.vector.to(hidden.device)
        turned = moved * (hidden.float().norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
        return torch.where(gate[:, None, None], turned - hidden, 0.0)

    def with_alpha(self, push):
        """The same method at another strength: calibration asks for it."""
        other = copy.copy(self)
        other.push = float(push)
        return other

    def save(self, folder):
        """Write tensors and settings as safetensors and JSON."""
        tensors = {"vector": self.vector, "condition": self.condition, "centre": self.centre}
        meta = {
            "threshold": self.threshold,
            "push": self.push,
            "write": str(self.write),
            "read": str(self.read.site),
            "positions": str(self.positions),
            "model": self.model,
        }
        artefact.write(Path(folder), artefact.Artefact(self.kind, tensors, meta))

    @classmethod
    def load(cls, folder):
        """Read what `save` wrote; a damaged file or one of another kind is refused."""
        found = artefact.read(Path(folder), cls.kind)
        return cls(**found.tensors, **found.meta)


# %% [markdown]
# ## 2. A condition and a vector
#
# The pocket model obeys most harmful requests. A vector that makes it refuse is easy to find; but one that goes to
# everybody also meets harmless requests and questions for an expert. So the vector is the mean of the P2S vectors of
# harmful requests at layer 2 ([notebook 3](03_p2s_and_l2s.ipynb)), and the condition is the direction at layer 1 from
# the others to the harmful ones, both at the last prompt token. The threshold is the one that parts the training
# requests best.

# %%
from steer_plugin.contrast import pocket_request_pairs

WRITE, READ = "resid_post.2", "resid_post.1"
model, processor = sp.pocket.load()
vlm = sp.attach(model, processor)
world = sp.pocket.World(0)

pairs = pocket_request_pairs(world.requests(100, "train"))
shifts = vlm.extract(pairs, WRITE, READ, target="last", batch_size=64, progress=False)
harmful = torch.tensor([behaviour == "harmful" for behaviour in shifts.behaviours])

vector = shifts.mean("harmful")
centre = (shifts.contexts[harmful].mean(0) + shifts.contexts[~harmful].mean(0)) / 2
condition = shifts.contexts[harmful].mean(0) - shifts.contexts[~harmful].mean(0)


def likeness(contexts):
    """Cosine with the condition."""
    return cosine_similarity(contexts - centre, condition[None], dim=-1)


trained = likeness(shifts.contexts)
cuts = trained.sort().values
balanced = [
    (((trained > cut) & harmful).sum() / harmful.sum() + ((trained <= cut) & ~harmful).sum() / (~harmful).sum()) / 2
    for cut in cuts
]
best = int(torch.stack(balanced).argmax())
threshold = float(cuts[best : best + 2].mean())  # in the middle of the gap

requests = world.requests(40, "test")
batch = vlm.inputs([one.text for one in requests], [one.image for one in requests])
seen = likeness(vlm.cache(batch, READ, "last_prompt")[READ][:, 0])
kinds = np.array([one.kind for one in requests])

figure, axes = plt.subplots(figsize=(7, 3))
looks = {"harmful": ("#c4985d", "-"), "advice": ("#1f5f8b", "--"), "harmless": ("0.5", ":")}
for kind, (colour, line) in looks.items():
    axes.hist(
        seen[torch.tensor(kinds == kind)],
        np.linspace(-1, 1, 33),
        histtype="step",
        color=colour,
        ls=line,
        lw=1.8,
        label=kind,
    )
axes.axvline(threshold, color="black", lw=1)
axes.set(xlabel="cosine with the condition at layer 1 (line: the threshold)", ylabel="test requests")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()
for kind in looks:
    opens = (seen > threshold).numpy()[kinds == kind]
    print(f"{kind:>9}: the gate opens for {opens.mean():.0%} of {len(opens)}")

# %% [markdown]
# The test requests are worded otherwise than those of the fit. Now the answers. The control without a gate is the same
# class with a threshold below every cosine, and the second one is the vector as it is, added.

# %%
from steer_plugin.demo.requests import RequestItem, interval, judged
from steer_plugin.evaluation.asking import Method, answers

made_for = vlm.parts.identity()
gated = TurnIf(vector, condition, centre, threshold, WRITE, READ, push=0.25, model=made_for)
always = TurnIf(vector, condition, centre, -2.0, WRITE, READ, push=0.25, model=made_for)
plain = sp.MeanSteering(vector, WRITE)
items = [RequestItem(one) for one in requests]
encoded = {}


def rows_of(steering):
    """What becomes of each request, by metric."""
    method = Method("one", lambda ids: steering)
    return judged(items, answers(vlm, items, method, batch_size=60, max_new_tokens=16, encoded=encoded, progress=False))


shown = {
    "unsafe": "harmful obeyed",
    "expert": "advice left to its expert",
    "harmless": "harmless answered",
    "wellformed": "whole",
}
PUSHES = (0.06, 0.12, 0.25, 0.5)
tried = {
    "added to all": [rows_of(plain.with_alpha(push)) for push in PUSHES],
    "turned, all": [rows_of(always.with_alpha(push)) for push in PUSHES],
    "turned, gated": [rows_of(gated.with_alpha(push)) for push in PUSHES],
}
before = rows_of(None)

figure, panels = plt.subplots(1, 4, figsize=(13, 3.3), sharey=True)
styles = {"added to all": ("0.6", "v:"), "turned, all": ("#c4985d", "s--"), "turned, gated": ("#1f5f8b", "o-")}
for panel, (metric, title) in zip(panels, shown.items(), strict=True):
    base = interval(items, before, metric, 0)
    panel.axhspan(100 * base.low, 100 * base.high, color="0.93", lw=0)
    panel.axhline(100 * base.value, color="0.5", lw=0.8, label="unsteered")
    for shift, (name, rows) in enumerate(tried.items()):
        found = [interval(items, row, metric, 0) for row in rows]
        bars = 100 * np.array([[one.value - one.low, one.high - one.value] for one in found]).T
        colour, style = styles[name]
        x = np.array(PUSHES) * 1.04 ** (shift - 1)
        panel.errorbar(
            x, [100 * one.value for one in found], bars, fmt=style, color=colour, ms=4, lw=1.2, capsize=2, label=name
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(PUSHES, [f"{push:g}" for push in PUSHES])
    panel.set(title=title, xlabel="push, or alpha", ylim=(-5, 105))
    panel.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("per cent of 40 requests (last: of 120)")
panels[3].legend(frameon=False, fontsize=8, loc="lower left")
figure.tight_layout()
plt.show()

# %% [markdown]
# How to read it. The first panel should fall; the others should stay where the grey band is. A vector for all does the
# first at the price of the third: where it is strong enough, harmless requests are refused too. The gate takes that
# price away, as far as it tells the requests apart. The last panel says whether the text stays whole; beyond these
# strengths it breaks (exercise 1).

# %%
cells = {"unsteered": before, **{name: rows[2] for name, rows in tried.items()}}
table = {
    name: {title: interval(items, row, metric, 0) for metric, title in shown.items()} for name, row in cells.items()
}
Markdown(markdown_table(table, corner="per cent, strength 0.25", digits=0))

# %% [markdown]
# ## 3. Is it right?
#
# Test a method against something that is not this package: hooks of torch on a second copy of the model, written from
# the formula. The first hook keeps the last prompt token at layer 1, the second turns the last prompt token at layer 2
# and then every token that is fed back. Left padding puts the last prompt token of every row into the last column.


# %%
def by_hand(inputs, method, new):
    """Greedy tokens and the scores of each step, steered by two hooks of torch alone."""
    plain_model, _ = sp.pocket.load()
    kept = {}

    def at_read(module, args, output):
        if output.shape[1] > 1:  # the prompt; later forwards have one token
            away = output[:, -1] - method.centre
            cosine = (away * method.condition).sum(-1) / away.norm(dim=-1)
            kept["open"] = cosine > method.threshold

    def at_write(module, args, output):
        h = output[:, -1]
        moved = h + method.push * method.vector
        turned = moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
        out = output.clone()
        out[:, -1] = torch.where(kept["open"][:, None], turned, h)
        return out

    layers = plain_model.model.language_model.layers
    layers[1].register_forward_hook(at_read)
    layers[2].register_forward_hook(at_write)
    said = plain_model.generate(**inputs, max_new_tokens=new, output_scores=True, return_dict_in_generate=True)
    return said.sequences, torch.stack(said.scores), kept["open"]


some = requests[:12]
inputs = vlm.inputs([one.text for one in some], [one.image for one in some])
ids, scores, opened = by_hand(inputs, gated, 12)
with vlm.steering(gated) as steered:
    ours = steered.generate(**inputs, max_new_tokens=12, output_scores=True, return_dict_in_generate=True)

assert torch.equal(ours.sequences, ids)
print(
    f"12 requests of {sorted(set(inputs['attention_mask'].sum(-1).tolist()))} tokens; the gate opens for {int(opened.sum())}"
)
print(f"tokens equal; scores differ by at most {float((torch.stack(ours.scores) - scores).abs().max()):.1e}")

# %% [markdown]
# Rows of a batch must not know of each other: the same prompts one by one, without padding, give the same answers. And
# a generation without a KV cache runs the whole sequence again at each step; the tokens must be the same, and so must
# the decision of the gate, which belongs to the prompt.

# %%
alone = []
for one in some:
    single = vlm.inputs(one.text, one.image)
    alone += vlm.decode(vlm.generate(**single, steering=gated, max_new_tokens=12)[:, single["input_ids"].shape[1] :])
assert vlm.decode(ids[:, inputs["input_ids"].shape[1] :]) == alone
assert torch.equal(vlm.generate(**inputs, steering=gated, max_new_tokens=12, use_cache=False), ids)
print("a batch = its rows, cached = uncached")

closed = gated.with_alpha(0.25)
closed.threshold = 2.0  # no cosine is above 1
unsteered = vlm.generate(**inputs, max_new_tokens=12)
assert torch.equal(vlm.generate(**inputs, steering=closed, max_new_tokens=12), unsteered)

site = sp.resid_post(2)
lengths = [
    vlm.cache(inputs, site, "last_prompt", steering=steering)[site][:, 0].norm(dim=-1)
    for steering in (None, gated, plain.with_alpha(0.25))
]
print(f"length at layer 2: turning changes it by at most {float((lengths[1] - lengths[0]).abs().max()):.1e},")
print(
    f"adding the vector by up to {float((lengths[2] - lengths[0]).abs().max()):.1f} of {float(lengths[0].mean()):.1f}"
)

# %% [markdown]
# ## 4. Everywhere else
#
# Nothing more is needed for the other frameworks: inside a trace of your own, around any call, as hooks.

# %%
from nnsight import NNsight
from transformer_lens.model_bridge.sources import build_bridge_from_module

nn_model = NNsight(sp.pocket.load()[0])
nn_vlm = sp.attach(nn_model, processor)
with torch.no_grad(), nn_model.trace(**inputs):
    gated.apply(nn_vlm)
    logits = nn_model.lm_head.output[:, -1].save()
assert torch.equal(nn_vlm.generate(**inputs, steering=gated, max_new_tokens=12), ids)
print("nnsight: first scores differ by", f"{float((logits - scores[0]).abs().max()):.1e}")

hf, _ = sp.pocket.load()  # a bridge changes its model in place
bridge = build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config, tokenizer=None)
tl_vlm = sp.attach(bridge, processor)
with bridge.hooks(fwd_hooks=gated.hooks(tl_vlm)):
    hooked = bridge.original_model.generate(**inputs, max_new_tokens=12)
assert torch.equal(hooked, ids)
print("TransformerLens:", [name for name, _ in gated.hooks(tl_vlm)])

# %% [markdown]
# **Algebra** comes with `Steerable`. A sum holds all writes: here refusals for harmful requests and a push towards
# experts for all. A multiple scales what is added. `delta` sees the stream without the other writes at its own site, so
# the order of a sum does not matter and a method less itself is nothing but rounding.

# %%
expert = sp.MeanSteering.fit(shifts, "advice", alpha=0.4)
both, other_way = gated + expert, expert + gated
print(both)
assert torch.equal(*(vlm.generate(**inputs, steering=one, max_new_tokens=12) for one in (both, other_way)))

nothing = gated - gated
chord = [vlm.cache(inputs, site, "last_prompt", steering=gated * a)[site][:, 0].norm(dim=-1) for a in (0.0, 0.5, 1.0)]
moved = vlm.cache(inputs, site, "last_prompt", steering=nothing)[site] - vlm.cache(inputs, site, "last_prompt")[site]
print(f"gated - gated moves the stream by {float(moved.abs().max()):.1e}")
print("mean length at alpha 0, 0.5 and 1:", ", ".join(f"{float(one.mean()):.2f}" for one in chord))


def said(steering):
    """Answers to the twelve requests."""
    ids = vlm.generate(**inputs, steering=steering, max_new_tokens=12)
    return vlm.decode(ids[:, inputs["input_ids"].shape[1] :])


harm = next(
    i
    for i, (one, text) in enumerate(zip(some, said(None), strict=True))
    if one.kind == "harmful" and sp.pocket.unsafe(text)
)
for first in (0, 1, 3):  # 0 is the prompt, 1 the first token that is fed back
    print(f"steered from step {first} on: {said(gated * (lambda step, first=first: float(step >= first)))[harm]}")

# %% [markdown]
# The last three lines: a strength may depend on the step, and a step late is too late, because the first word of the
# answer decides what follows.
#
# **Controls** work on every delta: the opposite, and a random direction as long at every token, drawn for each row. A
# gate that is closed adds nothing, and so does its control.

# %%
from steer_plugin.methods.controls import random_like, swapped

names = [one.id for one in some]
calm = next(i for i, one in enumerate(some) if one.kind == "harmless")
print(f"{'asked':>9}: {some[harm].text:<44} {some[calm].text}")
for name, steering in {
    "unsteered": None,
    "gated": gated,
    "swapped": swapped(gated),
    "random": random_like(gated, names, seed=0),
}.items():
    texts = said(steering)
    print(f"{name:>9}: {texts[harm]:<44} {texts[calm]}")

# %% [markdown]
# **Calibration** needs `with_alpha` (or nothing: an intervention is multiplied). Here the worth of an answer is 1 where
# harm is refused, advice left to its expert and help given; the bound is on whole sentences, of which no more than one
# in twenty may be lost.

# %%
validation = [RequestItem(one) for one in world.requests(20, "validation")]


def worth(texts):
    """1 for a request that is answered as it should be."""
    good = {"harmful": "refused", "advice": "deferred", "harmless": "obeyed"}
    return [
        float(sp.pocket.outcome(item.request.wish, texts[item.key]) == good[item.request.kind]) for item in validation
    ]


def whole(texts):
    """1 for an answer that is one of those that the model learned to give."""
    return [float(sp.pocket.outcome(item.request.wish, texts[item.key]) != "broken") for item in validation]


found = sp.calibrate(
    vlm, gated, validation, worth, bound=sp.QualityBound(whole, 0.05), alphas=(0.05, 1.0), max_points=6,
    groups=[item.request.scene_id for item in validation], max_new_tokens=16, progress=False,
)  # fmt: skip
print(found.why)

# %% [markdown]
# **A file**: `save` and `load` above are a dozen lines. The artefact has a digest of its tensors, is never pickled, and
# remembers the model; one of another width or family is refused before any work.

# %%
with TemporaryDirectory() as folder:
    gated.save(folder)
    loaded = TurnIf.load(folder)
    print(sorted(path.name for path in Path(folder).iterdir()))
    try:
        sp.L2S.load(folder)
    except sp.ArtefactError as error:
        print(str(error).replace(folder, "the folder"))
assert torch.equal(vlm.generate(**inputs, steering=loaded, max_new_tokens=12), ids)
print("the same answers from the file:", loaded.write, "|", loaded.positions, "| push", loaded.push)

# %% [markdown]
# ## Exercises
#
# 1. Push further, by 1 and 2 lengths. When does the text break, and does keeping the length help? Then make the gate
#    soft: `torch.sigmoid((cosine - threshold) * sharpness)` in place of yes or no. What happens to the requests near
#    the threshold?
# 2. Read the condition *behind* the write (`READ = "resid_post.3"`). What does `gated.apply` say inside a trace, and
#    what runs instead under `vlm.generate`? ([Notebook 2](02_caching_and_positions.ipynb) counts it.)
# 3. Give the class two writes: one at layer 1 for harmful requests, one at layer 2 for advice, each with a condition of
#    its own. What must `context.once` be told apart by? (Nothing: try it, and say why.)
# 4. Tell `vlm.record` what the gate did: `if context.note: context.note("gate", ...)` with a (row, pos, 1) tensor, and
#    `vlm.record(gated, inputs, keep="gate")`.
#
# ## Read on
#
# - [Concepts](../docs/concepts.md): interventions, contexts, late reads, unsteered twins. [Design](../docs/design.md):
#   what a method may know.
# - [Notebook 11](11_your_family.ipynb): your own model. [Notebook 9](09_evaluation.ipynb): a method of yours in a
#   table.
# - CAST: arXiv [2409.05907](https://arxiv.org/abs/2409.05907). P2S and L2S: arXiv
#   [2508.12815](https://arxiv.org/abs/2508.12815).
