"""Where the decoder starts: against numpy's SVD, a planted dictionary, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from steer_plugin.training.config import FitConfig, preset
from steer_plugin.training.starts import atoms, directions, principal

CONFIG = preset("safety", hidden=8)


def planted(samples: int = 90, d: int = 24, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of two or so of eight atoms, and the atoms."""
    draw = torch.Generator().manual_seed(5)
    truth = normalize(torch.randn(count, d, generator=draw), dim=1)
    used = torch.rand(samples, count, generator=draw) < 0.25
    codes = used * (4 + 4 * torch.rand(samples, count, generator=draw))
    return codes @ truth + 0.1 * torch.randn(samples, d, generator=draw), truth


def objective(vectors: torch.Tensor, codes: torch.Tensor, dictionary: torch.Tensor) -> float:
    return float((vectors - codes @ dictionary).square().sum() / 2 + codes.sum())


@pytest.mark.parametrize("shape", [(20, 30), (200, 40)])
def test_principal_directions_are_numpys(shape):
    draw = torch.Generator().manual_seed(2)
    # A falling spectrum: where two values are alike, their directions are anybody's.
    vectors = 3 + torch.randn(shape, generator=draw) * 0.8 ** torch.arange(shape[1])
    found = principal(vectors, 6)
    rows = vectors.double().numpy()
    wanted = np.linalg.svd(rows - rows.mean(0))[2][:6]
    assert np.abs((found.numpy() * wanted).sum(1)) == pytest.approx(np.ones(6), abs=1e-4)
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())


def test_equal_targets_have_finite_directions():
    for start in ("svd", "dictionary"):
        for vectors in (torch.ones(6, 5), torch.zeros(6, 5)):
            found = directions(vectors, FitConfig(hidden=4, start=start), 0)
            assert found.shape == (4, 5)
            assert bool(torch.isfinite(found).all())


def test_dictionary_finds_the_planted_atoms():
    vectors, truth = planted()
    dictionary, codes = atoms(vectors, 8, CONFIG)
    assert float((truth @ normalize(dictionary, dim=1).T).max(1).values.min()) > 0.98
    assert bool((codes >= 0).all())
    assert float(dictionary.norm(dim=1).max()) < 1 + 1e-5


@pytest.mark.filterwarnings("ignore:Objective did not converge")
def test_dictionary_is_as_good_as_scikit_learns_and_better_than_random():
    decomposition = pytest.importorskip("sklearn.decomposition")
    vectors, _ = planted()
    rival = decomposition.DictionaryLearning(
        8, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd", max_iter=20, random_state=0
    )
    codes = torch.from_numpy(rival.fit_transform(vectors.numpy()))
    theirs = objective(vectors, codes, torch.from_numpy(rival.components_))
    dictionary, codes = atoms(vectors, 8, CONFIG)
    ours = objective(vectors, codes, dictionary)
    drawn = normalize(torch.randn(8, 24), dim=1)
    fixed = torch.from_numpy(
        decomposition.sparse_encode(vectors.numpy(), drawn.numpy(), algorithm="lasso_cd", alpha=1.0, positive=True)
    )
    assert ours < 1.01 * theirs
    assert ours < 0.5 * objective(vectors, fixed, drawn)


def test_directions_depend_on_the_seed_alone():
    vectors, _ = planted()
    before = torch.get_rng_state()
    for start in ("svd", "dictionary"):
        config = FitConfig(hidden=6, start=start, dictionary_turns=3)
        first = directions(vectors, config, 1)
        torch.rand(3)
        assert torch.equal(first, directions(vectors, config, 1))
    torch.set_rng_state(before)
    directions(vectors, CONFIG, 1)
    assert torch.equal(torch.get_rng_state(), before)
    config = preset("safety", hidden=6, dictionary_turns=0)
    assert not torch.equal(directions(vectors, config, 1), directions(vectors, config, 2))


def test_atoms_that_nothing_uses_are_samples():
    vectors, _ = planted()
    dictionary, codes = atoms(vectors, 8, preset("safety", dictionary_penalty=1e6))
    assert not bool(codes.any())
    assert float((dictionary @ normalize(vectors, dim=1).T).max(1).values.min()) == pytest.approx(1.0, abs=1e-5)
