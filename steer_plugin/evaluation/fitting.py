"""What a benchmark's methods are fitted on: P2S shifts of its training pairs, extracted once and kept, and the fits.

{out}/shifts/train    {out}/shifts/{test, validation}    the latter for P2S and Norm-Rnd alone
{out}/fits/l2s-...    networks: fitted again, under other threads or versions, they would be others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from steer_plugin.adapters import AttachedModel, parse_target
from steer_plugin.artefact import sha256, tensor_bytes
from steer_plugin.atomic import JSON, json_bytes
from steer_plugin.contrast.pair import ContrastivePair
from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import Training
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, P2S, BehaviourMeans, MeanSteering, NormRandom
from steer_plugin.processes import Processes
from steer_plugin.shifts import Shifts
from steer_plugin.training.config import FitConfig, preset


@dataclass
class Fitting:
    """The vectors of one pair of sites, and every fitted method at any strength."""

    vlm: AttachedModel
    training: Training
    lineup: Lineup
    out: Path
    batch_size: int = 32
    progress: bool = True
    _networks: dict[int, L2S] = field(default_factory=dict[int, L2S])

    @cached_property
    def every(self) -> Shifts:
        """Shifts of all training pairs."""
        return self._extract(self.training.pairs, "train")

    @cached_property
    def shifts(self) -> Shifts:
        """Shifts to fit on: those to be left alone taken out, groups of behaviours made equally long."""
        kept = [i for i, name in enumerate(self.every.behaviours) if name not in self.training.neutral]
        if not kept:
            raise InputError(
                f"every training pair is of a neutral behaviour ({self.training.neutral}): nothing to fit."
            )
        return self._equalised(self.every.select(kept))

    @cached_property
    def neutral(self) -> Shifts | None:
        """Shifts of the inputs to be left alone, or None."""
        kept = [i for i, name in enumerate(self.every.behaviours) if name in self.training.neutral]
        return self.every.select(kept) if kept else None

    @cached_property
    def means(self) -> BehaviourMeans:
        """One mean per behaviour, and the zero vector for behaviours that are told but have no mean."""
        means = BehaviourMeans.fit(self.shifts, self.lineup.positions)
        first = next(iter(means.means.values()))
        zero = MeanSteering(torch.zeros_like(first.vector), first.site, first.positions, model=first.model)
        held = None if self.training.validation is None else self.training.validation.training
        told = {*self.training.told.values(), *({} if held is None else held.told).values()}
        for name in {*told, *self.training.neutral} - set(means.means):
            means.means[name] = zero
        return means

    def oracle(self, pairs: Sequence[ContrastivePair], name: str) -> Shifts:
        """Shifts of the items themselves."""
        return self._equalised(self._extract(pairs, name))

    def prepare(self, seeds: Sequence[int] = ()) -> None:
        """Extract what is fitted on, and fit the networks of some seeds: once, and on disk, for all processes.

        Every process must call it before any of them asks for a steering.
        """
        processes, vectors = Processes.current(), self.shifts
        for seed in [seed for seed in seeds if seed not in self._networks]:
            folder = self._folder(vectors, seed)
            if processes.main and not (folder / "artefact.json").is_file():
                self._fitted(seed).save(folder)
            processes.wait()
            self._networks[seed] = L2S.load(folder)

    def network(self, seed: int) -> L2S:
        """The L2S of a seed."""
        if seed not in self._networks:
            self.prepare([seed])
        return self._networks[seed]

    def _fitted(self, seed: int) -> L2S:
        return L2S.fit(
            self.shifts, self._config, neutral=self.neutral, seed=seed, positions=self.lineup.positions
        )  # fmt: skip

    @property
    def _config(self) -> FitConfig:
        rate = self.training.learning_rate
        changes = {"hidden": self.lineup.hidden} | ({} if rate is None else {"learning_rate": rate})
        return preset(self.training.preset, **changes)

    def _folder(self, vectors: Shifts, seed: int) -> Path:
        neutral = None if self.neutral is None else digest(self.neutral)
        decides: list[JSON] = [asdict(self._config), digest(vectors), neutral, self.lineup.positions]
        name = sha256(json_bytes(decides, "what decides a fit"))[:12]
        return self.out / "fits" / f"l2s-{self.lineup.write}-{self.lineup.read or self.lineup.write}-seed{seed}-{name}"

    def steering(
        self,
        name: str,
        ids: Sequence[str],
        alpha: float,
        seed: int,
        oracle: Shifts | None,
        told: Training | None = None,
    ) -> Steerable:
        """A fitted method for a batch, by its name and the ids of the rows.

        `told` says which behaviour each id has, if not the training itself.
        """
        where = self.lineup.positions
        if name == "mean":
            return MeanSteering.fit(self.shifts, positions=where, alpha=alpha)
        if name == "mean_ba":
            behaviours = (told or self.training).told
            return self.means.rows([behaviours[one] for one in ids]).with_alpha(alpha)
        if name == "l2s":
            return self.network(seed).with_alpha(alpha)
        if oracle is None:
            raise InputError(f"{name} needs the contrastive pairs of the items themselves.")
        if name == "p2s":
            return P2S.rows(oracle, ids, where, alpha)
        return NormRandom.rows(oracle, ids, seed, where, alpha)

    def _extract(self, pairs: Sequence[ContrastivePair], name: str) -> Shifts:
        write, read = self.lineup.write, self.lineup.read
        if write is None:
            raise InputError("nothing says where to write; give a site such as 'resid_post.14'.")
        folder = self.out / "shifts" / f"{name}-{write}-{read or write}"
        found = self.vlm.extract(
            list(pairs), write, read, out=folder, context=self.training.context,
            target=parse_target(self.training.target), batch_size=self.batch_size, progress=self.progress,
        )  # fmt: skip
        moved = {kind for kind, one in zip(found.behaviours, found.vectors, strict=True) if bool(one.any())}
        if alike := sorted(set(found.behaviours) - moved):
            raise InputError(
                f"both openings of every {alike[0]!r} pair ({name}) leave the same state at {write}, so there is no "
                "vector: the model may not know their words, or not read them there. Give other pairs, or another site."
            )
        return found

    def _equalised(self, shifts: Shifts) -> Shifts:
        there = set(shifts.behaviours)
        groups = [group for group in self.training.equalise if there & set(group)]
        # The first group is the measure: without it there is nothing to be made equal to.
        return shifts.equalised(groups) if len(groups) > 1 and groups[0] == self.training.equalise[0] else shifts


def digest(shifts: Shifts) -> str:
    """SHA-256 of vectors, contexts, ids and behaviours."""
    tensors = sha256(tensor_bytes({"vectors": shifts.vectors, "contexts": shifts.contexts}))
    return sha256(json_bytes([tensors, shifts.ids, shifts.behaviours], "the ids of the shifts"))
