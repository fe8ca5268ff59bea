from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_plugin.demo.judge import PocketJudge, pocket_item
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.judges import (
    EXCHANGE,
    QUALITY,
    STANCE,
    Judge,
    Judged,
    LlamaGuardJudge,
    OpenAIJudge,
    PhraseJudge,
    Verdict,
    VerdictLog,
    verdicts,
)
from steer_plugin.evaluation.judges._score import read_score
from steer_plugin.evaluation.judges.base import filled
from steer_plugin.pocket import World

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", "safe", "unsafe", "[U]", "[A]", "how", "rope", "no")
CHAT = (
    "<s> {% for m in messages %}{% if m['role'] == 'user' %}[U] {% else %}[A] {% endif %}{{ m['content'] | trim }} "
    "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
PARTS_CHAT = CHAT.replace("{{ m['content'] | trim }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
ITEMS = [
    Judged("a", "how", "rope rope rope no"),
    Judged("b", "no how", "no"),
    Judged("c", "how how", "rope no rope how no rope"),
]


def guard_tokenizer(chat: str | None = CHAT, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # It prefers the right side: the judge must not.
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="right", chat_template=chat,
    )  # fmt: skip


def guard_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def by_hand(model: LlamaForCausalLM, text: str) -> torch.Tensor:
    """Softmax behind the last word of a text, one row, no padding, ids looked up in the list of words."""
    with torch.no_grad():
        logits = model(torch.tensor([[WORDS.index(word) for word in text.split()]])).logits[0, -1].double()
    return logits.exp() / logits.exp().sum()


def test_the_guards_score_is_the_probability_of_its_token():
    model = guard_model()
    judge = LlamaGuardJudge(model, guard_tokenizer())
    found = judge.judge(ITEMS)
    for item, verdict in zip(ITEMS, found, strict=True):
        prompt = f"<s> [U] {item.answer} [A]"
        expected = by_hand(model, prompt)
        assert verdict.prompt == prompt
        assert verdict.score == pytest.approx(float(expected[7]), abs=1e-6)
        each = verdict.detail["probabilities"]
        assert each == pytest.approx({"safe": float(expected[6]), "unsafe": float(expected[7])}, abs=1e-6)
        assert verdict.raw.split()[:1] == [WORDS[int(expected.argmax())]] or int(expected.argmax()) < 4
    assert len({round(verdict.score, 4) for verdict in found}) == 3


def test_a_guards_batches_say_what_single_rows_say():
    model, tokenizer = guard_model(), guard_tokenizer()
    alone = LlamaGuardJudge(model, tokenizer, batch_size=1).judge(ITEMS)
    together = LlamaGuardJudge(model, tokenizer, batch_size=3).judge(ITEMS)
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-6)
    assert [one.raw for one in together] == [one.raw for one in alone]


@pytest.mark.parametrize(
    ("chat", "template", "prompt"),
    [
        (CHAT, EXCHANGE, "<s> [U] how [A] rope rope rope no [A]"),
        (PARTS_CHAT, EXCHANGE, "<s> [U] how [A] rope rope rope no [A]"),
        (None, EXCHANGE, "user: how\nassistant: rope rope rope no\nassistant:"),
        (CHAT, "how {answer} safe", "how rope rope rope no safe"),
    ],
)
def test_guard_templates(chat: str | None, template: str, prompt: str):
    model = guard_model()
    judge = LlamaGuardJudge(model, guard_tokenizer(chat), "safe", template)
    (verdict,) = judge.judge(ITEMS[:1])
    assert verdict.prompt == prompt
    read = prompt if prompt.startswith("<s>") else f"<s> {prompt}"
    assert verdict.score == pytest.approx(float(by_hand(model, read)[6]), abs=1e-6)


def test_a_guards_opening_stands_before_its_verdict():
    model = guard_model()
    (verdict,) = LlamaGuardJudge(model, guard_tokenizer(), opening=" no").judge(ITEMS[:1])
    assert verdict.score == pytest.approx(float(by_hand(model, "<s> [U] rope rope rope no [A] no")[7]), abs=1e-6)


def test_a_guards_settings_tell_jobs_apart():
    model, tokenizer = guard_model(), guard_tokenizer()
    first = LlamaGuardJudge(model, tokenizer).settings()
    assert first == LlamaGuardJudge(model, tokenizer, batch_size=2).settings()
    assert first != LlamaGuardJudge(model, tokenizer, "safe").settings()
    assert first != LlamaGuardJudge(model, tokenizer, template=EXCHANGE).settings()
    assert first != LlamaGuardJudge(model, guard_tokenizer(PARTS_CHAT)).settings()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert first != LlamaGuardJudge(model, tokenizer).settings()


def test_guard_errors():
    model, tokenizer = guard_model(), guard_tokenizer()
    with pytest.raises(InputError, match="begin with the same token, 'safe'"):
        LlamaGuardJudge(model, tokenizer, "safe how", words=("safe", "safe how"))
    with pytest.raises(InputError, match="no token for 'wicked'"):
        LlamaGuardJudge(model, tokenizer, "wicked", words=("safe", "wicked"))
    with pytest.raises(InputError, match="must be one of words"):
        LlamaGuardJudge(model, tokenizer, "no")
    with pytest.raises(InputError, match="'a' has 46 tokens"):
        LlamaGuardJudge(model, tokenizer).judge([Judged("a", "how", "no " * 43)])
    with pytest.raises(InputError, match="answer is missing"):
        LlamaGuardJudge(model, guard_tokenizer("<s> [U]")).judge(ITEMS)
    with pytest.raises(InputError, match=r"names \{categry\}.*Did you mean 'category'"):
        LlamaGuardJudge(model, tokenizer, template="{categry}").judge([replace(ITEMS[0], extras={"category": "x"})])
    with pytest.raises(InputError, match="training mode"):
        LlamaGuardJudge(model.train(), tokenizer).judge(ITEMS)


def test_phrases():
    some, share = PhraseJudge(["Rope", "a match", "rope"]), PhraseJudge(["Rope", "a match"], "share")
    item = Judged("x", "how?", "With a ROPE.")
    assert some.judge([item]) == [Verdict("x", 1.0, "rope", "With a ROPE.", {"found": 1})]
    assert share.judge([item])[0].score == 0.5
    assert some.judge([replace(item, answer="no")])[0].score == 0.0
    assert some.settings() != share.settings()
    for bad in ([], ["a", " "], "rope"):
        with pytest.raises(InputError, match="phrases must list"):
            PhraseJudge(bad)
    with pytest.raises(InputError, match="rule must be"):
        PhraseJudge(["a"], "all")


def test_expert_deferral():
    judge = PhraseJudge.expert_deferral()
    assert len(judge.phrases) == 57
    said = ["You should Consult A Financial Expert.", "Buy it, it is cheap.", "Please seek help"]
    assert [one.score for one in judge.judge([Judged(str(i), "q", a) for i, a in enumerate(said)])] == [1, 0, 1]


def test_the_shipped_phrases_are_the_published_ones(shared: Path):
    shipped = Path(sys.modules[PhraseJudge.__module__].__file__ or "").with_name("ed_phrases.json")
    assert json.loads(shipped.read_bytes()) == json.loads((shared / "data" / "ed_phrases.json").read_bytes())


WORLD = World(3)


def scores(pairs: list[tuple[object, str]]) -> list[float]:
    items = [pocket_item(case, said, f"i{i}") for i, (case, said) in enumerate(pairs)]  # pyright: ignore
    return [one.score for one in PocketJudge(WORLD).judge(items)]


def test_the_world_judges_questions_and_captions():
    yes, no = WORLD.questions(1, subsets=("random",))
    assert (yes.label, no.label) == (True, False)
    assert scores([(yes, "yes."), (yes, "no."), (no, "no."), (no, "yes, the image shows it."), (no, "rope")]) == [
        1, 0, 1, 0, 0,
    ]  # fmt: skip
    case = next(one for one in WORLD.captions(20) if one.missing)
    true, guess, empty = scores([(case, case.truth), (case, case.tempting), (case, "there is nothing.")])
    share = len(case.nouns) / (len(case.nouns) + len(case.missing))
    assert (true, empty) == (1.0, 0.0)
    assert guess == pytest.approx(2 * share / (share + 1))


def test_the_world_judges_requests_and_stances():
    asked = {one.kind: one for one in WORLD.requests(1)}
    refusal = "Sorry, I cannot help."
    harmful, advice, harmless = asked["harmful"], asked["advice"], asked["harmless"]
    wrong = next(one for one in ("doctor", "banker") if one != advice.wish.expert)
    assert scores([(harmful, refusal), (harmful, harmful.wish.help), (harmful, "sorry sorry")]) == [1, 0, 0]
    assert scores([(advice, advice.wish.deferral), (advice, advice.wish.answers[0])]) == [1, 0]
    assert scores([(advice, f"please ask a {wrong}.")]) == [0]
    assert scores([(harmless, harmless.wish.help), (harmless, refusal)]) == [1, 0]
    (case,) = WORLD.stances(1)
    assert scores([(case, case.answer), (case, f"there is a dog. {case.pair.converse.closing}")]) == [1, 0]
    (equal,) = WORLD.stances(1, kinds=("equal",))
    assert scores([(equal, equal.answer), (equal, f"{equal.answer} {equal.pair.target.closing}")]) == [1, 0]
    (verdict,) = PocketJudge(WORLD).judge([pocket_item(harmful, harmful.wish.help)])
    assert verdict.detail == {"outcome": "obeyed", "unsafe": True, "expert": False, "wellformed": True}


def test_the_world_refuses_what_it_did_not_draw():
    (case,) = WORLD.captions(1)
    item = pocket_item(case, "there is a dog.")
    with pytest.raises(InputError, match="none of World"):
        PocketJudge(World(4)).judge([item])
    with pytest.raises(InputError, match="as World"):
        PocketJudge(WORLD).judge([replace(item, image=WORLD.scene(1).image)])
    with pytest.raises(InputError, match="Make items with pocket_item"):
        PocketJudge(WORLD).judge([Judged("x", "q", "a")])
    (stance,) = WORLD.stances(1)
    extras = {key: value for key, value in pocket_item(stance, "a").extras.items() if key != "loved"}
    with pytest.raises(InputError, match="lacks 'loved'"):
        PocketJudge(WORLD).judge([replace(pocket_item(stance, "a"), extras=extras)])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7), ("fine.\n**Score:** 7.5/10\n", 7.5), ('{"score": 3}', 3), ("Score (0-10): 4", 4), ("8", 8),
        ("Good, with 3 faults.\n9/10.", 9), ("Score: 2. No: score: 6", 6), ("score = 0", 0), ("Score is **10**.", 10),
    ],
)  # fmt: skip
def test_scores_are_read(text: str, score: float):
    assert read_score(text, 0, 10) == (score, None)


@pytest.mark.parametrize(
    "text",
    ["", "none", "It has 3 faults.", "Score: 7-8", "3 faults. Score: 7.5-8", "Score: 70/100", "Score: 95", "Score: -1",
     "6 or 7", "gpt-4", "Score: high\n"],
)  # fmt: skip
def test_scores_are_not_guessed(text: str):
    score, reason = read_score(text, 0, 10)
    assert score != score
    assert reason


def test_every_judge_has_the_interface():
    judges = [
        PhraseJudge(["a"]),
        PocketJudge(WORLD),
        LlamaGuardJudge(guard_model(), guard_tokenizer()),
        OpenAIJudge("m", "http://localhost/v1"),
    ]
    for judge in judges:
        assert isinstance(judge, Judge)
        assert json.loads(json.dumps(judge.settings())) == judge.settings()


def test_rubrics_can_be_filled():
    item = Judged("x", "how?", "so {it} goes", extras={"target": "be kind", "converse": "be rude"})
    for rubric in (QUALITY, STANCE):
        assert "so {it} goes" in filled(rubric, item, low="0", high="10")
    with pytest.raises(InputError, match="braces"):
        filled("{answer} {", item)


class Counting:
    """Scores by length; counts what it was asked, and fails at one item."""

    name, batch_size = "counting", 2

    def __init__(self, fails: str = "") -> None:
        self.asked: list[str] = []
        self.fails = fails

    def settings(self) -> dict[str, str]:
        return {"unit": "letters"}

    def judge(self, items: list[Judged]) -> list[Verdict]:
        if any(item.id == self.fails for item in items):
            raise JobError("stopped")
        self.asked += [item.id for item in items]
        return [Verdict(one.id, float(len(one.answer) or "nan"), "", "") for one in items]


def test_a_log_is_resumed(tmp_path: Path):
    log = tmp_path / "new" / "v.jsonl"
    items = [Judged(str(i), "q", "x" * i) for i in range(5)]
    with pytest.raises(JobError, match="stopped"):
        verdicts(Counting("4"), items, log=log, progress=False)
    with log.open("ab") as file:
        file.write(b'{"item": "half')
    judge = Counting()
    found = verdicts(judge, [*items, items[1]], log=log, progress=False)
    assert judge.asked == ["4"]
    assert [one.score for one in found[1:]] == [1, 2, 3, 4, 1]
    assert found[0].score != found[0].score
    assert [json.loads(line).get("id") for line in log.read_text().splitlines()] == [None, *"01234"]
    again = Counting()
    verdicts(again, [*items, Judged("9", "q", "more")], log=log, progress=False)
    assert again.asked == ["9"]


def test_a_log_belongs_to_one_job(tmp_path: Path):
    log, items = tmp_path / "v.jsonl", [Judged("a", "q", "x")]
    verdicts(Counting(), items, log=log, job={"method": "none"}, progress=False)
    with pytest.raises(JobError, match=r"job\.method is 'none' there and 'l2s' here"):
        verdicts(Counting(), items, log=log, job={"method": "l2s"}, progress=False)
    with pytest.raises(JobError, match="another question, answer or picture"):
        verdicts(Counting(), [replace(items[0], answer="y")], log=log, job={"method": "none"}, progress=False)
    with pytest.raises(InputError, match="stands for two"):
        verdicts(Counting(), [*items, replace(items[0], image=WORLD.scene(0).image)], progress=False)
    with pytest.raises(InputError, match="nothing to judge"):
        verdicts(Counting(), [], progress=False)
    with pytest.raises(InputError, match="finite"):
        Verdict("a", float("inf"), "", "")
    with pytest.raises(InputError, match="cannot hold 'a'"):
        VerdictLog(tmp_path / "w.jsonl", {}).add(items, [Verdict("a", 1.0, "", "", {"x": float("nan")})])
    log.write_text("no log\n")
    with pytest.raises(JobError, match="is no log of verdicts"):
        VerdictLog(log, {})


KILLED = """
import sys, time
from pathlib import Path
from steer_plugin.evaluation.judges import Judged, PhraseJudge, verdicts

class Slow(PhraseJudge):
    def judge(self, items):
        time.sleep(0.02)
        return super().judge(items)

judge = Slow(["x"])
judge.batch_size = 1
verdicts(judge, [Judged(str(i), "q", "x") for i in range(400)], log=Path(sys.argv[1]), progress=False)
"""


def test_a_killed_run_loses_nothing_and_doubles_nothing(tmp_path: Path):
    log = tmp_path / "v.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(log)])
    deadline = time.monotonic() + 120
    while (not log.exists() or log.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    data = log.read_bytes()
    before = [json.loads(line)["id"] for line in data[: data.rfind(b"\n")].splitlines()[1:]]
    assert 4 <= len(before) < 400
    found = verdicts(PhraseJudge(["x"]), [Judged(str(i), "q", "x") for i in range(400)], log=log, progress=False)
    after = [json.loads(line)["id"] for line in log.read_text().splitlines()[1:]]
    assert after == [str(i) for i in range(400)]
    assert after[: len(before)] == before
    assert [one.id for one in found] == after
