"""How a family writes a turn of chat: the prompt with its pictures, the assistant's header, a forced completion.

All of it is taken from the processor's own chat template. Models without one (PaliGemma, base models) get the pictures'
placeholders and the prompt.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import PaliGemmaProcessor, ProcessorMixin

from steer_plugin.errors import InputError
from steer_plugin.family import Family

Ids = tuple[int, ...]


def chat_text(processor: ProcessorMixin, prompt: str, pictures: int, *, header: bool = True) -> str:
    """Render one user turn with its pictures and, with `header`, the open assistant turn."""
    if not templated(processor):
        return str(getattr(processor, "image_token", "<image>")) * pictures + prompt
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(pictures)]
    content.append({"type": "text", "text": prompt})
    message = [{"role": "user", "content": content}]
    # A template that only the tokenizer has is not found by the processor itself.
    own = getattr(processor, "chat_template", None) is not None
    more = {} if own else {"chat_template": cast("Any", processor).tokenizer.chat_template}
    # Declared for plain strings only; every processor takes the list of parts.
    rendered = cast("Any", processor).apply_chat_template(message, add_generation_prompt=header, tokenize=False, **more)
    return str(rendered)


def templated(processor: ProcessorMixin) -> bool:
    """Whether the processor (or its tokenizer) has a chat template."""
    tokenizer = getattr(processor, "tokenizer", None)
    return any(getattr(one, "chat_template", None) is not None for one in (processor, tokenizer))


def template_of(processor: ProcessorMixin) -> str:
    """Source of the chat template, "" where there is none."""
    found = getattr(processor, "chat_template", None)
    return str(found or getattr(getattr(processor, "tokenizer", None), "chat_template", None) or "")


def special_tokens(processor: ProcessorMixin, text: str) -> dict[str, bool]:
    """Keyword for the tokenizer: a template that writes the first token itself must not get it twice."""
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(str(bos)) else {}


def header_tokens(family: Family, processor: ProcessorMixin | None) -> tuple[Ids, ...] | None:
    """Token ids of the assistant's header, with and without a space in front; () where there is none to know.

    The header is what the chat template adds for generation; None when it adds nothing (Mistral's [/INST] ends the
    user's turn): the user's turn then ends with the prompt.
    """
    tokenizer = cast("Any", getattr(processor, "tokenizer", None))
    if processor is None or tokenizer is None:
        return ()
    texts = family.assistant_headers
    if templated(processor):
        whole, bare = (chat_text(processor, "?", 0, header=header) for header in (True, False))
        if whole == bare:
            return None
        shared = next((i for i, (a, b) in enumerate(zip(whole, bare, strict=False)) if a != b), len(bare))
        texts = (whole[shared:].strip(" "), *texts)
    elif not texts:
        return None
    found: list[Ids] = []
    for text in texts:
        for variant in (text, f" {text}"):
            ids = tuple(cast("list[int]", tokenizer(variant, add_special_tokens=False)["input_ids"]))
            if ids and ids not in found:
                found.append(ids)
    return tuple(found)


def with_completion(rendered: str, completion: str) -> str:
    """Put an answer behind a rendered prompt: on a new line as it stands, else behind one space."""
    bare = rendered.rstrip(" ")
    return bare + completion if bare.endswith("\n") else f"{bare} {completion}"


def completion_ids(processor: ProcessorMixin, prompt: str, completion: str, what: str) -> list[int]:
    """Token ids of a forced completion as they stand behind the chat prompt.

    Raises:
        InputError: the tokenizer merges the completion into the prompt; names `what`.
    """
    tokenizer = cast("Any", processor).tokenizer
    rendered = chat_text(processor, prompt, 0).rstrip(" ")
    if isinstance(processor, PaliGemmaProcessor):
        rendered += "\n"  # which the processor itself puts between a prompt and its answer
    more = special_tokens(processor, rendered)
    before = tokenizer(rendered, **more)["input_ids"]
    after = tokenizer(with_completion(rendered, completion), **more)["input_ids"]
    eos = tokenizer.eos_token_id
    before, after = (ids[:-1] if ids and ids[-1] == eos else ids for ids in (before, after))
    if after[: len(before)] != before or len(after) == len(before):
        raise InputError(
            f"{what}: the completion {completion[:40]!r} does not stand apart from the prompt's tokens; begin it with "
            "a word."
        )
    return list(after[len(before) :])
