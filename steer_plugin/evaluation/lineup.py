"""Who takes part in an evaluation: methods by name, made for one benchmark, each beside its controls.

    none        unsteered
    prompt      an instruction in words
    mean        one mean vector (Mean-S, CAA);   mean_ba: one per behaviour, told at test time (Mean-S(BA))
    l2s         a vector predicted from the input's own activation
    p2s         the input's own contrastive vector: an oracle
    norm_rnd    a random direction as long as the input's own P2S vector
    actadd      the difference of two bare prompts
    steervlm    a saved SteerVLM, bound to the benchmark's prompt pairs or to one of yours

Beside every steered method run `..., swapped` (the sign turned) and `..., random` (another direction, as long at every
token): what a method gains over them is due to its direction. Sources: arXiv 2508.12815 section 4, arXiv 2510.26769.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.asking import Method, distinct
from steer_plugin.evaluation.benchmark import Benchmark
from steer_plugin.intervention import Steerable, check_alpha
from steer_plugin.methods import SteerVLM
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

METHODS = ("none", "prompt", "norm_rnd", "mean", "mean_ba", "l2s", "p2s", "actadd", "steervlm")
FITTED = ("mean", "mean_ba", "l2s")
ORACLES = ("norm_rnd", "p2s")


@dataclass(frozen=True)
class Lineup:
    """The choices that make the methods of an evaluation.

    Attributes:
        methods: names, from `METHODS`; "none" always takes part.
        steerings: saved steerings by name, with their own strength, sites and positions.
        write, read: sites of the methods that are fitted here; `read` is that of L2S's context, `write` by default.
        positions: where the fitted methods write.
        alpha: their strength; `alphas` by method, which goes before it.
        prompt: instruction of "prompt", instead of the benchmark's.
        pair: (p+, p-) of SteerVLM and ActAdd, before the benchmark's own.
        seeds: of fitting and of random directions; one run for each.
        controls: whether the controls run.
        hidden: hidden units of L2S.
    """

    methods: tuple[str, ...] = ("none", "prompt")
    steerings: Mapping[str, Steerable] = field(default_factory=dict[str, Steerable])
    write: str | None = None
    read: str | None = None
    positions: str = "paper"
    alpha: float = 1.0
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    prompt: str | None = None
    pair: tuple[str, str] | None = None
    seeds: tuple[int, ...] = (0,)
    controls: bool = True
    hidden: int = 100

    def __post_init__(self) -> None:
        """Refuse, before any work, what cannot take part."""
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"unknown method {name!r}.{nearest(name, METHODS)} Known: {', '.join(METHODS)}.")
        if clash := sorted(set(self.steerings) & {"none", *self.methods} - {"steervlm"}):
            raise InputError(
                f"a saved steering is called {clash[0]!r}, as is a method that takes part; rename it, or leave the "
                "method out."
            )
        if "" in self.steerings:
            raise InputError("a saved steering has no name: expected {name: steering}.")
        for site in (self.write, self.read):
            if site is not None:
                Site.parse(site)
        Positions.parse(self.positions)
        for strength in (self.alpha, *self.alphas.values()):
            check_alpha(strength)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {self.seeds}: expected at least one, each once.")
        own = [name for name in self.methods if name in (*FITTED, *ORACLES, "actadd")]
        if odd := sorted(set(self.alphas) - set(own)):
            raise InputError(
                f"a strength is given for {odd[0]!r}, which is not fitted here ({', '.join(own) or 'nothing is'})."
                f"{nearest(odd[0], own)} A saved steering carries its own."
            )

    def of(self, method: str) -> float:
        """Strength of a method; Norm-Rnd is matched to L2S (without it, to P2S) unless it has its own."""
        if method == "norm_rnd" and method not in self.alphas:
            return self.of("p2s" if "p2s" in self.methods and "l2s" not in self.methods else "l2s")
        return self.alphas.get(method, self.alpha)

    def check(self, benchmark: Benchmark) -> None:
        """Refuse what this benchmark cannot host.

        Raises:
            InputError: methods without the site, data, pairs or instruction that they need, for every item.
        """
        fitted = [name for name in self.methods if name in (*FITTED, *ORACLES)]
        training = benchmark.training
        if fitted and (training is None or self.write is None):
            lacking = "a site to write at (write, such as 'resid_post.14')" if training is not None else "contrastive "
            lacking += "" if training is not None else "pairs to fit on; give pairs, or a saved steering"
            raise InputError(f"{', '.join(fitted)} on {benchmark.name} need {lacking}.")
        ids = [item.id for item in distinct(benchmark.items)]
        for name in fitted:
            known = {pair.id for pair in training.oracle} if training is not None and name in ORACLES else set(ids)
            if lost := [one for one in ids if one not in known]:
                raise InputError(f"{name} needs the contrastive pair of every test item; {lost[0]!r} has none.")
        if training is not None and "mean_ba" in self.methods and (lost := [n for n in ids if n not in training.told]):
            raise InputError(f"mean_ba needs the behaviour of every item; {benchmark.name} tells none of {lost[0]!r}.")
        if "prompt" in self.methods and not (self.prompt or benchmark.prompt or benchmark.worded):
            raise InputError(f"{benchmark.name} has no instruction for the prompt baseline; give prompt=...")
        if "actadd" in self.methods and (self.write is None or not (self.pair or benchmark.pairs)):
            raise InputError(
                f"actadd on {benchmark.name} needs a site to write at (write) and a pair of prompts (pair)."
            )
        for name, one in self.steerings.items():
            patches = not isinstance(one, SteerVLM) and any(w.kind == "replace" for w in one.intervention.writes)
            if patches and self.controls:
                raise InputError(f"{name!r} replaces what it finds: it has no opposite; run it with controls=False.")
        modules = [name for name, one in self.steerings.items() if isinstance(one, SteerVLM)]
        if "steervlm" in self.methods and not modules:
            raise InputError("steervlm comes trained: give a saved SteerVLM among the steerings.")
        for name in modules:
            bound = bool(getattr(self.steerings[name], "pairs", ()))
            if not (bound or self.pair or benchmark.pairs):
                raise InputError(f"{name} needs a prompt pair on {benchmark.name}: give pair=(p+, p-).")
        paired = [*modules, *(name for name in self.methods if name == "actadd")]
        lost = [one for one in ids if one not in benchmark.pairs] if benchmark.pairs and self.pair is None else []
        if paired and lost:
            raise InputError(
                f"{paired[0]} needs the prompt pair of every item; {lost[0]!r} has none. Give pair=(p+, p-)."
            )


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with one run, or one for each seed.

    Attributes:
        runs: (seed, method); those of a method that no seed changes are one.
        control_of: the method that it is a control of.
    """

    name: str
    runs: tuple[tuple[int, Method], ...]
    control_of: str | None = None

    def log(self, seed: int) -> str:
        """Name of this run's files."""
        stem = self.name.replace(", ", "-").replace(" ", "-").replace("/", "-")
        return f"{stem}.jsonl" if len(self.runs) == 1 else f"{stem}-seed{seed}.jsonl"


def seeds_from(text: str) -> tuple[int, ...]:
    """Read "0,1,2"; raises InputError for anything else."""
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError as error:
        raise InputError(f"seeds are {text!r}: expected whole numbers such as 0,1,2.") from error
