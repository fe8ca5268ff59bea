"""Logit lens: what the stream of a layer, or a direction, would say if the model ended there.

    lens(h) = softmax(unembed(norm(h)))            direction(v) = unembed(norm(h + v)) - unembed(norm(h)), mean over h

Without streams h to stand on, direction(v) is unembed(gain * v): right up to a factor. Source of the lens:
nostalgebraist 2020, "interpreting GPT: the logit lens". At image positions it shows what a patch is taken for (Neo et
al. 2024, arXiv 2410.07149).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import heat, layer_ticks, new_figure
from steer_plugin.analysis._frames import frame
from steer_plugin.analysis._unembedding import Unembedding
from steer_plugin.analysis.metrics import token_id
from steer_plugin.analysis.tokens import Tokens
from steer_plugin.errors import InputError
from steer_plugin.intervention import Steerable
from steer_plugin.pictures import Pictures
from steer_plugin.sites import Site, resid_post

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    Axes = DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up


@dataclass(frozen=True, repr=False)
class Lens:
    """What every layer would say at every token of a batch of prompts.

    Attributes:
        sites: where the stream was read.
        targets: words whose probability was kept.
        probability: (site, target, row, pos).
        top: (site, row, pos, k) ids of the likeliest tokens, their probability in `top_probability`.
        tokens: what the tokens of the prompts are.
        words: text of each token id.
    """

    sites: tuple[Site, ...]
    targets: tuple[str, ...]
    probability: Float[Tensor, "site target row pos"]
    top: Int[Tensor, "site row pos k"]
    top_probability: Float[Tensor, "site row pos k"]
    tokens: Tokens
    words: tuple[str, ...]

    def __repr__(self) -> str:
        """Name sizes and targets."""
        rows, width = self.probability.shape[2:]
        return (
            f"Lens({len(self.sites)} sites, {rows} rows of {width} tokens; targets {', '.join(self.targets) or 'none'})"
        )

    def of(self, target: str) -> Float[Tensor, "site row pos"]:
        """Probability of one target.

        Raises:
            InputError: it was not asked for.
        """
        if target not in self.targets:
            raise InputError(f"the lens has no target {target!r}; it has {', '.join(self.targets) or 'none'}.")
        return self.probability[:, self.targets.index(target)]

    def to_frame(self) -> DataFrame:
        """Write a line per site, row and token: word, class, likeliest word and its probability, and the targets'."""
        cells = [
            (s, row, column)
            for s in range(len(self.sites))
            for row in range(len(self.tokens.words))
            for column in self.tokens.columns(row)
        ]
        at = torch.tensor(cells)
        best = self.top[at[:, 0], at[:, 1], at[:, 2], 0].tolist()
        columns: dict[str, Sequence[object] | np.ndarray] = {
            "site": [str(self.sites[s]) for s, _, _ in cells],
            "layer": [self.sites[s].layer for s, _, _ in cells],
            "row": [row for _, row, _ in cells],
            "token": [column for _, _, column in cells],
            "word": [self.tokens.words[row][column] for _, row, column in cells],
            "class": [self.tokens.classes[row][column] for _, row, column in cells],
            "top": [self.words[i] for i in best],
            "top_probability": self.top_probability[at[:, 0], at[:, 1], at[:, 2], 0].numpy(),
        }
        for number, target in enumerate(self.targets):
            columns[target] = self.probability[at[:, 0], number, at[:, 1], at[:, 2]].numpy()
        return frame(columns)

    def plot(self, target: str | None = None, row: int = 0) -> Figure:
        """Draw layers upwards, tokens to the right: probability of a target, or of the likeliest word, which is named.

        Raises:
            InputError: unknown target or row.
            FrameworkError: matplotlib is missing.
        """
        columns = self.tokens.columns(row)
        values = (self.top_probability[:, row, :, 0] if target is None else self.of(target)[:, row])[:, columns]
        figure = new_figure(min(16.0, 2.5 + 0.32 * len(columns)), 1.9 + 0.3 * min(40, len(self.sites)))
        axes = figure.subplots()
        image = heat(axes, values.double().numpy(), limits=(0.0, 1.0), written="" if target is None else "{:.2f}")
        layer_ticks(axes, [site.layer or 0 for site in self.sites])
        self.tokens.label(axes, row)
        figure.colorbar(
            image, ax=axes, label=f"probability of {'the likeliest word' if target is None else repr(target)}"
        )
        if target is None:
            self._name_best(axes, row, columns, values)
        return figure

    def _name_best(self, axes: Axes, row: int, columns: Sequence[int], values: Tensor) -> None:
        for s in range(len(self.sites)):
            for place, column in enumerate(columns):
                word = self.words[int(self.top[s, row, column, 0])].strip()[:7]
                colour = "black" if float(values[s, place]) > 0.6 else "white"
                axes.text(place, s, word, ha="center", va="center", fontsize=6, color=colour, rotation=90)

    def plot_image(self, pictures: Pictures, target: str, site: Site | str, row: int = 0) -> Figure:
        """Draw the probability of a target at each image token on the pictures of a row.

        Raises:
            InputError: unknown target, a site that was not read, a row without pictures.
        """
        where = Site.parse(site)
        if where not in self.sites:
            raise InputError(f"the lens did not read {where}; it read {', '.join(map(str, self.sites))}.")
        values = self.of(target)[self.sites.index(where)]
        return self.tokens.draw_on(pictures, values, f"probability of {target!r} behind layer {where.layer}", row)


def logit_lens(
    vlm: AttachedModel,
    inputs: Mapping[str, Tensor],
    targets: Sequence[str | int] = (),
    sites: Sequence[Site | str] | None = None,
    steering: Steerable | None = None,
    *,
    top: int = 5,
) -> Lens:
    """Read what each layer would say at each token, text and image alike, steered or not.

    `sites`: resid_post of every layer by default. `targets`: words (their first token) or token ids.

    Raises:
        InputError: no such word, top below 1.
        FamilyError: a model whose logits are not unembed(norm(h)).
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}.")
    lens = Unembedding.of(vlm)
    asked = [resid_post(layer) for layer in range(vlm.n_layers)] if sites is None else sites
    found = sorted({vlm.parts.resolve(Site.parse(site)) for site in asked}, key=lambda site: site.order)
    ids = [token_id(vlm, target) for target in targets]
    last = resid_post(vlm.n_layers - 1)
    seen = vlm.observe(inputs, [*found, last], steering)
    tokens = Tokens.of(vlm, inputs)
    lens.check(seen[last][tokens.layout.real], seen.logits[tokens.layout.real])
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for site in found:  # one site at a time: logits of all of them would be large
        chances = lens(seen[site]).softmax(-1)
        best = chances.topk(min(top, chances.shape[-1]), -1)
        kept.append((chances[..., ids].movedim(-1, 0).cpu(), best.indices.cpu(), best.values.cpu()))
    probability, indices, values = (torch.stack(one) for one in zip(*kept, strict=True))
    return Lens(tuple(found), tuple(map(str, targets)), probability, indices, values, tokens, lens.words)


@dataclass(frozen=True, repr=False)
class DirectionLens:
    """Words that directions raise and lower.

    Attributes:
        names: of the directions.
        logits: (direction, vocab) change of the logits.
        words: text of each token id.
        on_streams: whether the change was measured on streams; otherwise it is known up to a factor.
    """

    names: tuple[str, ...]
    logits: Float[Tensor, "direction vocab"]
    words: tuple[str, ...]
    on_streams: bool

    def __repr__(self) -> str:
        """Name the directions and their first words."""
        shown = [f"{name}: {', '.join(map(repr, self.raised(name, 3)))}" for name in self.names]
        return f"DirectionLens({'; '.join(shown)})"

    def _row(self, name: str) -> Float[Tensor, " vocab"]:
        if name not in self.names:
            raise InputError(f"the lens has no direction {name!r}; it has {', '.join(self.names)}.")
        return self.logits[self.names.index(name)]

    def raised(self, name: str, k: int = 10) -> list[str]:
        """The k words that a direction raises most."""
        return [self.words[i] for i in self._row(name).topk(min(k, len(self.words))).indices.tolist()]

    def lowered(self, name: str, k: int = 10) -> list[str]:
        """The k words that a direction lowers most."""
        return [self.words[i] for i in (-self._row(name)).topk(min(k, len(self.words))).indices.tolist()]

    def to_frame(self, k: int = 10) -> DataFrame:
        """Write a line per direction, end ("raised" or "lowered") and rank: the word and its change of logit."""
        lines: list[tuple[object, ...]] = []
        for name, row in zip(self.names, self.logits, strict=True):
            for end, sign in (("raised", 1), ("lowered", -1)):
                best = (sign * row).topk(min(k, len(self.words))).indices.tolist()
                lines += [(name, end, rank, self.words[i], float(row[i])) for rank, i in enumerate(best)]
        titles = ("direction", "end", "rank", "word", "logit")
        return frame({title: [line[number] for line in lines] for number, title in enumerate(titles)})

    def plot(self, k: int = 8) -> Figure:
        """Draw the words that each direction raises and lowers most, as bars.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        k = min(k, len(self.words) // 2)
        across = min(4, len(self.names))
        down = -(-len(self.names) // across)
        figure = new_figure(2.6 * across, 0.6 + down * (0.5 + 0.2 * 2 * k))
        panels = figure.subplots(down, across, squeeze=False).flatten().tolist()
        for axes, name, row in zip(panels, self.names, self.logits, strict=False):
            up, low = row.topk(k).indices.tolist(), (-row).topk(k).indices.tolist()
            ids = [*low, *reversed(up)]
            values = row[ids].numpy()
            axes.barh(range(len(ids)), values, color=["0.75"] * len(low) + ["#1f3b5c"] * len(up))
            axes.set_yticks(range(len(ids)), [self.words[i].strip() or "·" for i in ids], fontsize=7)
            axes.axvline(0, color="0.4", linewidth=0.8)
            axes.set_title(name, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(self.names) :]:
            axes.set_axis_off()
        figure.supxlabel("change of the logit" + ("" if self.on_streams else ", up to a factor"), fontsize=9)
        return figure


def direction_lens(
    vlm: AttachedModel,
    directions: Mapping[str, Float[Tensor, " d_model"]],
    streams: Float[Tensor, "token d_model"] | None = None,
) -> DirectionLens:
    """Read directions through the unembedding: steering vectors, or the mean steps of a gate (`mean_steps`).

    `streams`: resid_post of the last layer at some tokens; the change is then what adding the direction there does.

    Raises:
        InputError: no directions, or of another width.
        FamilyError: a model without a last norm or an unembedding.
    """
    if not directions:
        raise InputError("direction_lens needs at least one direction, as in {'rain': vector}.")
    for name, vector in directions.items():
        if tuple(vector.shape) != (vlm.d_model,):
            raise InputError(f"direction {name!r} has shape {tuple(vector.shape)}, expected ({vlm.d_model},).")
    lens = Unembedding.of(vlm)
    vectors = torch.stack([vector.detach().float() for vector in directions.values()]).to(vlm.device)
    if streams is None:
        found = lens.linear(vectors)
    else:
        h = streams.to(vectors)
        found = torch.stack([(lens(h + vector) - lens(h)).mean(0) for vector in vectors])
    return DirectionLens(tuple(directions), found.cpu(), lens.words, streams is not None)
