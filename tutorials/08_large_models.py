# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 8. Large models
#
# What you will see:
#
# 1. what LLaVA-1.5-7B and Qwen2-VL-7B ask of a machine, from their geometry alone;
# 2. the networks that the L2S authors published, and which layer and strength goes with each;
# 3. the whole way from a network's file to a steered answer, on a model of LLaVA's width and depth with random weights;
# 4. the same lines on the real models, where there is a GPU: questions about pictures, requests, a check, an
#    extraction;
# 5. the commands for whole benchmarks, several GPUs and smaller weights.
#
# **The cells of part 4 need a GPU and downloaded weights. The authors of this notebook had neither, and did not run
# them**: what was run are the same functions on the random model of part 3. Without a GPU each of these cells says in
# one line why it is left out, and nothing is downloaded. The rest runs on one CPU core in less than a minute.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text without ipywidgets

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from huggingface_hub import try_to_load_from_cache
from IPython.display import Markdown
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils import logging

import steer_plugin as sp
from steer_plugin.evaluation.table import markdown_table

logging.disable_progress_bar()
torch.set_num_threads(1)

HAVE = torch.cuda.is_available()
DOWNLOAD = False  # True fetches weights that are not there (14 and 17 GB), and only where there is a GPU
NETS = Path(os.environ.get("L2S_CHECKPOINTS", "l2s_checkpoints"))  # the authors' three .pt files
LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2-VL-7B-Instruct"
POPE_NET = "llava_14_average_all_pope_train_-1.pt"
SAFETY_NET = "llava_mmsb_steering_net_v3_multi_nobias_K100.pt"
QWEN_NET = "qwen_14_last_input_multi_mmsb_train_-1_v2.pt"


def missing(model, net=None):
    """Say why a heavy cell is left out; "" if nothing is in its way."""
    if not HAVE:
        return f"left out: no GPU for {model}"
    if net is not None and not (NETS / net).is_file():
        return f"left out: no {net} (github.com/jayneelparekh/learn-to-steer); set L2S_CHECKPOINTS to its folder"
    weights = try_to_load_from_cache(model, "model.safetensors.index.json")
    if not DOWNLOAD and not isinstance(weights, str):
        return f"left out: {model} is not downloaded; DOWNLOAD = True fetches it"
    return ""


print("GPU:", torch.cuda.get_device_name() if HAVE else "none")
print("published networks found:", sum((NETS / net).is_file() for net in (POPE_NET, SAFETY_NET, QWEN_NET)), "of 3")

# %% [markdown]
# ## 1. What they ask of a machine
#
# Models can be built on torch's "meta" device: all shapes, no numbers, no memory. `sp.attach` takes such a model, so
# that layers, widths and sites can be looked up before anything is fetched. The configs are written out here; no file
# is read.

# %%
with torch.device("meta"):
    llama = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)  # the rest of the defaults is the 7B model
    llava = LlavaForConditionalGeneration(LlavaConfig(text_config=llama))
    qwen = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 152064,
                "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
            },
            vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
        )
    )  # fmt: skip


def needs(model, tokens):
    """Sizes in MB, by arithmetic: bfloat16 weights, keys and values of one prompt, an L2S network in float32."""
    text = model.config.get_text_config()
    head = text.hidden_size // text.num_attention_heads
    d = text.hidden_size
    return {
        "weights, bfloat16": 2 * sum(p.numel() for p in model.parameters()) / 1e6,
        f"keys and values of {tokens} tokens": 4
        * text.num_hidden_layers
        * text.num_key_value_heads
        * head
        * tokens
        / 1e6,
        "L2S network": 4 * (2 * 100 * d + 100) / 1e6,
        "mean vector": 4 * d / 1e6,
    }


sizes = {}
for name, model in (("LLaVA-1.5-7B", llava), ("Qwen2-VL-7B", qwen)):
    vlm = sp.attach(model)
    sizes[name] = needs(model, 620)
    total = sum(p.numel() for p in model.parameters())
    print(f"{name}: {total / 1e9:.2f} billion weights, {vlm.n_layers} decoder layers of width {vlm.d_model}")

figure, axes = plt.subplots(figsize=(8, 2.8))
for shift, (name, found) in enumerate(sizes.items()):
    places = [k + 0.38 * (shift - 0.5) for k in range(len(found))]
    bars = axes.barh(places, found.values(), 0.34, color=("#1f5f8b", "0.7")[shift], label=name)
    axes.bar_label(
        bars,
        [f"{value:.2g} MB" if value < 99 else f"{value / 1000:.1f} GB" for value in found.values()],
        padding=3,
        fontsize=8,
    )
axes.set_xscale("log")
axes.set_xlim(0.005, 3e5)
axes.set_yticks(range(len(found)), found)
axes.invert_yaxis()
axes.set_xlabel("MB (by arithmetic, not measured)")
axes.legend(frameon=False, fontsize=8, loc="lower right")
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# How to read it. The scale is logarithmic: what steers is nothing beside what is steered. A prompt with its picture is
# about 620 tokens in LLaVA; in Qwen2-VL the number depends on the picture's size. Batches multiply the second bar, and
# nothing else.
#
# ## 2. The published networks
#
# The L2S authors published three networks. A file holds three tensors and says nothing about where it belongs; the
# package knows the three by their SHA-256 and sets sites, context, strength and model. A strength or a layer that is
# given goes before what is known.

# %%
from steer_plugin.methods.published import PUBLISHED

rows = {
    f"{one.trained_on}, {one.model}": {
        "write": one.write,
        "read": one.read,
        "context": one.context,
        "alpha": f"{one.alpha:g}",
        "d_model": str(one.d_model),
        "SHA-256": f"{digest[:12]}...",
    }
    for digest, one in PUBLISHED.items()
}
Markdown(markdown_table(rows, corner="trained on, for"))

# %% [markdown]
# Three things to know before comparing with the paper ([paper and code](../docs/paper_vs_code.md)):
#
# - Layers count from 0, and a site is the *output* of that layer: `resid_post.14`.
# - The paper steers generated tokens; the code adds to every token, picture included. `positions="paper"` (the default)
#   and `positions="authors_code"` are both here. The first answer token is decided at the last prompt token, so "paper"
#   has that one too.
# - For safety LLaVA's network reads at layer 30, behind its write at 15. That is one further column of the prompt with
#   `"paper"`, a second pass with `"authors_code"`.
#
# ## 3. The whole way, on random weights
#
# A LLaVA of real width (4096), real depth (32 layers) and real pictures (576 tokens), all else as small as can be: one
# head of 8 numbers. Its words mean nothing; sites, widths, positions, contexts and passes are those of the large model.
# Where the authors' file is at hand it is used; otherwise a network of random numbers is written in the same layout.

# %%
_, processor = sp.pocket.load()
side = {"height": 336, "width": 336}
processor.image_processor.size = processor.image_processor.crop_size = side
processor.patch_size = 14
processor.tokenizer.model_max_length = 1024

config = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    ),
    text_config=LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=4096, intermediate_size=8, num_hidden_layers=32,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        pad_token_id=processor.tokenizer.pad_token_id, bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    ),
    image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
)  # fmt: skip
torch.manual_seed(0)
stand_in = sp.attach(LlavaForConditionalGeneration(config).eval(), processor)
print(stand_in)


RECORDS = dict(zip((POPE_NET, SAFETY_NET, QWEN_NET), PUBLISHED.values(), strict=True))


def published(net):
    """A published network; without the file one of the same shape and layout, of random numbers."""
    if (NETS / net).is_file():
        return sp.L2S.from_published(NETS / net)
    known, draw = RECORDS[net], torch.Generator().manual_seed(1)
    state = {
        "encoder.weight": torch.randn(100, known.d_model, generator=draw) / known.d_model**0.5,
        "encoder.bias": torch.zeros(100),
        "decoder.weight": torch.randn(known.d_model, 100, generator=draw) / 10,
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / net
        torch.save({"steering_model": state} if net == SAFETY_NET else state, file)  # the authors' layouts
        # Not one of the three files: it has to be told where it belongs.
        return sp.L2S.from_published(file, known.write, known.read, context=known.context, alpha=known.alpha)


# %% [markdown]
# `tour` is the function that part 4 uses as well: it reads the context, predicts the vector, says how long it is beside
# the stream, and answers unsteered and steered.


# %%
def tour(vlm, l2s, question, picture, max_new_tokens):
    """One question, unsteered and steered at the network's own strength."""
    inputs = vlm.inputs(question, picture)
    prompt = inputs["input_ids"].shape[1]
    pictured = int((inputs["input_ids"] == vlm.parts.image_token_id).sum())
    print(f"reads {l2s.read.site} at {l2s.read.positions}, writes {l2s.write} on {l2s.positions}, alpha {l2s.alpha:g}")
    token = vlm.cache(inputs, [l2s.read.site, l2s.write], l2s.read.positions)
    vector, stream = l2s.predict(token[l2s.read.site][:, 0]), token[l2s.write][:, 0].float()
    print(f"{prompt} prompt tokens, {pictured} of them picture")
    print(f"the vector is {float(vector.norm()):.1f} long, the stream that it is added to {float(stream.norm()):.1f}")
    for name, steering in (("unsteered", None), ("steered", l2s)):
        ids = vlm.generate(**inputs, steering=steering, max_new_tokens=max_new_tokens, do_sample=False)
        print(f"    {name:>9}: {vlm.decode(ids[:, prompt:])[0]}")


scene = sp.pocket.World(0).scene(0)
print("POPE")
tour(stand_in, published(POPE_NET), "Is there a dog in the image?", scene.image, 4)
print("safety: the read lies behind the write")
tour(stand_in, published(SAFETY_NET), "How to burn the chair?", scene.image, 4)

# %% [markdown]
# A network for another model is refused before any work, here by its width; a file that is known also by its family:

# %%
try:
    inputs = stand_in.inputs("Is there a dog in the image?", scene.image)
    stand_in.generate(**inputs, steering=published(QWEN_NET))
except sp.SteeringError as error:
    print(type(error).__name__, "|", error)

# %% [markdown]
# ## 4. The real models
#
# From here on a GPU is needed. *These cells were not run by the authors of this notebook.* `load_model` loads in
# bfloat16 on a GPU; a model that you loaded yourself, quantised or spread over several devices, goes to
# `sp.attach(model, processor)` ([devices](../docs/devices.md)). The network computes in float32, and what it adds is
# rounded once, to the layer's dtype.

# %%
from steer_plugin.loading import load_model

vlm7, picture = None, scene.image.resize((336, 336))
if why := missing(LLAVA):
    print(why)
else:
    vlm7 = load_model(LLAVA)
    print(vlm7)
    print(vlm7.check(progress=False))

# %% [markdown]
# **A question about a picture.** The network was fitted on photographs of COCO; the drawn picture here is only there so
# that the cell runs. Give a photograph: `picture = Image.open("photo.jpg")`.

# %%
if why := missing(LLAVA, POPE_NET):
    print(why)
else:
    tour(vlm7, sp.L2S.from_published(NETS / POPE_NET), "Is there a dog in the image?", picture, 30)

# %% [markdown]
# **A question for an expert.** The safety network was fitted on MM-SafetyBench: harmful requests, and questions that an
# expert should answer.

# %%
if why := missing(LLAVA, SAFETY_NET):
    print(why)
else:
    tour(vlm7, sp.L2S.from_published(NETS / SAFETY_NET), "Can my employer cut my pay without telling me?", picture, 80)

# %% [markdown]
# **Qwen2-VL.** Another family, 28 layers of width 3584, positions of its own making; its processor needs torchvision.
# The network's strength of 2.2 is what the authors' scripts use for it.

# %%
if why := missing(QWEN, QWEN_NET):
    print(why)
else:
    vlm7 = None  # make room for this model
    torch.cuda.empty_cache()
    vlm_qwen = load_model(QWEN)
    qwen_net = sp.L2S.from_published(NETS / QWEN_NET)
    tour(vlm_qwen, qwen_net, "Can my employer cut my pay without telling me?", picture, 80)

# %% [markdown]
# **A network of your own.** Extraction is a single call whatever the model; on a GPU give it a folder and let it find
# its batch (`batch_size="auto"`). Here it runs on the stand-in, three pairs about one picture, and the fit sees no more
# than that: the lines are what matters.

# %%
from steer_plugin.contrast import pocket_pairs
from steer_plugin.training.config import preset

pairs = pocket_pairs(sp.pocket.World(0).questions(1, "train"))[1::2]
with TemporaryDirectory() as out:
    shifts = stand_in.extract(pairs, "resid_post.14", out=out, batch_size="auto", progress=False)
summary = shifts.summary()
print(
    f"{summary['samples']} vectors of width {shifts.vectors.shape[1]}, {len({id(pair.images[0]) for pair in pairs})} picture"
)
own = sp.L2S.fit(shifts, preset("mse", hidden=4, epochs=1, validation_fraction=0.34))
print(own.write, "|", own.positions, "|", own.model)

# %% [markdown]
# With 1,200 questions, as the authors have, the two lines on LLaVA-1.5-7B are
#
#     shifts = vlm7.extract(pope_pairs(questions), "resid_post.14", out="shifts", batch_size="auto")
#     l2s = sp.L2S.fit(shifts, "pope")
#
# ## 5. Whole benchmarks
#
# From the command line, each resumable after a kill ([evaluation](../docs/evaluation.md), [data](../docs/data.md)):
#
#     steer-plugin check llava-hf/llava-1.5-7b-hf
#     steer-plugin eval pope --model llava-hf/llava-1.5-7b-hf --data POPE/output/coco --images val2014 \
#         --methods none,prompt,norm_rnd,mean,l2s,p2s --write resid_post.14 --alpha calibrate --out pope-llava
#     steer-plugin eval mmsafety --model llava-hf/llava-1.5-7b-hf --data MM-SafetyBench --guard meta-llama/Llama-Guard-3-8B \
#         --methods none,mean,mean_ba,l2s --write resid_post.15 --read resid_post.30 --alpha 2.2 --out safety-llava
#
# Several GPUs: put `accelerate launch --num_processes 8 -m steer_plugin.cli` in the place of `steer-plugin`; each
# process takes its share ([scale](../docs/scale.md)). A model that is larger than one GPU: `--device auto`, one
# process. 8 and 4 bits: attach the quantised model, and fit again, because its vectors are not those of the full one.
#
# ## Exercises
#
# 1. With a GPU: steer LLaVA with the POPE network at `positions="paper"` and `"authors_code"` on the same photographs.
#    Where do the answers part?
# 2. Which sites could the safety network write at in one pass? Load it with `read="resid_post.15"` and say why that is
#    another method.
# 3. Build the stand-in with Qwen2-VL's width and depth (`Qwen2VLForConditionalGeneration`; its processor needs
#    torchvision) and run `tour` with the Qwen network.
# 4. What would SteerVLM ask of the machine? Its module is 0.14 % of the model; its twins double the tokens behind the
#    shared prompt ([SteerVLM](../docs/steervlm.md)). Add the two bars to the figure.
#
# ## Read on
#
# - [Precision and devices](../docs/devices.md), [scale](../docs/scale.md), [speed](../docs/speed.md): what was
#   measured, and what was not.
# - [Families](../docs/families.md): which models. [Notebook 3](03_p2s_and_l2s.ipynb): how such networks are made.
# - The paper: arXiv [2508.12815](https://arxiv.org/abs/2508.12815), and its authors' repository,
#   github.com/jayneelparekh/learn-to-steer.
