"""The runner and `evaluate`: every method against plain hooks on a second model, figures by hand, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _colours import KINDS, Ask, Colours, Lengths, colour, numbers, plain_answer, plain_answers, plain_read, second
from _steerings import PAIR, drawn_module
from _tiny import D_MODEL, draw, plain_hooks, tiny_llava, tiny_processor
from torch import Tensor

import steer_plugin as sp
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation import cost_log
from steer_plugin.evaluation.answers import AnswerLog
from steer_plugin.evaluation.asking import Asked, Method, Sampling
from steer_plugin.evaluation.costs import forced_costs
from steer_plugin.evaluation.entries import digest_of, entries
from steer_plugin.evaluation.evaluate import evaluate
from steer_plugin.evaluation.lineup import Entry, Lineup
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.runner import Runner
from steer_plugin.shifts import Shifts
from steer_plugin.training.config import preset

WRITE, READ, ALPHA = "resid_post.2", "resid_post.1", 3.0
SAVED = draw(D_MODEL, seed=7, scale=3)
ASKS = Colours().asks
FEW = (0, 1)
FITTED = ("mean", "mean_ba", "l2s", "p2s")


def lineup(**changes: Any) -> Lineup:
    made = Lineup(
        methods=("none", "prompt", *FITTED, "norm_rnd", "actadd", "steervlm"),
        steerings={
            "mine": sp.MeanSteering(SAVED, WRITE),
            "vlm": sp.SteerVLM(drawn_module()),
        },
        write=WRITE, read=READ, alpha=ALPHA, pair=PAIR, seeds=(0, 1), hidden=4,
    )  # fmt: skip
    return replace(made, **changes)


SMALL = {"methods": ("none", "mean"), "steerings": {}, "seeds": (0,), "controls": False}


@pytest.fixture(scope="module")
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


def run(vlm: sp.AttachedModel, out: Path, which: Lineup, **options: Any) -> Evaluation:
    benchmark = options.pop("benchmark", None) or Colours()
    given: dict[str, Any] = {"costed": 0, "progress": False, "batch_size": 12, **options}
    return evaluate(vlm, benchmark, which, out, **given)


@pytest.fixture(scope="module")
def done(vlm: sp.AttachedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(vlm, out, lineup(), costed=5)


@pytest.fixture(scope="module")
def out(done: tuple[Path, Evaluation]) -> Path:
    return done[0]


@pytest.fixture(scope="module")
def found(done: tuple[Path, Evaluation]) -> Evaluation:
    return done[1]


@pytest.fixture(scope="module")
def train(out: Path) -> Shifts:
    return Shifts.load(out / "shifts" / f"train-{WRITE}-{READ}")


@pytest.fixture(scope="module")
def own(out: Path) -> dict[str, Tensor]:
    shifts = Shifts.load(out / "shifts" / f"test-{WRITE}-{READ}")
    return dict(zip(shifts.ids, shifts.vectors, strict=True))


def written(out: Path, name: str) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]
    return {row["id"]: row["answer"] for row in lines[1:]}


def of_kind(shifts: Shifts, *kinds: str) -> Shifts:
    return shifts.select([i for i, kind in enumerate(shifts.behaviours) if kind in kinds])


# -- what each method does --------------------------------------------------------------------------------------------


def test_unsteered_and_prompted_answers_are_plain_generations(out: Path):
    plain = plain_answers(ASKS)
    assert written(out, "none") == plain
    told = {ask.key: plain_answer(ask, text=f"w50 w51 {ask.text}") for ask in ASKS}
    assert written(out, "prompt") == told
    assert told != plain


def test_mean_adds_the_mean_of_the_steered_behaviours(out: Path, train: Shifts):
    vector = ALPHA * of_kind(train, "red", "blue").vectors.mean(0)
    assert written(out, "mean") == plain_answers(ASKS, vector)
    assert written(out, "mean-swapped") == plain_answers(ASKS, -vector)
    assert len({str(written(out, name)) for name in ("none", "mean", "mean-swapped")}) == 3


def test_the_told_mean_is_that_of_each_rows_behaviour_and_nothing_for_one_left_alone(out: Path, train: Shifts):
    means = {kind: ALPHA * of_kind(train, kind).vectors.mean(0) for kind in KINDS} | {"still": torch.zeros(D_MODEL)}
    assert written(out, "mean_ba") == plain_answers(ASKS, {ask.id: means[ask.kind] for ask in ASKS})


def test_p2s_steers_each_row_by_its_own_vector(out: Path, own: dict[str, Tensor]):
    assert written(out, "p2s") == plain_answers(ASKS, {name: ALPHA * one for name, one in own.items()})
    assert written(out, "p2s-swapped") == plain_answers(ASKS, {name: -ALPHA * one for name, one in own.items()})


def test_the_size_of_a_batch_changes_no_answer(vlm: sp.AttachedModel, out: Path, tmp_path: Path):
    run(vlm, tmp_path, lineup(methods=("mean_ba", "p2s"), steerings={}), batch_size=5)
    for name in ("mean_ba", "p2s", "mean_ba-random-seed1", "p2s-random-seed0", "p2s-swapped"):
        assert written(tmp_path, name) == written(out, name)


@pytest.mark.parametrize("seed", [0, 1])
def test_l2s_adds_what_its_network_says_of_the_rows_own_activation(out: Path, train: Shifts, seed: int):
    network = sp.L2S.fit(
        of_kind(train, "red", "blue"), preset("mse", hidden=4), neutral=of_kind(train, "still"), seed=seed
    ).network
    with torch.no_grad():
        vectors = {ask.id: ALPHA * network(plain_read(ask, 1)[None])[0] for ask in ASKS}
    assert written(out, f"l2s-seed{seed}") == plain_answers(ASKS, vectors)
    assert written(out, f"l2s-swapped-seed{seed}") == plain_answers(ASKS, {k: -v for k, v in vectors.items()})


def test_a_saved_vector_its_opposite_and_nothing_else(out: Path):
    assert written(out, "mine") == plain_answers(ASKS, SAVED)
    assert written(out, "mine-swapped") == plain_answers(ASKS, -SAVED)


def test_actadd_is_the_difference_of_two_bare_prompts(out: Path):
    def last(text: str) -> Tensor:
        got: list[Tensor] = []
        inputs = tiny_processor()(text=[f"USER: {text} ASSISTANT:"], return_tensors="pt")
        with torch.no_grad(), plain_hooks(second(), ("resid_post", 2, lambda h: got.append(h[0].clone()))):
            second()(**inputs)
        return got[0][-2]  # the last word; ASSISTANT: opens the answer

    assert written(out, "actadd") == plain_answers(ASKS, ALPHA * (last(PAIR[0]) - last(PAIR[1])))


def steering_of(vlm: sp.AttachedModel, out: Path, name: str, seed: int = 0, **changes: Any) -> Any:
    made = entries(vlm, Colours(), lineup(**changes), out, progress=False)
    method = next(dict(entry.runs)[seed] for entry in made if entry.name == name)
    return method.steering([ask.id for ask in ASKS[:3]])


def test_norm_random_is_as_long_as_the_rows_own_vector_and_points_elsewhere(
    vlm: sp.AttachedModel, out: Path, own: dict[str, Tensor]
):
    (first,), (second_,) = (steering_of(vlm, out, "norm_rnd", seed).intervention.writes for seed in (0, 1))
    wanted = torch.stack([own[ask.id] for ask in ASKS[:3]])
    torch.testing.assert_close(first.delta.vector.norm(dim=-1), wanted.norm(dim=-1))
    assert first.alpha == ALPHA
    assert torch.cosine_similarity(first.delta.vector, wanted).abs().max() < 0.8
    assert not torch.allclose(first.delta.vector, second_.delta.vector)
    assert not torch.allclose(first.delta.vector[0] / first.delta.vector[0].norm(), first.delta.vector[1] / 7)


@pytest.mark.parametrize("name", [*FITTED, "actadd", "mine"])
def test_random_controls_are_as_long_at_every_token(vlm: sp.AttachedModel, out: Path, name: str):
    inputs = vlm.inputs([ask.text for ask in ASKS[:3]], [colour(ask.number) for ask in ASKS[:3]])

    def pushed(which: str) -> Tensor:
        """What is added behind layer 2, (row, pos, d_model), seen by a plain hook on the layer after it."""
        got: list[Tensor] = []
        layer = vlm.parts.root.model.language_model.layers[3]
        for steering in (None, steering_of(vlm, out, which)):
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs: got.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            )
            vlm.generate(**inputs, steering=steering, max_new_tokens=1, do_sample=False)
            handle.remove()
        return got[-1] - got[0]

    real, random, turned = pushed(name), pushed(f"{name}, random"), pushed(f"{name}, swapped")
    assert real[:, -1].norm(dim=-1).max() > 0.1
    torch.testing.assert_close(random.norm(dim=-1), real.norm(dim=-1), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(turned, -real, atol=2e-3, rtol=1e-3)
    strong = real[:, -1].norm(dim=-1) > 0.1
    assert torch.cosine_similarity(random[:, -1], real[:, -1])[strong].abs().max() < 0.9


class Paired(Colours):
    """Each question with a prompt pair of its own."""

    def __init__(self) -> None:
        super().__init__(FEW, training=False)
        self.pairs = {ask.id: (f"w{ask.word} w33", f"w{30 + ask.number}") for ask in self.asks}
        self.worded = {ask.id: f"w60 {ask.text} w61" for ask in self.asks}


def alone(vlm: sp.AttachedModel, ask: Ask, steering: sp.SteerVLM) -> str:
    inputs = vlm.inputs(ask.text, colour(ask.number))
    ids = vlm.generate(**inputs, steering=steering, max_new_tokens=4, do_sample=False)
    return vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0]


def test_steervlm_gets_the_pair_of_each_row_or_the_one_for_all(vlm: sp.AttachedModel, out: Path, tmp_path: Path):
    module = sp.SteerVLM(drawn_module())
    benchmark, asks = Paired(), ASKS[:4]

    def first(place: Path, name: str) -> dict[str, str]:
        said = written(place, name)
        return {ask.key: said[ask.key] for ask in asks}

    assert first(out, "vlm") == {ask.key: alone(vlm, ask, module.pair(*PAIR)) for ask in asks}
    assert first(out, "vlm-pair-swapped") == {ask.key: alone(vlm, ask, module.pair(*PAIR[::-1])) for ask in asks}
    one = Lineup(("none", "prompt", "steervlm"), {"vlm": module}, seeds=(3,))
    run(vlm, tmp_path, one, benchmark=benchmark)
    each = {ask.key: alone(vlm, ask, module.pair(*benchmark.pairs[ask.id])) for ask in asks}
    assert written(tmp_path, "vlm") == each
    assert each != first(out, "vlm")
    back = {ask.key: alone(vlm, ask, module.pair(*benchmark.pairs[ask.id][::-1])) for ask in asks}
    assert written(tmp_path, "vlm-pair-swapped") == back
    worded = {ask.key: plain_answer(ask, text=f"w60 {ask.text} w61") for ask in asks}
    assert written(tmp_path, "prompt") == worded
    # A pair of the caller's goes before those of the benchmark, and so does an instruction.
    mine = replace(one, pair=PAIR, prompt="w50 w51", controls=False)
    run(vlm, tmp_path / "mine", mine, benchmark=benchmark)
    assert written(tmp_path / "mine", "vlm") == first(out, "vlm")
    assert written(tmp_path / "mine", "prompt") == first(out, "prompt")
    run(vlm, tmp_path / "empty", replace(one, prompt="", controls=False), benchmark=benchmark)
    assert written(tmp_path / "empty", "prompt") == worded


def test_white_space_around_a_question_is_asked_as_it_is():
    item = replace_text(ASKS[0], " w5\n")
    assert Method("none").text(item) == " w5\n"
    assert Method("prompt", prefix="w1").text(item) == "w1  w5\n"


def replace_text(ask: Ask, text: str) -> Any:
    made = SimpleNamespace(key=ask.key, id=ask.id, text=text, load_images=ask.load_images)
    assert isinstance(made, Asked)
    return made


# -- who takes part, and what is written ------------------------------------------------------------------------------


def test_one_file_for_each_seed_of_what_a_seed_changes(out: Path):
    seeded = ["l2s", "l2s-random", "l2s-swapped", "norm_rnd"]
    once = ["none", "prompt"]
    for name in ("mean", "mean_ba", "p2s", "actadd", "mine", "vlm"):
        once += [name, f"{name}-swapped"]
        seeded += [f"{name}-random"]
    once += ["vlm-pair-swapped"]
    wanted = {*once, *(f"{name}-seed{seed}" for name in seeded for seed in (0, 1))}
    assert {path.stem for path in (out / "answers").iterdir()} == wanted
    assert {path.stem for path in (out / "costs").iterdir()} == {*once, *(f"{name}-seed0" for name in seeded)}


def test_controls_stand_beside_every_steered_method_and_not_without_controls(vlm: sp.AttachedModel, found: Evaluation):
    steered = [*FITTED, "actadd", "mine", "vlm"]
    assert found.controls == {
        **{f"{name}, {what}": name for name in steered for what in ("swapped", "random")}, "vlm, pair swapped": "vlm"
    }  # fmt: skip
    assert {name: set(rows) for name, rows in found.over_controls.items()} == {
        name: {control for control, of in found.controls.items() if of == name} for name in steered
    }
    assert list(found.scores)[:2] == ["none", "prompt"]
    assert "norm_rnd" not in found.controls


def test_without_controls_methods_run_alone(vlm: sp.AttachedModel, tmp_path: Path):
    alone_ = run(vlm, tmp_path, lineup(controls=False, methods=("mean", "none"), pair=PAIR))
    assert list(alone_.scores) == ["none", "mean", "mine", "vlm"]
    assert alone_.controls == {} and alone_.over_controls == {}


def figures(answers: dict[str, str]) -> dict[str, float]:
    """The benchmark's metrics, counted from answers by key."""
    said = {ask: numbers(answers[ask.key]) for ask in ASKS}
    odd = [len(row) for ask, row in said.items() if ask.number % 2]
    return {
        "even": sum(bool(row) and row[0] % 2 == 0 for row in said.values()) / len(said),
        "share": sum(n % 2 == 0 for row in said.values() for n in row) / sum(map(len, said.values())),
        "odd pictures": sum(odd) / len(odd),
    }


def test_figures_are_those_counted_from_the_answers(out: Path, found: Evaluation, own: dict[str, Tensor]):
    for name, answers in (
        ("none", plain_answers(ASKS)),
        ("mine", plain_answers(ASKS, SAVED)),
        ("p2s", plain_answers(ASKS, {name: ALPHA * one for name, one in own.items()})),
    ):
        for metric, value in figures(answers).items():
            assert found.score(name, metric).value == pytest.approx(value), (name, metric)
            assert found.scores[name][metric].spread is None
        assert "never asked" not in found.scores[name]
    rows = json.loads((out / "metrics.json").read_text())["scores"]
    assert rows["mine"]["even"]["value"] == pytest.approx(figures(plain_answers(ASKS, SAVED))["even"])
    assert (out / "table.md").read_text() == found.markdown()


def test_seeds_are_pooled_with_their_spread(out: Path, found: Evaluation):
    runs = [figures(written(out, f"l2s-seed{seed}")) for seed in (0, 1)]
    for metric in runs[0]:
        values = [one[metric] for one in runs]
        assert found.scores["l2s"][metric].means == pytest.approx(values)
        assert found.score("l2s", metric).value == pytest.approx(np.mean(values))
        assert found.scores["l2s"][metric].spread == pytest.approx(np.std(values, ddof=1))
    assert "±" in next(line for line in found.table().splitlines() if line.startswith("| l2s "))


def test_provenance_holds_everything_that_decides_a_number(vlm: sp.AttachedModel, out: Path):
    kept = json.loads((out / "metrics.json").read_text())["provenance"]
    assert kept["model"]["d_model"] == D_MODEL and kept["model"]["weights"] == vlm.parts.fingerprint()
    assert {"torch", "transformers", "steer_plugin"} <= {name.replace("-", "_") for name in kept["versions"]}
    assert kept["data"] == {"pictures": list(range(6))} and kept["benchmark"] == "colours"
    assert len(kept["template"]) == 64
    assert kept["decoding"] == {"do_sample": False, "max_new_tokens": 4}
    assert (kept["seed"], kept["costed"], kept["judges"]) == (0, 5, {})
    assert [row["seed"] for row in kept["methods"]["l2s"]] == [0, 1]
    note = kept["methods"]["l2s"][1]["note"]
    assert (note["alpha"], note["write"], note["read"], note["positions"]) == (ALPHA, WRITE, READ, "paper")
    assert (note["hidden"], note["preset"], note["seed"]) == (4, "mse", 1)
    assert kept["methods"]["prompt"][0]["prefix"] == "w50 w51"
    assert kept["lineup"]["seeds"] == [0, 1] and kept["lineup"]["steerings"] == ["mine", "vlm"]
    assert kept["calibration"] is None


def test_the_template_and_the_sampling_are_on_record(vlm: sp.AttachedModel, tmp_path: Path):
    which = lineup(**{**SMALL, "methods": ("none",)})
    one = run(vlm, tmp_path / "a", which, sampling=Sampling(4, top_k=3), max_new_tokens=7)
    assert one.provenance["decoding"] == {
        "do_sample": True, "max_new_tokens": 7, "seed": 4, "temperature": 1.0, "top_k": 3, "top_p": 1.0,
        "batch_size": 12,
    }  # fmt: skip
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("USER: ", "USER: w9 ")
    other = run(sp.attach(tiny_llava(), processor), tmp_path / "b", which)
    assert other.provenance["template"] != one.provenance["template"]


def test_alphas_of_any_mapping_are_kept(vlm: sp.AttachedModel, tmp_path: Path):
    which = lineup(**SMALL, alphas=MappingProxyType({"mean": 2.0}))
    kept: Any = run(vlm, tmp_path, which).provenance
    assert kept["lineup"]["alphas"] == {"mean": 2.0}
    assert kept["methods"]["mean"][0]["note"]["alpha"] == 2.0


# -- costs ------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_forced_answers(vlm: sp.AttachedModel, out: Path, found: Evaluation, train: Shifts):
    steering = sp.MeanSteering(of_kind(train, "red", "blue").vectors.mean(0), WRITE, alpha=ALPHA)
    lines = [json.loads(line) for line in (out / "answers" / "mean.jsonl").read_text().splitlines()[1:]]
    tokens = {row["id"]: row["tokens"] for row in lines}
    chosen = [ASKS[i] for i in (0, 3, 6, 8, 11)]  # five of twelve, evenly spread
    singles = [
        forced_costs(vlm, vlm.inputs(ask.text, colour(ask.number)), [tokens[ask.key]], steering) for ask in chosen
    ]
    costs = found.costs["mean"]
    assert costs.n == 5 and costs.kl is not None
    assert costs.kl.value == pytest.approx(np.mean([one.kl[0] for one in singles]), rel=1e-3)
    nll = sum(one.nll_unsteered[0] * one.tokens[0] for one in singles) / sum(one.tokens[0] for one in singles)
    assert costs.perplexity == pytest.approx(np.exp(nll), rel=1e-3)
    assert found.costs["none"].kl is not None and found.costs["none"].kl.value == 0
    assert found.costs["prompt"].kl is None
    assert costs.text.unfinished is None  # the tiny model has no end of sequence


# -- judges and scores that are missing -------------------------------------------------------------------------------


def test_verdicts_are_figures_and_are_not_asked_for_twice(vlm: sp.AttachedModel, tmp_path: Path):
    judge = Lengths()
    first = run(vlm, tmp_path, lineup(**SMALL), benchmark=Colours(judges=[judge]))
    answers = plain_answers(ASKS)
    assert first.score("none", "lengths").value == np.mean([len(text.split()) for text in answers.values()])
    assert judge.judged == 2 * len(ASKS)
    assert (tmp_path / "verdicts" / "lengths-mean.jsonl").is_file()
    again = run(vlm, tmp_path, lineup(**SMALL), benchmark=Colours(judges=[judge]))
    assert judge.judged == 2 * len(ASKS)
    assert again.as_json() == first.as_json()
    kept: Any = first.provenance["judges"]
    assert kept == {"lengths": {"most": 99}}


class Fickle(Lengths):
    """Finds no score for some answers, others for each method and seed."""

    def judge(self, items: Any) -> Any:
        return [
            replace(one, score=float("nan")) if hash_of(one.id + one.raw) % 4 == 0 else one
            for one in super().judge(items)
        ]


def hash_of(text: str) -> int:
    return sum(text.encode())


def test_answers_without_a_score_are_left_out_of_both_sides(vlm: sp.AttachedModel, tmp_path: Path):
    which = lineup(methods=("none", "l2s"), steerings={"mine": sp.MeanSteering(SAVED, WRITE)}, controls=False)
    found = run(vlm, tmp_path, which, benchmark=Colours(judges=[Fickle()]))

    def scores(name: str) -> dict[str, float]:
        said = written(tmp_path, name)
        kept = {ask.id: said[ask.key] for ask in ASKS if hash_of(ask.id + said[ask.key]) % 4}
        return {name: float(len(text.split())) for name, text in kept.items()}

    none, mine, seeds = scores("none"), scores("mine"), [scores("l2s-seed0"), scores("l2s-seed1")]
    unread: Any = found.provenance["unread_verdicts"]
    assert unread["lengths on none"] == len(ASKS) - len(none)
    assert 0 < len(none) < len(ASKS) and set(none) != set(mine)
    assert found.score("none", "lengths").value == pytest.approx(np.mean(list(none.values())))
    both = set(none) & set(mine)
    gap = found.against["mine"]["lengths"].difference
    assert gap.value == pytest.approx(np.mean([mine[one] - none[one] for one in both]))
    shared = set(seeds[0]) & set(seeds[1])
    assert found.score("l2s", "lengths").value == pytest.approx(np.mean([seed[k] for seed in seeds for k in shared]))
    everywhere = shared & set(none)
    wanted = np.mean([seed[one] - none[one] for seed in seeds for one in everywhere])
    assert found.against["l2s"]["lengths"].difference.value == pytest.approx(wanted)


def test_a_metric_on_one_picture_has_no_interval_and_is_left_out(vlm: sp.AttachedModel, tmp_path: Path):
    found = run(vlm, tmp_path, lineup(**SMALL), benchmark=Colours([0, 1]))
    assert set(found.scores["mean"]) == set(found.against["mean"]) == {"even", "share"}


def test_a_headline_on_one_picture_is_refused(vlm: sp.AttachedModel, tmp_path: Path):
    benchmark = Colours([0, 1])
    benchmark.headline = "odd pictures"
    with pytest.raises(InputError, match="'odd pictures' of colours has scores on fewer than two pictures"):
        run(vlm, tmp_path, lineup(**SMALL), benchmark=benchmark)


# -- resumed, and other jobs ------------------------------------------------------------------------------------------


def test_a_finished_run_asks_nothing_again(
    vlm: sp.AttachedModel, out: Path, found: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    before = (out / "metrics.json").read_bytes()
    files = {path: path.read_bytes() for folder in ("answers", "costs") for path in (out / folder).iterdir()}
    for name in ("generate", "inputs"):
        monkeypatch.setattr(vlm, name, lambda *a, **k: pytest.fail("asked again"))
    for name in ("forced_costs", "forced_logits"):
        monkeypatch.setattr(cost_log, name, lambda *a, **k: pytest.fail("costs taken again"))
    run(vlm, out, lineup(), costed=5)
    assert (out / "metrics.json").read_bytes() == before
    assert {path: path.read_bytes() for path in files} == files


class Relabelled(Colours):
    """The same questions, of which other behaviours are told."""

    def __init__(self) -> None:
        super().__init__(FEW)
        assert self.training is not None
        self.training = replace(self.training, told=dict.fromkeys(self.training.told, "red"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"alpha": 1.0}, {"alpha": 2.0}),
        ({"positions": "last_prompt"}, {"positions": "paper"}),
        ({"methods": ("prompt",)}, {"methods": ("prompt",), "prompt": "w9"}),
        ({"methods": ("l2s",)}, {"methods": ("l2s",), "hidden": 5}),
        ({"methods": ("l2s",)}, {"methods": ("l2s",), "seeds": (5,)}),
        ({"methods": ("l2s",)}, {"methods": ("l2s",), "benchmark": Colours(FEW, learning_rate=1e-2)}),
        ({"methods": ("mean_ba",)}, {"methods": ("mean_ba",), "benchmark": Relabelled()}),
        ({}, {"benchmark": Colours((0, 2))}),
        ({}, {"sampling": Sampling()}),
        ({}, {"max_new_tokens": 3}),
        ({"steerings": {"m": sp.MeanSteering(SAVED, WRITE)}}, {"steerings": {"m": sp.MeanSteering(-SAVED, WRITE)}}),
        (
            {"steerings": {"m": sp.add(WRITE, SAVED, "last_prompt")}},
            {"steerings": {"m": sp.add(WRITE, -SAVED, "last_prompt")}},
        ),
        (
            {"steerings": {"m": sp.SteerVLM(drawn_module())}, "pair": PAIR},
            {"steerings": {"m": sp.SteerVLM(drawn_module())}, "pair": PAIR[::-1]},
        ),
    ],
)  # fmt: skip
def test_answers_of_another_job_are_refused(
    vlm: sp.AttachedModel, tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
):
    def once(changes: dict[str, Any]) -> Evaluation:
        options = {name: changes[name] for name in changes if name in ("benchmark", "sampling", "max_new_tokens")}
        rest = {name: value for name, value in changes.items() if name not in options}
        return run(vlm, tmp_path, lineup(**{**SMALL, **rest}), **{"benchmark": Colours(FEW), **options})

    once(first)
    with pytest.raises(JobError, match="another job"):
        once(then)


def test_another_model_is_refused(vlm: sp.AttachedModel, tmp_path: Path):
    which = lineup(**{**SMALL, "methods": ("none",)})
    run(vlm, tmp_path, which)
    with pytest.raises(JobError, match="another job"):
        run(sp.attach(tiny_llava(seed=1), tiny_processor()), tmp_path, which)


def test_costs_of_another_strength_are_not_taken_for_its_own(vlm: sp.AttachedModel, tmp_path: Path):
    """Two strengths may give the same answers, and never the same KL."""
    which = {**SMALL, "methods": ("none",)}
    weak = {"m": sp.MeanSteering(SAVED, WRITE, alpha=1e-4)}
    weaker = {"m": sp.MeanSteering(SAVED, WRITE, alpha=1e-5)}
    run(vlm, tmp_path, lineup(**{**which, "steerings": weak}), costed=5)
    (tmp_path / "answers" / "m.jsonl").unlink()
    with pytest.raises(JobError, match=r"costs of another job: note.*writes is .*0\.0001"):
        run(vlm, tmp_path, lineup(**{**which, "steerings": weaker}), costed=5)


def test_answers_resume_in_the_middle_of_a_line(vlm: sp.AttachedModel, tmp_path: Path):
    which = lineup(**SMALL)
    whole = run(vlm, tmp_path, which, costed=5, batch_size=5).as_json()
    for folder in ("answers", "costs"):
        path = tmp_path / folder / "mean.jsonl"
        path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / "metrics.json").unlink()
    assert run(vlm, tmp_path, which, costed=5, batch_size=5).as_json() == whole
    keys = list(written(tmp_path, "mean"))
    assert sorted(keys) == sorted(ask.key for ask in ASKS)
    assert len((tmp_path / "answers" / "mean.jsonl").read_text().splitlines()) == 1 + len(ASKS)


# -- refused before any work ------------------------------------------------------------------------------------------


class Odd(Colours):
    """Something about it is wrong."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": Odd(items=[], groups=[])}, "colours has no items to ask about"),
        ({"benchmark": Odd(groups=["a"] * 12)}, "12 items, 12 groups and 1 pictures.*at least two"),
        ({"benchmark": Odd(groups=["a", "b"])}, "12 items, 2 groups and 2 pictures: expected the picture of every"),
        ({"max_new_tokens": 0}, "at least one token, got max_new_tokens=0"),
        ({"costed": -1}, "costed=-1 items: expected 0"),
        ({"costed": 1}, "costed=1 items: .*at least two pictures"),
        ({"benchmark": Colours(training=False)}, "mean on colours need contrastive pairs to fit on"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_any_work(
    vlm: sp.AttachedModel, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        run(vlm, tmp_path, lineup(**SMALL), **changes)
    assert not list(tmp_path.iterdir())


def entry(name: str, seeds: tuple[int, ...] = (0,)) -> Entry:
    return Entry(name, tuple((seed, Method(name)) for seed in seeds))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([entry("a")], r"the methods are \['a'\]: expected each once, 'none' among them"),
        ([entry("none"), entry("a"), entry("a")], "expected each once"),
        ([entry("none"), entry("a, b"), entry("a b")], r"would both write a-b\.jsonl: rename one"),
    ],
)
def test_methods_of_one_name_or_file_are_refused(
    vlm: sp.AttachedModel, tmp_path: Path, made: list[Entry], message: str
):
    with pytest.raises(InputError, match=message):
        Runner(vlm, Colours(), tmp_path, progress=False).run(made)
    assert not list(tmp_path.iterdir())


def test_a_benchmarks_own_errors_name_the_mend():
    class Plain(Colours):
        def judged(self, judge: Any, texts: Any) -> Any:
            return super(Colours, self).judged(judge, texts)

    with pytest.raises(InputError, match="colours has no use for the judge 'lengths'"):
        Plain().judged(Lengths(), {})
    with pytest.raises(InputError, match=r"colours has no metric 'evn'\. Did you mean 'even'"):
        Colours().metric("evn")
    texts = {ask.key: "w2 w3" for ask in ASKS}
    assert Colours().behaviour(texts) == [1.0] * 12
    with pytest.raises(InputError, match="'share' of colours is no mean of one score per item"):
        Odd(headline="share").behaviour(texts)
    with pytest.raises(InputError, match="scored by lengths: a search over strengths would ask it at every step"):
        Colours(judges=[Lengths()]).behaviour(texts)
    lower = Odd(headline="odd pictures").behaviour(texts)
    assert np.isnan(lower[0]) and lower[2] == -2.0


def test_pairs_and_wordings_of_one_benchmark_are_not_those_of_another():
    with pytest.raises(TypeError):
        Colours.pairs["x"] = ("a", "b")  # pyright: ignore[reportIndexIssue]
    with pytest.raises(TypeError):
        Colours.worded["x"] = "a"  # pyright: ignore[reportIndexIssue]


def test_digests_tell_steerings_apart():
    vector = draw(D_MODEL)
    kinds: list[Any] = [
        sp.MeanSteering(vector, WRITE), sp.MeanSteering(2 * vector, WRITE), sp.add(WRITE, vector, "paper"),
        sp.add(WRITE, 2 * vector, "paper"), sp.SteerVLM(drawn_module()),
    ]  # fmt: skip
    found = [digest_of(one) for one in kinds]
    assert None not in found and len(set(found[:2])) == len(set(found[2:])) - 1 == 2


def test_a_log_is_no_place_for_what_json_cannot_hold(tmp_path: Path):
    job: dict[str, JSON] = {"a": 1}
    AnswerLog(tmp_path / "a.jsonl", job)
    with pytest.raises(JobError, match="another job"):
        AnswerLog(tmp_path / "a.jsonl", {"a": 2})


def test_openings_that_the_model_reads_alike_are_named(vlm: sp.AttachedModel, tmp_path: Path):
    benchmark = Colours(FEW)
    assert benchmark.training is not None
    pairs = [
        replace(pair, positive="unknown", negative="stranger") if pair.behaviour == "blue" else pair
        for pair in benchmark.training.pairs
    ]
    benchmark.training = replace(benchmark.training, pairs=pairs)
    message = r"every 'blue' pair \(train\) leave the same state at resid_post\.2.*Give other pairs, or another site"
    with pytest.raises(InputError, match=message):
        run(vlm, tmp_path, lineup(**SMALL), benchmark=benchmark)
