"""A steered model in lmms-eval: its requests imitated, and lmms-eval itself where it can be imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import draw, plain_hooks

import steer_plugin as sp
from steer_plugin.errors import FrameworkError, InputError, JobError
from steer_plugin.evaluation.asking import Sampling
from steer_plugin.evaluation.lmms import Decoding, SteeredTasks, cut, steered_lmm

TASK = "existence"


@dataclass
class Asked:
    """What lmms-eval's Instance shows to a model."""

    args: tuple[Any, ...]


def visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


@pytest.fixture(scope="module")
def vlm() -> Any:
    return sp.attach(*sp.pocket.load())


@pytest.fixture(scope="module")
def docs() -> Any:
    asked = sp.pocket.World(0).questions(3)
    rows = [{"image": q.image, "question": q.text, "answer": "yes" if q.label else "no"} for q in asked]
    return {TASK: {"test": rows}}


@pytest.fixture(scope="module")
def steering(vlm: Any) -> Any:
    return sp.MeanSteering(torch.ones(vlm.d_model) * 0.5, sp.resid_post(2), "paper")


def generations(docs: Any, rows: Sequence[int], **keywords: Any) -> list[Asked]:
    test = docs[TASK]["test"]
    given = {"max_new_tokens": 6, **keywords}
    return [Asked((test[row]["question"], dict(given), visual, row, TASK, "test")) for row in rows]


def direct(vlm: Any, docs: Any, row: int, **keywords: Any) -> str:
    """One answer of the Hugging Face model, by its own generate and processor."""
    model, processor = sp.pocket.load()
    doc = docs[TASK]["test"][row]
    text = rendered(processor, doc["question"])
    inputs = processor(images=[doc["image"]], text=text, return_tensors="pt")
    ids = model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **keywords})
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def rendered(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_the_model_in_the_order_of_the_requests(vlm: Any, docs: Any, batch_size: int) -> None:
    rows = [5, 0, 3, 1, 4, 2, 7]
    tasks = SteeredTasks(vlm, batch_size=batch_size, progress=False)
    assert tasks.generate_until(generations(docs, rows), docs) == [direct(vlm, docs, row) for row in rows]


def test_steered_answers_are_those_of_steered_generation(vlm: Any, docs: Any) -> None:
    rows = list(range(12))
    test = docs[TASK]["test"]
    strong = sp.add("resid_post.2", draw(vlm.d_model, scale=4.0), "paper")
    inputs = vlm.inputs([test[row]["question"] for row in rows], [test[row]["image"] for row in rows])
    ids = vlm.generate(**inputs, steering=strong, max_new_tokens=6, do_sample=False)
    said = vlm.decode(ids[:, inputs["input_ids"].shape[1] :])
    found = SteeredTasks(vlm, strong, batch_size=12, progress=False).generate_until(generations(docs, rows), docs)
    assert found == said
    assert found != SteeredTasks(vlm, batch_size=12, progress=False).generate_until(generations(docs, rows), docs)


def test_requests_share_a_batch_only_with_their_like(vlm: Any, docs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    own = vlm.generate

    def generate(**inputs: Any) -> Any:
        calls.append((inputs["input_ids"].shape[0], inputs["max_new_tokens"], inputs["num_beams"]))
        return own(**inputs)

    monkeypatch.setattr(type(vlm), "generate", lambda self, **inputs: generate(**inputs))
    requests = generations(docs, [0, 1, 2]) + generations(docs, [3, 4], num_beams=3) + generations(docs, [5])
    said = SteeredTasks(vlm, batch_size=3, progress=False).generate_until(requests, docs)
    assert sorted(calls) == [(1, 6, 1), (2, 6, 3), (3, 6, 1)]
    assert said[3:5] == [direct(vlm, docs, row, num_beams=3) for row in (3, 4)]
    assert [request.args[1]["max_new_tokens"] for request in requests] == [6] * 6  # the task's own keywords stay


def test_prompts_with_and_without_pictures_go_apart(vlm: Any, docs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    own = type(vlm).inputs

    def inputs(self: Any, prompts: Any, images: Any = None) -> Any:
        batches.append([len(row) for row in images])
        return own(self, prompts, images)

    monkeypatch.setattr(type(vlm), "inputs", inputs)
    requests = generations(docs, [0, 1, 2])
    text, given, _, number, task, split = requests[1].args
    requests[1] = Asked((text, given, lambda doc: None, number, task, split))
    said = SteeredTasks(vlm, batch_size=3, progress=False).generate_until(requests, docs)
    assert sorted(batches) == [[0], [1, 1]] and len(said) == 3
    assert (said[0], said[2]) == (direct(vlm, docs, 0), direct(vlm, docs, 2))


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("yes. no.", ["."], "yes"),
        ("one\ntwo; three", [";", "\n"], "one"),
        ("whole", ["#"], "whole"),
        ("whole", [], "whole"),
        ("# all", ["#"], ""),
        ("a </s> b", ["</s>"], "a"),
    ],
)
def test_cut(text: str, until: list[str], expected: str) -> None:
    assert cut(text, until) == expected


def test_answers_end_at_the_stop(vlm: Any, docs: Any) -> None:
    tasks, said = SteeredTasks(vlm, progress=False), direct(vlm, docs, 0)
    assert tasks.generate_until(generations(docs, [0], until=said[1]), docs) == [said[: said.index(said[1])].strip()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Decoding(1024, (), None)),
        ({"until": None, "max_new_tokens": 7}, Decoding(7, (), None)),
        ({"until": "ASSISTANT:", "num_beams": 3}, Decoding(1024, ("ASSISTANT:",), None, 3)),
        ({"until": ["\n\n", "", "</s>"]}, Decoding(1024, ("</s>",), None)),
        ({"temperature": 0, "top_p": 0, "do_sample": False}, Decoding(1024, (), None)),
        ({"temperature": 0, "do_sample": True}, Decoding(1024, (), None)),
        ({"temperature": 0.7, "do_sample": False}, Decoding(1024, (), None)),
        ({"temperature": 0.7}, Decoding(1024, (), Sampling(3, 0.7))),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5}, Decoding(1024, (), Sampling(3, 1.0, 5, 0.9))),
        ({"do_sample": True, "top_p": None}, Decoding(1024, (), Sampling(3))),
        ({"repetition_penalty": 1.2}, Decoding(1024, (), None, 1, 1.2)),
    ],
)
def test_keywords_of_tasks(vlm: Any, given: dict[str, Any], expected: Decoding) -> None:
    assert SteeredTasks(vlm, seed=3).decoding(given) == expected


def test_a_blank_line_stops_only_when_asked(vlm: Any) -> None:
    tasks = SteeredTasks(vlm, stop_at_blank_line=True, max_new_tokens=9)
    assert tasks.decoding({"until": ["\n\n", "."]}) == Decoding(9, ("\n\n", "."), None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"until": 3}, "until is 3: expected a text or a list"),
        ({"until": [3]}, r"until is \[3\]"),
        ({"temperature": "hot"}, "temperature is 'hot': expected a number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: expected a whole number from 1 up"),
        ({"num_beams": 1.5}, "num_beams is 1.5: expected a whole number"),
        ({"num_beams": True}, "num_beams is True: expected a whole number"),
        ({"do_sample": True, "top_p": 2.0}, "top_p=2.0"),
    ],
)
def test_bad_keywords_are_refused(vlm: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SteeredTasks(vlm).decoding(given)


def test_unused_keywords_are_named(vlm: Any, docs: Any) -> None:
    with pytest.warns(UserWarning, match=r"\['image_aspect_ratio'\] are not used"):
        SteeredTasks(vlm, progress=False).generate_until(generations(docs, [0], image_aspect_ratio="pad"), docs)


def test_draws_come_from_the_seed(vlm: Any, docs: Any) -> None:
    # The same question eight times over, as lmms-eval's repeats ask it.
    requests = generations(docs, [1] * 8, do_sample=True, temperature=5.0, top_k=0)

    def drawn(seed: int) -> list[str]:
        return SteeredTasks(vlm, seed=seed, batch_size=3, progress=False).generate_until(requests, docs)

    state = torch.random.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == drawn(0) and first != drawn(1)
    assert len(set(first)) > 4


# -- likelihoods -----------------------------------------------------------------------------------------------------


def by_hand(docs: Any, row: int, continuation: str, add: torch.Tensor | None) -> tuple[list[float], bool]:
    """Log-probability of each token of a continuation, by one forward of a second model, and whether it is greedy."""
    model, processor = sp.pocket.load()
    doc = docs[TASK]["test"][row]
    text = rendered(processor, doc["question"])
    prompt = processor(images=[doc["image"]], text=text, return_tensors="pt")
    whole = processor(images=[doc["image"]], text=f"{text.rstrip()} {continuation}", return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :start], prompt["input_ids"])

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        out = hidden.clone()
        out[:, start - 1 :] += add
        return out

    with torch.no_grad(), plain_hooks(model, *([] if add is None else [("resid_post", 2, steer)])):
        logits = model(**whole).logits[0, start - 1 : -1].double()
    ids = whole["input_ids"][0, start:]
    chosen = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return chosen.tolist(), bool((logits.argmax(-1) == ids).all())


@pytest.mark.parametrize("steered", [False, True])
def test_likelihoods_are_those_of_a_plain_forward(vlm: Any, docs: Any, steering: Any, steered: bool) -> None:
    rows, test = [(0, " yes"), (1, "no"), (2, " yes, there is a dog"), (2, "no"), (5, "yes")], docs[TASK]["test"]
    requests = [Asked((test[row]["question"], text, visual, row, TASK, "test")) for row, text in rows]
    requests.append(Asked((test[3]["question"], lambda doc: doc["answer"], visual, 3, TASK, "test")))
    expected = [by_hand(docs, row, text.strip(), steering.vector if steered else None) for row, text in rows]
    expected.append(by_hand(docs, 3, test[3]["answer"], steering.vector if steered else None))
    own = steering if steered else None
    losses = SteeredTasks(vlm, own, batch_size=4, progress=False).loglikelihood(requests, docs)
    sums = SteeredTasks(vlm, own, likelihood="logprob", progress=False).loglikelihood(requests, docs)
    for (terms, greedy), loss, total in zip(expected, losses, sums, strict=True):
        assert loss == (pytest.approx(-sum(terms) / len(terms), rel=1e-3, abs=1e-4), greedy)
        assert total == (pytest.approx(sum(terms), rel=1e-3, abs=1e-4), greedy)
    assert {greedy for _, greedy in expected} == {True, False}
    assert max(len(terms) for terms, _ in expected) > 1


# -- what is refused -------------------------------------------------------------------------------------------------


def test_bad_options_are_refused_before_any_task(vlm: Any, steering: Any, tmp_path: Path) -> None:
    model, _ = sp.pocket.load()
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0: expected a whole number from 1 up"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"likelihood": "nll"}, "likelihood is 'nll': expected one of"),
        ({"steering": steering, "log": tmp_path / "log"}, "needs a note that names the steering"),
    ):
        with pytest.raises(InputError, match=message):
            SteeredTasks(vlm, **options)
    with pytest.raises(InputError, match="need the model's processor"):
        SteeredTasks(sp.attach(model))


def test_other_things_than_pictures_are_refused(vlm: Any, docs: Any) -> None:
    text, given, _, number, task, split = generations(docs, [4])[0].args
    film = Asked((text, given, lambda doc: ["film.mp4"], number, task, split))
    with pytest.raises(InputError, match="document 4 of task 'existence' shows a str: expected PIL pictures"):
        SteeredTasks(vlm, progress=False).generate_until([film], docs)


def test_continuations_that_cannot_be_scored_are_refused(vlm: Any, docs: Any) -> None:
    tasks = SteeredTasks(vlm, progress=False)
    with pytest.raises(InputError, match="without a document"):
        tasks.loglikelihood([Asked(("", "yes"))], docs)
    for target, shown in ((lambda doc: 1, "1"), (" ", "' '")):
        with pytest.raises(InputError, match=f"document 0 of task 'existence' continues with {shown}: expected a text"):
            tasks.loglikelihood([Asked(("?", target, visual, 0, TASK, "test"))], docs)


def test_without_lmms_eval(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    with pytest.raises(FrameworkError, match=r"pip install 'steer-plugin\[lmms\]'.*--no-deps 'lmms-eval>=0.7.3'"):
        steered_lmm(vlm)


# -- resuming --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The run ends here."""


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_a_killed_run_resumes(
    vlm: Any, docs: Any, steering: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    test = docs[TASK]["test"]
    requests = generations(docs, range(7)) + generations(docs, [2, 2])
    if kind == "loglikelihood":
        requests = [Asked((test[row]["question"], "yes", visual, row, TASK, "test")) for row in [*range(7), 2, 2]]
    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    whole = getattr(SteeredTasks(vlm, steering, **options), kind)(requests, docs)
    options |= {"log": tmp_path / "run", "note": {"steering": "ones"}}
    calls, own = [0], type(vlm).inputs

    def inputs(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return own(self, *args)

    monkeypatch.setattr(type(vlm), "inputs", inputs)
    with pytest.raises(Killed):
        getattr(SteeredTasks(vlm, steering, **options), kind)(requests, docs)
    with (tmp_path / f"run.{kind}.jsonl").open("ab") as file:
        file.write(b'{"id": "half a li')
    resumed = SteeredTasks(vlm, steering, **options)
    assert getattr(resumed, kind)(requests, docs) == whole
    assert calls[0] == 3 + 3  # of five batches two were done, and the third was broken off
    assert getattr(resumed, kind)(requests, docs) == whole
    assert calls[0] == 3 + 3
    options["note"] = {"steering": "others"}
    with pytest.raises(JobError, match="another job"):
        getattr(SteeredTasks(vlm, steering, **options), kind)(requests, docs)


# -- lmms-eval itself ------------------------------------------------------------------------------------------------

UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def choices(doc):
    return ["yes", "no"]
"""
YAML = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {table}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
{rest}metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs two small local tasks in lmms-eval: one generates, one chooses."""
    datasets = pytest.importorskip("datasets")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = importlib.import_module("lmms_eval.evaluator")
            tasks = importlib.import_module("lmms_eval.tasks")
    except ImportError as error:
        pytest.skip(f"lmms-eval is not installed here ({error}): its requirements do not go with these pins")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": q.image, "question": q.text, "answer": "yes" if q.label else "no"}
        for q in sp.pocket.World(0).questions(10)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "rows.parquet"))
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    generating = "generation_kwargs:\n  max_new_tokens: 6\n  until: ['.']\n"
    for name, kind, rest, metric in (
        ("pocket_answer", "generate_until", generating, "exact_match"),
        ("pocket_choice", "multiple_choice", "doc_to_choice: !function utils.choices\n", "acc"),
    ):
        text = YAML.format(
            name=name, kind=kind, rest=rest, metric=metric, table=folder / "rows.parquet", cache=folder / "cache"
        )
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def run(model: Any) -> dict[str, float]:
        manager = tasks.TaskManager("ERROR", include_path=str(folder), model_name="steer_plugin")
        found = evaluator.simple_evaluate(
            model=model, tasks=["pocket_answer", "pocket_choice"], task_manager=manager, bootstrap_iters=0
        )["results"]
        return {
            "answer": found["pocket_answer"]["exact_match,none"],
            "choice": found["pocket_choice"]["acc,none"],
        }

    return run


@pytest.fixture
def whole_state() -> Iterator[None]:
    """Put back what lmms-eval changes of the process: it turns gradients and seeds as it likes."""
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_state")
def test_lmms_eval_scores_a_steered_model(vlm: Any, steering: Any, evaluate: Callable[..., Any]) -> None:
    asked = sp.pocket.World(0).questions(10)
    inputs = vlm.inputs([q.text for q in asked], [q.image for q in asked])
    shares: list[float] = []
    for own in (None, steering):
        ids = vlm.generate(**inputs, steering=own, max_new_tokens=6, do_sample=False)
        said = [text.split(".")[0].strip() for text in vlm.decode(ids[:, inputs["input_ids"].shape[1] :])]
        share = sum(text == ("yes" if q.label else "no") for text, q in zip(said, asked, strict=True)) / len(asked)
        found = evaluate(steered_lmm(vlm, own, batch_size=7, progress=False))
        # The pocket model says one word: the likelier choice is what it says.
        assert found == {"answer": pytest.approx(share), "choice": pytest.approx(share)}
        shares.append(share)
    assert shares[0] != shares[1]


@pytest.mark.slow
@pytest.mark.usefixtures("evaluate")
def test_lmms_eval_keeps_steerings_apart_and_several_rounds_are_refused(vlm: Any, steering: Any) -> None:
    one, other = steered_lmm(vlm, steering), steered_lmm(vlm)
    assert str(one) != str(other) and str(one) == str(one)
    with pytest.raises(FrameworkError, match="1 requests of several rounds"):
        one.generate_until_multi_round([Asked(())])
    one.clean()
    assert one.tasks.vlm is vlm
