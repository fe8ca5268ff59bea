"""P2S shifts: z_i = h+(i) - h-(i) at the write site, each beside the context h_i that Learn-to-Steer predicts it from.

Source: Learning to Steer (arXiv 2508.12815), section 3: teacher-forced contrastive completions of the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.store import ShardStore

KIND = "p2s"


@dataclass(frozen=True)
class Shifts:
    """Vectors, contexts and labels of a set of contrastive pairs.

    Attributes:
        vectors: (sample, d_model) z, float32.
        contexts: (sample, d_model) h at the read site, float32.
        ids, behaviours: one of each per sample.
        job: how they were made: model, sites, target, seed, versions.
    """

    vectors: Float[Tensor, "sample d_model"]
    contexts: Float[Tensor, "sample d_model"]
    ids: tuple[str, ...]
    behaviours: tuple[str, ...]
    job: dict[str, JSON]

    @classmethod
    def load(cls, folder: Path | str) -> Shifts:
        """Read what `vlm.extract` wrote.

        Raises:
            ArtefactError: the folder holds no finished extraction of shifts, or a damaged shard.
        """
        store = ShardStore.open(Path(folder))
        if store.job.get("kind") != KIND:
            raise ArtefactError(f"{folder} holds {store.job.get('kind')!r}, expected P2S shifts made by vlm.extract.")
        return cls(
            vectors=store.tensor("vector", dtype=torch.float32),
            contexts=store.tensor("context", dtype=torch.float32),
            ids=tuple(store.ids),
            behaviours=tuple(str(row.get("behaviour", "")) for row in store.rows),
            job=dict(store.job),
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> Shifts:
        """Return some of the samples, in the order given."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        return replace(
            self,
            vectors=self.vectors[index],
            contexts=self.contexts[index],
            ids=tuple(self.ids[i] for i in indices),
            behaviours=tuple(self.behaviours[i] for i in indices),
        )

    def split(self, fraction: float, seed: int) -> tuple[Shifts, Shifts]:
        """Split at random into a first part of that fraction and the rest.

        Raises:
            InputError: one of the parts would be empty.
        """
        first = round(len(self) * fraction)
        if not 0 < first < len(self):
            raise InputError(f"splitting {len(self)} shifts at {fraction} leaves an empty part; give more samples.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.select(order[:first]), self.select(order[first:])

    def equalised(self, groups: Sequence[Sequence[str]], reference: int = 0) -> Shifts:
        """Rescale behaviours group by group so that each group's mean norm is that of the reference group.

        The L2S authors do this for MM-SafetyBench: scenarios 10-11 and 12 to the mean norm of 01-09.

        Raises:
            InputError: a group without samples.
        """
        norms = self.vectors.norm(dim=-1)
        masks = [torch.tensor([name in set(group) for name in self.behaviours]) for group in groups]
        for group, mask in zip(groups, masks, strict=True):
            if not bool(mask.any()):
                raise InputError(f"no shift has a behaviour of the group {list(group)}; there are {self.counts()}.")
        wanted = norms[masks[reference]].mean()
        vectors = self.vectors.clone()
        for mask in masks:
            vectors[mask] *= wanted / norms[mask].mean()
        return replace(self, vectors=vectors)

    def with_neutral(self, neutral: Shifts | Float[Tensor, "row d_model"]) -> Shifts:
        """Append inputs that steering shall leave alone: their contexts, with the zero vector and behaviour "neutral".

        Of `neutral` shifts only the contexts are taken; they must have been read where these were.

        Raises:
            InputError: contexts of another width, or shifts of another model, read site or context token.
        """
        if isinstance(neutral, Shifts):
            other = [name for name in ("model", "read", "context") if neutral.job.get(name) != self.job.get(name)]
            if other:
                raise InputError(
                    f"the neutral shifts differ in {other[0]}: {neutral.job.get(other[0])!r}, expected "
                    f"{self.job.get(other[0])!r}. Extract both with the same model, read site and context."
                )
        contexts = neutral.contexts if isinstance(neutral, Shifts) else neutral.float()
        if contexts.shape[-1] != self.contexts.shape[-1]:
            raise InputError(
                f"neutral contexts have width {contexts.shape[-1]}, the shifts' have {self.contexts.shape[-1]}."
            )
        count = contexts.shape[0]
        ids = neutral.ids if isinstance(neutral, Shifts) else tuple(f"neutral-{i}" for i in range(count))
        return replace(
            self,
            vectors=torch.cat([self.vectors, self.vectors.new_zeros(count, self.vectors.shape[1])]),
            contexts=torch.cat([self.contexts, contexts.to(self.contexts)]),
            ids=(*self.ids, *ids),
            behaviours=(*self.behaviours, *["neutral"] * count),
        )

    def counts(self) -> dict[str, int]:
        """Samples per behaviour."""
        return {name: self.behaviours.count(name) for name in sorted(set(self.behaviours))}

    def mean(self, behaviour: str | None = None) -> Float[Tensor, " d_model"]:
        """Mean vector over all samples (CAA, Mean-S), or over one behaviour (Mean-S(BA)).

        Raises:
            InputError: no sample shows that behaviour.
        """
        if behaviour is None:
            return self.vectors.mean(0)
        chosen = [i for i, name in enumerate(self.behaviours) if name == behaviour]
        if not chosen:
            raise InputError(f"no shift has the behaviour {behaviour!r}; there are {self.counts()}.")
        return self.vectors[chosen].mean(0)

    def explained_by_mean(self) -> float:
        """Share of the shifts' energy that their mean alone explains: |mean|^2 / mean |z|^2."""
        return float(self.vectors.mean(0).square().sum() / self.vectors.square().sum(-1).mean())

    def summary(self) -> dict[str, float | int]:
        """Statistics that tell whether the shifts mean anything."""
        norms = self.vectors.norm(dim=-1)
        return {
            "samples": len(self),
            "norm_mean": float(norms.mean()),
            "norm_std": float(norms.std(correction=0)),
            "context_norm_mean": float(self.contexts.norm(dim=-1).mean()),
            "explained_by_mean": self.explained_by_mean(),
            **{
                f"norm_mean[{name}]": float(norms[[b == name for b in self.behaviours]].mean())
                for name in self.counts()
                if name
            },
        }
