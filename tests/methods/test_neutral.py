"""Zero targets: inputs that steering shall leave alone are fitted with the zero vector, and stay alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _shifts import law_shifts

import steer_plugin as sp
from steer_plugin.training.config import preset

CONFIG = preset("mse", epochs=60, hidden=24, learning_rate=3e-3)


def told_apart(samples: int = 400, seed: int = 0) -> tuple[sp.Shifts, sp.Shifts]:
    """Shifts and neutral shifts whose contexts differ in their last coordinate, by six."""
    shifts, neutral = law_shifts(samples, seed=seed), law_shifts(samples, seed=seed + 1)
    high, low = shifts.contexts.clone(), neutral.contexts.clone()
    high[:, -1], low[:, -1] = 3.0, -3.0
    return replace(shifts, contexts=high), replace(neutral, contexts=low)


def test_neutral_inputs_get_almost_no_vector_and_the_others_theirs():
    shifts, neutral = told_apart()
    _, unseen = told_apart(seed=10)
    quiet = sp.L2S.fit(shifts, CONFIG, neutral=neutral)
    plain = sp.L2S.fit(shifts, CONFIG)
    length = shifts.vectors.norm(dim=-1).mean()
    assert quiet.predict(unseen.contexts).norm(dim=-1).mean() < 0.35 * length
    assert plain.predict(unseen.contexts).norm(dim=-1).mean() > 0.6 * length
    cosine = torch.cosine_similarity(quiet.predict(shifts.contexts), shifts.vectors, dim=-1)
    assert cosine.mean() > 0.9


def test_contexts_alone_are_enough():
    shifts, neutral = told_apart()
    by_shifts = sp.L2S.fit(shifts, CONFIG, neutral=neutral)
    by_contexts = sp.L2S.fit(shifts, CONFIG, neutral=neutral.contexts)
    state = by_shifts.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in by_contexts.network.state_dict().items())


def test_with_neutral_appends_zeros_and_changes_nothing_else():
    shifts, neutral = told_apart(10)
    both = shifts.with_neutral(neutral)
    assert torch.equal(both.vectors[:10], shifts.vectors)
    assert not both.vectors[10:].any()
    assert torch.equal(both.contexts[10:], neutral.contexts)
    assert both.behaviours == (*shifts.behaviours, *["neutral"] * 10)
    assert len(shifts) == 10


@pytest.mark.parametrize("name", ["model", "read", "context"])
def test_neutral_shifts_read_elsewhere_are_refused(name):
    shifts, neutral = told_apart(10)
    with pytest.raises(sp.InputError, match=f"differ in {name}"):
        sp.L2S.fit(shifts, CONFIG, neutral=replace(neutral, job=neutral.job | {name: "other"}))


def test_neutral_contexts_of_another_width_are_refused():
    shifts, _ = told_apart(10)
    with pytest.raises(sp.InputError, match="width 31, the shifts' have 32"):
        sp.L2S.fit(shifts, CONFIG, neutral=torch.zeros(4, 31))
