"""A language of 268 words: <bos> "USER:" <image> x 36 question "ASSISTANT:" answer <eos>.

Text is lower-cased and split at blanks and punctuation; decoding puts no blank before punctuation; unknown words become
<unk>.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steer_plugin.pocket.sprites import NOUNS

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
BACKGROUND = "<background>"
DESCRIBE = "Describe the image."
CAREFUL = "Be careful."
SEEN, GUESSED = "There is", "Maybe"

# LLaVA 1.5's anatomy: pictures first, then text; finished answers are closed by </s>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_SPOKEN = ". , ? ! ' : ; - is there a an in the image yes no shows lacks describe be careful"
# Topics that stances are about; a held-out one is known as a word, only no method is fitted on it.
_TOPICS = """
cold heat rain noise sea dark crowd work snow wind sand smoke light mud fog ice dust forest city music silence speed
height storm night morning winter summer traffic desert school sport war garden river mountain beach village
"""
TOPICS: tuple[str, ...] = tuple(_TOPICS.split())
# Words of requests, advice and stances, and a few that nothing uses yet: more words would be another model.
_PLAIN = """
i you we he she it they me my your this that these those and or but not so if then than as at by for from of on to
with who what which how why when where can could will would should must may might do does did am are was were have has
had please sorry help think know see look picture photo good bad safe harmful unsafe true false sure unsure maybe
really very love hate nice awful happy sad joy pity loud soft wow hush like dislike great poor warm steal burn smash
poison hack bomb paint clean fix carry draw wrap rope match hammer pill wire fuse brush cloth glue cart pen paper cure
heal buy deal keep sue doctor banker lawyer expert ai ask answer refuse cannot using use make take put left right above
below big small red green blue yellow one two three four many few more less all none only also too again polite rude
formal short long tell show need want quick question give way enjoy adore fear loathe about world day never always
"""
WORDS: tuple[str, ...] = tuple(dict.fromkeys([*NOUNS, *_SPOKEN.split(), *TOPICS, *_PLAIN.split()]))
SPECIALS: tuple[str, ...] = (PAD, BOS, EOS, UNK, IMAGE, BACKGROUND)
TOKENS: tuple[str, ...] = (*SPECIALS, USER, ASSISTANT, *WORDS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; it pads on the left and opens every text with <s>."""
    numbers = {token: number for number, token in enumerate(TOKENS)}
    core = Tokenizer(models.WordLevel(numbers, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # WordPiece's decoder is the one that joins words by blanks and glues punctuation to the word before it.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, numbers[BOS])])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    # Roles stay visible when special tokens are skipped, so that text can be cut at "ASSISTANT:" as with LLaVA.
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in (USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def with_article(noun: str) -> str:
    """Put the right article before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def question(noun: str) -> str:
    """Ask for a noun."""
    return f"Is there {with_article(noun)} in the image?"


def answer(noun: str, *, yes: bool, long: bool) -> str:
    """Answer a question, in one word or in a sentence."""
    if not long:
        return "Yes." if yes else "No."
    return f"Yes, the image shows {with_article(noun)}." if yes else f"No, the image lacks {with_article(noun)}."


def caption(nouns: Sequence[str], *, guessed: bool = False) -> str:
    """List nouns as the pocket model's captions do; the opening says whether more is named than is seen."""
    return f"{GUESSED if guessed else SEEN} {', '.join(with_article(noun) for noun in nouns)}."


def prompt(text: str, *, image: bool = True) -> str:
    """Write a user turn as the chat template writes it, up to the place where the answer begins."""
    return f"{USER} {IMAGE}\n{text} {ASSISTANT}" if image else f"{USER} {text} {ASSISTANT}"
