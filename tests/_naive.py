"""SteerVLM the naive way: for each new token an unsteered pass over everything, then a steered one; plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Spelled = tuple[list[int], slice]


def hooked(
    layers: Any, act: Callable[[int, Tensor], Tensor | None], run: Callable[[], Any], part: str = "self_attn"
) -> Any:
    """Run something while `act` sees, and may replace, what each layer's attention adds (the output of `part`)."""

    def hook(number: int) -> Callable[..., Any]:
        def inner(module: Any, args: Any, output: Any) -> Any:
            new = act(number, output[0] if isinstance(output, tuple) else output)
            return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

        return inner

    handles = [layer.get_submodule(part).register_forward_hook(hook(n)) for n, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            return run()
    finally:
        for handle in handles:
            handle.remove()


def naive_tokens(
    plain: Any,
    decoder: str,
    layers_path: str,
    module: Any,
    spelled: Sequence[Spelled],
    one: dict[str, Tensor],
    where: str,
    new: int,
    never: Sequence[int] = (),
    part: str = "self_attn",
) -> list[int]:
    """Greedy tokens of one row without padding; `spelled` are ids and own tokens of p+ and p-."""
    layers = plain.get_submodule(layers_path)

    def read(ids: list[int], own: slice) -> dict[int, Tensor]:
        got: dict[int, Tensor] = {}
        embeds = plain.get_input_embeddings()(torch.tensor([ids]))
        run = lambda: plain.get_submodule(decoder)(inputs_embeds=embeds)  # noqa: E731
        hooked(layers, lambda n, h: got.update({n: h.clone()}), run, part)
        return {n: h[:, own] for n, h in got.items()}

    plus, minus = (read(*side) for side in spelled)
    one, said = dict(one), []
    width = one["input_ids"].shape[1]
    for _ in range(new):
        u: dict[int, Tensor] = {}
        hooked(layers, lambda n, h, u=u: u.update({n: h.clone()}), lambda: plain(**one, use_cache=False), part)

        def steer(n: int, h: Tensor, u: dict[int, Tensor] = u) -> Tensor:
            real = [torch.ones(side[n].shape[:2], dtype=torch.bool) for side in (plus, minus)]
            changed = h + module(h, u[n], module.remember(plus[n], real[0], minus[n], real[1]))[2]
            return changed if where == "everywhere" else torch.cat([h[:, : width - 1], changed[:, width - 1 :]], 1)

        scores = hooked(layers, steer, lambda: plain(**one, use_cache=False), part).logits[0, -1]
        scores[list(never)] = -torch.inf
        said.append(int(scores.argmax()))
        one["input_ids"] = torch.cat([one["input_ids"], torch.tensor([[said[-1]]])], 1)
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        # PaliGemma tells the answer (1, causal) from the prompt (0, seen from everywhere); the others count it as text.
        for name, kind in (("mm_token_type_ids", 0), ("token_type_ids", int(plain.config.model_type == "paligemma"))):
            if name in one:
                one[name] = torch.cat([one[name], torch.full((1, 1), kind)], 1)
    return said
