"""Fitting: the presets' losses by hand, seeds, starts, and the faults of the authors' code that must not come back."""

from __future__ import annotations

import pytest
import torch
from _shifts import law_shifts
from torch.nn import functional

import steer_plugin as sp
from steer_plugin.methods.network import SteeringNetwork
from steer_plugin.training.config import PRESETS, preset
from steer_plugin.training.gradient import set_gradient
from steer_plugin.training.l2s import _losses, _schedule, _shares, fit_network


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    shifts = law_shifts()
    config = preset("pope", epochs=3, hidden=12)
    first, second = (fit_network(shifts, config, seed=5)[0].state_dict() for _ in range(2))
    other = fit_network(shifts, config, seed=6)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.weight"], other["encoder.weight"])


def test_shifts_of_half_precision_are_fitted_in_single():
    shifts = law_shifts(30)
    half = sp.Shifts(shifts.vectors.half(), shifts.contexts.half(), shifts.ids, shifts.behaviours, shifts.job)
    same = sp.Shifts(half.vectors.float(), half.contexts.float(), shifts.ids, shifts.behaviours, shifts.job)
    first, second = (fit_network(one, preset("pope", epochs=2, hidden=4))[0].state_dict() for one in (half, same))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fitting_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit_network(law_shifts(), preset("mse", epochs=1, hidden=4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["pope", "safety"])
def test_more_hidden_units_than_samples_is_fine(name):
    network, report = fit_network(law_shifts(24), preset(name, epochs=2, hidden=100))
    assert network.decoder.weight.shape == (32, 100)
    assert report.samples == 22


def test_decoder_starts_on_the_targets_principal_directions():
    shifts = law_shifts(60)
    network, _ = fit_network(shifts, preset("pope", epochs=1, hidden=4, learning_rate=0.0), validation=shifts)
    centred = shifts.vectors - shifts.vectors.mean(0)
    wanted = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    cosine = torch.nn.functional.cosine_similarity(network.decoder.weight[:, 0], wanted, dim=0)
    assert abs(float(cosine)) > 0.999


def test_loss_by_hand():
    predicted, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    cosine = 1 / 2**0.5
    assert float(_losses(predicted, target, PRESETS["mse"], 1)) == pytest.approx(0.5)
    assert float(_losses(predicted, target, PRESETS["safety"], 1)) == pytest.approx(0.5 + 0.5 - 0.1 * cosine)
    assert float(_losses(predicted, target, PRESETS["pope"], 50)) == pytest.approx(1.0 - 0.1 * 0.5 * cosine)


def test_balanced_loss_weighs_classes_not_samples():
    losses, classes = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 2])
    assert float(losses @ _shares(classes)) == pytest.approx(3.0)
    assert float(losses[:3] @ _shares(classes[:3])) == pytest.approx(1.0)


def plain_loss(predicted, target, l1, weight):
    """The loss of each row with torch's own losses."""
    rows = [functional.mse_loss, functional.l1_loss]
    squared, absolute = (one(predicted, target, reduction="none").mean(1) for one in rows)
    return squared + l1 * absolute - weight * torch.nn.CosineSimilarity(dim=1)(predicted, target)


@pytest.mark.parametrize(("l1", "weight"), [(1.0, 0.1), (0.3, 0.0), (0.0, 0.2), (0.0, 0.0)])
def test_gradient_by_hand_is_that_of_autograd(l1, weight):
    torch.manual_seed(1)
    network = SteeringNetwork(7, 3, 5).double()
    contexts, targets, shares = torch.randn(4, 7).double(), torch.randn(4, 5).double(), torch.rand(4).double()
    targets[2] = 0.0  # an input that steering shall leave alone
    loss = plain_loss(network(contexts), targets, l1, weight) @ shares
    wanted = torch.autograd.grad(loss, list(network.parameters()))
    assert set_gradient(network, contexts, targets, shares, l1, weight) == pytest.approx(float(loss.detach()))
    for parameter, one in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, one)


@pytest.mark.parametrize("name", ["pope", "safety", "fast", "mse"])
def test_fit_takes_the_steps_of_plain_adam(name):
    shifts, held = law_shifts(40), law_shifts(20, seed=1)
    config = preset(name, start="random", hidden=4, epochs=3, batch_size=16, warmup_epochs=2, keep="last")
    torch.manual_seed(7)
    network = SteeringNetwork(32, 4, 32)
    optimiser = torch.optim.Adam(network.parameters(), fused=False)
    for epoch, rate in ((1, 0.5), (2, 1.0), (3, 0.0)):
        optimiser.param_groups[0]["lr"] = rate * PRESETS[name].learning_rate
        weight = config.cosine * (epoch / 3 if name == "pope" else 1)
        for batch in torch.randperm(40).split(16):
            losses = plain_loss(network(shifts.contexts[batch]), shifts.vectors[batch], config.l1, weight)
            yes = torch.tensor([shifts.behaviours[i] == "yes" for i in batch.tolist()])
            loss = (losses[yes].mean() + losses[~yes].mean()) / 2 if name == "pope" else losses.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    fitted, report = fit_network(shifts, config, validation=held, seed=7)
    for key, wanted in network.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[key], wanted, rtol=1e-4, atol=1e-7)
    wanted = plain_loss(network(held.contexts), held.vectors, config.l1, config.cosine).mean().detach()
    assert report.validation_loss[-1] == pytest.approx(float(wanted), rel=1e-5)


def test_the_authors_presets_are_the_authors():
    shared = {"hidden": 100, "l1": 1.0, "cosine": 0.1, "epochs": 100, "batch_size": 64}
    pope = {"start": "svd", "cosine_grows": True, "learning_rate": 5e-5, "warmup_epochs": 50, "balance": True}
    safety = {"start": "dictionary", "cosine_grows": False, "learning_rate": 1e-4, "warmup_epochs": None}
    assert sp.FitConfig(**shared, **pope, keep="best") == PRESETS["pope"]
    assert sp.FitConfig(**shared, **safety, balance=False, keep="last", dictionary_penalty=1.0) == PRESETS["safety"]


def test_report_says_what_was_used():
    report = fit_network(law_shifts(24), preset("fast", epochs=1, hidden=30), seed=4)[1]
    assert (report.config, report.seed) == (preset("fast", epochs=1, hidden=30), 4)
    assert (report.directions, report.threads) == (22, torch.get_num_threads())
    assert fit_network(law_shifts(24), preset("mse", epochs=1, start="random"))[1].directions == 0


def test_pope_rate_warms_up_for_fifty_epochs_then_falls_to_zero():
    config = PRESETS["pope"]
    assert [_schedule(epoch, config) for epoch in (1, 50, 75, 100)] == pytest.approx([0.02, 1.0, 0.5, 0.0])
    assert _schedule(100, PRESETS["safety"]) == 1.0


def test_best_epoch_is_the_one_with_the_least_validation_error():
    shifts, held = law_shifts(100, seed=1), law_shifts(60, seed=2)
    network, report = fit_network(shifts, sp.FitConfig(hidden=8, epochs=12, learning_rate=0.05), validation=held)
    error = float((network(held.contexts) - held.vectors).square().mean())
    assert error == pytest.approx(min(report.validation_loss), rel=1e-4)
    assert report.validation_loss[report.epoch - 1] == min(report.validation_loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: fit_network(s, "popé"), r"'popé'.*'pope'"),
        (lambda s: fit_network(s.select([0])), "empty part"),
        (
            lambda s: fit_network(sp.Shifts(s.vectors * float("nan"), s.contexts, s.ids, s.behaviours, s.job)),
            "vectors.*NaN",
        ),
        (lambda s: fit_network(s, validation=law_shifts(8, d_model=16)), r"validation shifts.*\(8, 16\).*32"),
        (lambda s: preset("pope", learning_rat=1.0), r"'learning_rat'.*'learning_rate'"),
        (lambda s: preset("pope", epochs=0), "epochs=0.*at least 1"),
        (lambda s: sp.FitConfig(learning_rate=float("nan")), "learning_rate=nan.*finite"),
        (lambda s: sp.FitConfig(validation_fraction=1.0), "validation_fraction=1.0.*between 0 and 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(sp.InputError, match=message):
        call(law_shifts())


def test_unknown_start_is_refused_where_no_type_is_checked():
    config = sp.FitConfig()
    object.__setattr__(config, "start", "dictionery")
    with pytest.raises(sp.InputError, match=r"start='dictionery' is unknown. Did you mean 'dictionary'"):
        config.__post_init__()
