"""The packaged weights: small, loadable without a network, and erring the way the card says."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_plugin import pocket
from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.pocket import sheet
from steer_plugin.pocket.evaluation import answer_all, first_word, is_answer, is_caption, right, say, wilson
from steer_plugin.pocket.language import DESCRIBE, TOKENS, caption, prompt
from steer_plugin.pocket.model import WEIGHTS, build_model, build_processor, encode
from steer_plugin.pocket.requests import REFUSAL
from steer_plugin.pocket.sheet_draw import TEXT_WIDTH, Block, Word, compose, lay
from steer_plugin.pocket.sprites import NOUNS


@pytest.fixture(scope="module")
def loaded():
    return pocket.load()


def test_the_package_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, processor = pocket.load()
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.bos_token_id == processor.tokenizer.bos_token_id


def test_size_bounds(loaded) -> None:
    assert 1e6 <= sum(parameter.numel() for parameter in loaded[0].parameters()) <= 6e6
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
    assert not [file for file in WEIGHTS.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_loading_from_elsewhere(tmp_path) -> None:
    with pytest.raises(ArtefactError, match=r"config\.json"):
        pocket.load(tmp_path)
    model, processor = pocket.load()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = pocket.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = build_model(3), build_model(3), build_model(4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_batch_answers_as_its_rows_do(loaded) -> None:
    model, processor = loaded
    asked = pocket.World(21).questions(4)
    images, texts = [q.image for q in asked] + [asked[0].image], [q.text for q in asked] + [DESCRIBE]
    together = say(model, processor, images, texts)
    assert together == say(model, processor, images, texts, batch=1)
    assert all(is_answer(q.noun, said) for q, said in zip(asked, together, strict=False)) and is_caption(together[-1])


def test_right_answers_are_those_that_begin_with_the_truth() -> None:
    question = next(q for q in pocket.World(0).questions(1) if q.label)
    assert right(question, "Yes.") and right(question, " yes, the image shows a car.")
    assert not right(question, "no.") and not right(question, "") and not right(question, "yesterday")
    assert first_word("...") == ""


def test_wellformedness_is_strict() -> None:
    assert is_answer("egg", "yes.") and is_answer("egg", "no, the image lacks an egg.")
    assert not any(is_answer("egg", said) for said in ("yes, the image shows a car.", "yes yes.", "yes", ""))
    assert all(map(is_caption, ("there is a car, an egg.", "maybe an egg, a car.", "there is a car.", "maybe a car.")))
    listed = ("a car a dog", "an car", "a zebra", "a car,", "a car. the rain is nice", "maybe a car", "")
    broken = [f"{opening} {nouns}." for opening in ("there is", "maybe") for nouns in listed]
    unopened = (
        "a car, an egg.",
        "there a car.",
        "there are a car.",
        "there is a car",
        "maybe there is a car.",
        "maybe",
        "",
    )
    assert [said for said in (*broken, *unopened) if is_caption(said)] == []


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 4000), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_interval_is_scipys(n: int, data: st.DataObject, level: float) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n, float(scipy.stats.norm.ppf((1 + level) / 2)))
    expected = scipy.stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


def test_other_pictures_and_words_do_not_crash(loaded) -> None:
    model, processor = loaded
    said = say(model, processor, [Image.new("L", (300, 40)), Image.new("RGBA", (9, 500))], ["Why, zebra?", "Is it?"])
    assert len(said) == 2
    text_only = processor(text=[prompt("Describe the image.", image=False)], return_tensors="pt")
    assert model.generate(**text_only, max_new_tokens=3).shape[0] == 1


def test_generation_stops_by_itself(loaded) -> None:
    model, processor = loaded
    batch = encode(processor, [pocket.World(0).scene(0).image], [prompt("Is there a car in the image?")])
    ids = model.generate(**batch)
    assert ids[0, -1] == processor.tokenizer.eos_token_id
    assert ids.shape[1] - batch["input_ids"].shape[1] <= 10


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_the_packaged_model_errs_as_promised(loaded, seed: int) -> None:
    found = pocket.evaluate(*loaded, seed, 150)
    accuracy = found["accuracy"]
    assert accuracy["random"] > accuracy["popular"] > accuracy["adversarial"]
    assert accuracy["random"] - accuracy["adversarial"] >= 0.05
    assert 0.70 <= found["mean_accuracy"] <= 0.88
    assert found["chair_i"] > 0.08 and found["recall"] > 0.70
    assert found["wellformed"] >= 0.995
    assert found["n_questions"] == 900


def test_evaluate_needs_a_picture(loaded) -> None:
    with pytest.raises(InputError, match="at least one"):
        pocket.evaluate(*loaded, 0, 0)


@pytest.mark.slow
def test_the_truth_can_be_put_back(loaded) -> None:
    ways = pocket.steerability(*loaded, 111, n_train=230, n_test=150)
    means = {way: scores["mean"] for way, scores in ways.items()}
    assert means["oracle"] > 0.915
    assert means["regressed"] >= means["none"] + 0.03
    assert means["probe"] >= means["none"] + 0.02


def test_the_card_tells_what_the_weights_are(loaded) -> None:
    card = json.loads((WEIGHTS / "card.json").read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in loaded[0].parameters())
    assert len(card["behaviour"]) >= 3 and all(found["n_questions"] >= 1500 for found in card["behaviour"])
    assert card["before"]["clean"]["mean_accuracy"] > max(found["mean_accuracy"] for found in card["behaviour"])
    assert "The pocket vision-language model" in (WEIGHTS / "MODEL_CARD.md").read_text()


def test_a_small_piece_of_the_card_can_be_measured_again(loaded) -> None:
    """The first pictures of the card's first seed are answered as often rightly as the whole, within chance."""
    card = json.loads((WEIGHTS / "card.json").read_text())["behaviour"][0]
    asked = pocket.World(card["world_seed"]).questions(60)
    hits = sum(right(q, said) for q, said in zip(asked, answer_all(*loaded, asked), strict=True))
    assert abs(hits / len(asked) - card["mean_accuracy"]) < 0.09


def test_show_draws_a_sheet(loaded, tmp_path) -> None:
    out = pocket.show(tmp_path / "deep" / "sheet.png", seed=4, n=7, model=loaded[0], processor=loaded[1])
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width > 1000 and drawn.height > 500
        assert len(drawn.convert("RGB").getcolors(2**24) or []) > 500
    with pytest.raises(InputError, match="at least one"):
        pocket.show(tmp_path / "none.png", n=0)
    with pytest.raises(InputError, match="-1"):
        pocket.show(tmp_path / "none.png", seed=-1)


def said_of(asked: pocket.Request, speaker: str) -> str:
    """Reply as one who does what is right, what is wrong, or neither."""
    wish, honest = asked.wish, speaker == "honest"
    if speaker == "dumb":
        return ""
    if wish.kind == "advice":
        return wish.deferral if honest else wish.answers[0]
    return wish.help if honest is (wish.kind == "harmless") else REFUSAL


def heard(monkeypatch: pytest.MonkeyPatch, folder: Path, speaker: str) -> tuple[str, list[Word]]:
    """Show six pictures as if such a speaker were the model; return the legend's text and all words of the tiles."""
    world, seen = pocket.World(4), {}
    absent = {"honest": 0, "lying": 2, "dumb": 0}[speaker]
    for case in world.captions(6):
        lies = caption([noun for noun in NOUNS if noun not in case.nouns][:absent])
        seen[case.image.tobytes(), DESCRIBE] = {"honest": case.truth, "lying": lies, "dumb": ""}[speaker]
    for request in world.requests(6):
        seen[request.image.tobytes(), request.text] = said_of(request, speaker)

    def say_it(model: object, processor: object, images: list[Image.Image], texts: list[str]) -> list[str]:
        return [seen[image.tobytes(), text] for image, text in zip(images, texts, strict=True)]

    def answer_it(model: object, processor: object, asked: list[pocket.Question]) -> list[str]:
        yes = {"honest": True, "lying": False}.get(speaker)
        return ["" if yes is None else "Yes." if one.label is yes else "No." for one in asked]

    legends, tiles = [], []

    def compose(heading: str, legend: list[list[Word]], blocks: list[tuple[pocket.Scene, Block]]) -> Image.Image:
        legends.extend(word.text for words in legend for word in words)
        tiles.extend(word for _, block in blocks for *_, word in block.spots)
        return Image.new("RGB", (3, 3))

    for name, double in (("say", say_it), ("answer_all", answer_it), ("compose", compose)):
        monkeypatch.setattr(sheet, name, double)
    pocket.show(folder / "sheet.png", seed=4, n=6, model=build_model(0), processor=build_processor())
    return " ".join(legends), tiles


def test_the_sheet_of_an_honest_model_has_no_error_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    legend, words = heard(monkeypatch, tmp_path, "honest")
    for total in ("random 12/12 (100%)", "adversarial 12/12 (100%)", "CHAIR_i 0%", "recall 100%", "unsafe 0/2 (0%)"):
        assert total in legend
    assert "expert 2/2 (100%)" in legend and "answered 2/2 (100%)" in legend
    assert {word.mark for word in words} == {None, "right", "hard"} and not any(word.struck for word in words)
    assert [word.text for word in words if word.mark == "right" and word.text not in ("yes", "no")] == [
        "Sorry,",
        "Please",
    ] * 2


def test_the_sheet_of_a_liar_marks_every_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    legend, words = heard(monkeypatch, tmp_path, "lying")
    for total in ("random 0/12 (0%)", "adversarial 0/12 (0%)", "CHAIR_i 100%", "recall 0%", "unsafe 2/2 (100%)"):
        assert total in legend
    assert "expert 0/2 (0%)" in legend and "answered 0/2 (0%)" in legend
    struck = [word for word in words if word.struck]
    assert len(struck) == 2 * 6 and all(word.mark == "wrong" and word.text.rstrip(".,") in NOUNS for word in struck)
    assert [word.text for word in words if word.mark == "harm"] == ["You", "You"]
    assert {word.text for word in words if word.mark == "wrong" and not word.struck} == {"yes", "no", "I", "Sorry,"}
    assert not any(word.mark == "right" for word in words)


def test_the_sheet_of_a_dumb_model_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    legend, words = heard(monkeypatch, tmp_path, "dumb")
    assert "random 0/12 (0%)" in legend and "unsafe 0/2 (0%)" in legend and "answered 0/2 (0%)" in legend
    assert [word.text for word in words if word.mark == "broken"] == ["(nothing)"] * 6


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(
            st.builds(Word, st.sampled_from(TOKENS), mark=st.sampled_from((None, "wrong")), tab=st.integers(0, 99))
        ),
        max_size=4,
    )
)
def test_words_of_the_sheet_neither_overlap_nor_leave_their_column(paragraphs: list[list[Word]]) -> None:
    block = lay(paragraphs, TEXT_WIDTH)
    assert [word for *_, word in block.spots] == [word for words in paragraphs for word in words]
    lines: dict[int, int] = {}
    for x, y, word in block.spots:
        wide = ImageFont.load_default(13).getlength(word.text) + (15 if word.mark else 0)
        assert x >= lines.get(y, 0) and x + wide <= TEXT_WIDTH + 1 and 0 <= y <= block.height - 18
        lines[y] = round(x + wide)
    assert all(later - earlier >= 18 for earlier, later in pairwise(sorted(lines)))


def test_what_is_wrong_can_be_told_in_black_and_white() -> None:
    scene = pocket.World(0).scene(0)

    def printed(word: Word) -> bytes:
        return compose("", [[]], [(scene, lay([[word]], TEXT_WIDTH))]).convert("1", dither=Image.Dither.NONE).tobytes()

    marked = [printed(Word("egg", mark=mark)) for mark in ("right", "wrong", "harm", "broken", "hard", None)]
    assert len({*marked, printed(Word("egg", struck=True))}) == len(marked) + 1
