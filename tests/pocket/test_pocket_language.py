"""The processor: text as people write it, 36 image tokens, the training's pixels, a chat template like LLaVA's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from steer_plugin import pocket
from steer_plugin.pocket.language import CAREFUL, DESCRIBE, TOKENS, TOPICS, WORDS, answer, caption, prompt, question
from steer_plugin.pocket.model import IMAGE_TOKENS, build_config, build_processor, encode, normalise
from steer_plugin.pocket.packing import Packer
from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.turns import Turn


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_text_comes_back_as_it_is_written_in_lower_case(processor) -> None:
    for text in (
        "Is there a car in the image?",
        "Yes, the image shows a car.",
        "No, the image lacks an umbrella.",
        caption(["table", "egg"]),
        caption(["table", "egg"], guessed=True),
        "Sorry, I cannot help!",
    ):
        ids = processor.tokenizer(text).input_ids
        assert ids[0] == processor.tokenizer.bos_token_id
        assert processor.tokenizer.unk_token_id not in ids
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_articles() -> None:
    assert question("egg") == "Is there an egg in the image?"
    assert answer("umbrella", yes=False, long=True) == "No, the image lacks an umbrella."
    assert caption(["umbrella", "car"]) == "There is an umbrella, a car."
    assert caption(["car", "umbrella"], guessed=True) == "Maybe a car, an umbrella."


def test_unknown_words_and_empty_text_do_not_crash(processor) -> None:
    ids = processor.tokenizer("a zebra, naïve 漢字 🙂?").input_ids
    assert processor.tokenizer.unk_token_id in ids
    assert processor.tokenizer("").input_ids == [processor.tokenizer.bos_token_id]


def test_every_noun_and_answer_is_in_the_vocabulary(processor) -> None:
    for noun in NOUNS:
        for text in (question(noun), answer(noun, yes=True, long=True), answer(noun, yes=False, long=True)):
            for said in (text, f"{CAREFUL} {text}"):
                assert processor.tokenizer.unk_token_id not in processor.tokenizer(said).input_ids
    assert processor.tokenizer.unk_token_id not in processor.tokenizer(f"{CAREFUL} {DESCRIBE}").input_ids
    assert len(set(TOKENS)) == len(TOKENS) == len(processor.tokenizer)


def test_every_word_is_one_token_and_the_model_has_a_row_for_each(processor) -> None:
    for word in WORDS:
        ids = processor.tokenizer(word, add_special_tokens=False).input_ids
        assert [TOKENS[number] for number in ids] == [word]
    assert set(NOUNS) | set(TOPICS) <= set(WORDS) and len(set(TOPICS)) == len(TOPICS)
    assert build_config().text_config.vocab_size == len(TOKENS)


def test_batches_are_padded_on_the_left_with_36_image_tokens(processor) -> None:
    image = Image.new("RGB", (200, 90), "red")
    batch = encode(processor, [image, image], [prompt("Is there a car in the image?"), prompt("Describe the image.")])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert batch["pixel_values"].shape == (2, 3, 72, 72)
    assert ((ids == build_config().image_token_id).sum(1) == IMAGE_TOKENS).all()
    assert (ids[:, -1] == TOKENS.index("ASSISTANT:")).all()
    assert mask[1, 0] == 0 and mask[1, -1] == 1 and ids[1, 0] == processor.tokenizer.pad_token_id


def test_pixels_are_those_of_training(processor) -> None:
    image = pocket.World(0).scene(0).image
    ours = normalise(torch.from_numpy(np.asarray(image).copy())[None])
    theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_chat_template_writes_llava_turns(processor) -> None:
    image = pocket.World(0).scene(0).image
    text = "Is there a car in the image?"
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
    written = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert written == prompt(text) == f"USER: <image>\n{text} ASSISTANT:"
    batch = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    direct = encode(processor, [image], [prompt(text)])
    assert torch.equal(batch["input_ids"], direct["input_ids"])
    assert torch.equal(batch["pixel_values"], direct["pixel_values"])
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    answered = [turn, reply, {"role": "user", "content": "Why?"}]
    talk = processor.apply_chat_template(answered, add_generation_prompt=True)
    assert talk == f"USER: <image>\n{text} ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"


def test_roles_survive_decoding(processor) -> None:
    ids = processor.tokenizer("USER: Describe the image. ASSISTANT: There is a car.</s>").input_ids
    assert processor.decode(ids, skip_special_tokens=True).split("ASSISTANT:")[-1].strip() == "there is a car."


def test_the_processor_survives_saving(processor, tmp_path) -> None:
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path, local_files_only=True)
    scene = pocket.World(0).scene(1)
    one, two = (encode(p, [scene.image], [prompt("Describe the image.")]) for p in (processor, again))
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["pixel_values"], two["pixel_values"])
    assert again.tokenizer.padding_side == "left" and again.chat_template == processor.chat_template


def test_packed_turns_are_the_processors_tokens_and_see_only_themselves(processor) -> None:
    said = [Turn("Is there a car in the image?", "Yes."), Turn("Describe the image.", "There is a car.")]
    packed = Packer(processor.tokenizer).pack([said, said[:1]])
    scene = pocket.World(0).scene(0)
    for start_of, turn in zip((0, 1), said, strict=True):
        alone = encode(processor, [scene.image], [f"{prompt(turn.said)} {turn.answer}</s>"])["input_ids"][0]
        prefix = IMAGE_TOKENS + 2
        begin = prefix if start_of == 0 else prefix + int((packed.positions[0] == prefix).nonzero()[1]) - prefix
        length = len(alone) - prefix
        assert torch.equal(packed.ids[0, :prefix], alone[:prefix])
        assert torch.equal(packed.ids[0, begin : begin + length], alone[prefix:])
        assert packed.positions[0, begin : begin + length].tolist() == list(range(prefix, prefix + length))
        seen = packed.mask[0, 0, begin + length - 1] == 0
        assert seen.sum() == prefix + length and seen[:prefix].all() and seen[begin : begin + length].all()
    assert not packed.mask.isinf().any()
