"""Can the truth be put back? h <- h + alpha z at the last prompt token after decoder layer 2, then the first word.

z(q) = h on the forced word of the true answer - h on that of the false one ("yes", "no"). `oracle` adds the question's
own z, `regressed` a z predicted from h by a small network fitted on other pictures (as Learn-to-Steer does),
`threshold` moves nothing but the line between yes and no, `probe` reads the truth from h; `blind` adds random
directions as long as `regressed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.language import TOKENS, prompt
from steer_plugin.pocket.model import encode
from steer_plugin.pocket.world import Question, World

LAYER = 2
ALPHA = 2.0
FORCED = {True: " Yes", False: " No"}
_HIDDEN = 100
_EPOCHS = 100


class _Tap:
    """Reads the last token after a decoder layer, and adds a vector there."""

    def __init__(self, model: LlavaForConditionalGeneration, layer: int, shift: Tensor | None) -> None:
        self.shift, self.seen = shift, torch.empty(0)
        self.handle: RemovableHandle = model.model.language_model.layers[layer].register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        self.seen = hidden[:, -1]
        if self.shift is None:
            return hidden
        return torch.cat([hidden[:, :-1], hidden[:, -1:] + self.shift[:, None]], dim=1)


def _run(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    *,
    forced: Sequence[str] | None = None,
    shifts: Float[Tensor, "question d_model"] | None = None,
    batch: int = 128,
) -> tuple[Float[Tensor, "question d_model"], Float[Tensor, " question"]]:
    """Return hidden states (on the forced word, else at the last prompt token) and logit(yes) - logit(no)."""
    states, margins = [], []
    for start in range(0, len(questions), batch):
        part = slice(start, start + batch)
        texts = [prompt(asked.text) for asked in questions[part]]
        if forced is not None:
            texts = [text + ending for text, ending in zip(texts, forced[part], strict=True)]
        images = [asked.image for asked in questions[part]]
        inputs = encode(processor, images, texts)
        tap = _Tap(model, LAYER, None if shifts is None else shifts[part])
        try:
            with torch.no_grad():
                logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            tap.handle.remove()
        states.append(tap.seen)
        margins.append(logits[:, TOKENS.index("yes")] - logits[:, TOKENS.index("no")])
    return torch.cat(states), torch.cat(margins)


def true_shifts(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: Sequence[Question]
) -> Float[Tensor, "question d_model"]:
    """Return z(q) of every question, read while the true and the false answer are forced."""
    true, _ = _run(model, processor, questions, forced=[FORCED[asked.label] for asked in questions])
    false, _ = _run(model, processor, questions, forced=[FORCED[not asked.label] for asked in questions])
    return true - false


def fit_shifts(
    states: Float[Tensor, "question d_model"], shifts: Float[Tensor, "question d_model"], seed: int
) -> nn.Module:
    """Fit h -> z, one hidden tanh layer, on MSE + L1 + 0.1 (1 - cosine); keep the best epoch on a held-out twelfth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = states.shape[1]
        net = nn.Sequential(nn.Linear(width, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, width, bias=False))
        optimiser = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-4)
        order = torch.randperm(len(states))
        held, fitted = order[: len(states) // 12], order[len(states) // 12 :]
        best, kept = float("inf"), {name: value.clone() for name, value in net.state_dict().items()}
        for _ in range(_EPOCHS):
            for rows in fitted[torch.randperm(len(fitted))].split(64):
                guess, wanted = net(states[rows]), shifts[rows]
                loss = F.mse_loss(guess, wanted) + F.l1_loss(guess, wanted)
                loss = loss - 0.1 * F.cosine_similarity(guess, wanted).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                error = F.mse_loss(net(states[held]), shifts[held]).item()
            if error < best:
                best, kept = error, {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(kept)
    return net.requires_grad_(False)


def _probe(states: Float[Tensor, "question d_model"], labels: Bool[Tensor, " question"]) -> nn.Linear:
    """Fit a ridge regression of the label (-1, 1) on the states."""
    centre = states.mean(0)
    apart = states - centre
    ridge = apart.T @ apart + 1e-3 * len(states) * apart.pow(2).mean() * torch.eye(states.shape[1])
    line = nn.Linear(states.shape[1], 1)
    weight = torch.linalg.solve(ridge, apart.T @ (2.0 * labels.float() - 1))
    line.weight.data, line.bias.data = weight[None], -(centre @ weight)[None]
    return line.requires_grad_(False)


def _threshold(margins: Float[Tensor, " question"], labels: Bool[Tensor, " question"]) -> float:
    """Return the margin that parts yes from no best."""
    cuts = margins.sort().values
    scores = ((margins[None] > cuts[:, None]) == labels[None]).float().mean(1)
    return cuts[scores.argmax()].item()


def steerability(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world_seed: int,
    n_train: int = 230,
    n_test: int = 250,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure accuracies (per subset and their mean) unsteered and with each way to put the truth back.

    Fits on `n_train` pictures of the world's split "train", measures on `n_test` of "test", six questions each.
    """
    world = World(world_seed)
    fit, test = world.questions(n_train, "train"), world.questions(n_test, "test")
    fit_states, fit_margins = _run(model, processor, fit)
    states, margins = _run(model, processor, test)
    fit_labels = torch.tensor([asked.label for asked in fit])
    regressed = ALPHA * fit_shifts(fit_states, true_shifts(model, processor, fit), seed)(states)
    oracle = ALPHA * true_shifts(model, processor, test)
    blind = torch.randn(regressed.shape, generator=torch.Generator().manual_seed(seed))
    blind = F.normalize(blind, dim=1) * regressed.norm(dim=1, keepdim=True)
    said = {
        "none": margins > 0,
        "threshold": margins > _threshold(fit_margins, fit_labels),
        "probe": _probe(fit_states, fit_labels)(states)[:, 0] > 0,
        "blind": _run(model, processor, test, shifts=blind)[1] > 0,
        "regressed": _run(model, processor, test, shifts=regressed)[1] > 0,
        "oracle": _run(model, processor, test, shifts=oracle)[1] > 0,
    }
    return {name: _accuracy(test, yes) for name, yes in said.items()}


def _accuracy(questions: Sequence[Question], yes: Bool[Tensor, " question"]) -> dict[str, float]:
    hits = yes == torch.tensor([asked.label for asked in questions])
    scores = {
        name: hits[torch.tensor([asked.subset == name for asked in questions])].float().mean().item()
        for name in SUBSETS
    }
    return {**scores, "mean": sum(scores.values()) / len(scores)}
