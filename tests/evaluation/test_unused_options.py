"""Options of `steer-plugin eval` that no asked method uses are refused by name; those that one uses are not."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
from _steerings import PAIR, drawn_module
from _tiny import D_MODEL, draw

import steer_plugin as sp
from steer_plugin.cli_eval import eval_app
from steer_plugin.cli_options import Given, refuse_unused
from steer_plugin.errors import InputError
from steer_plugin.evaluation.lineup import Lineup

MEAN = sp.MeanSteering(draw(D_MODEL), "resid_post.1")
MODULE = sp.SteerVLM(drawn_module())
FITTED = "mean, mean_ba, l2s, norm_rnd, p2s or actadd"


@pytest.mark.parametrize(
    ("given", "lineup", "message"),
    [
        (
            {"write": "resid_post.1"}, {},
            rf"--write resid_post\.1 is the site of methods that are fitted here; a saved steering carries its own: no "
            rf"asked method \(none, prompt\) uses it\. Add {FITTED} to --methods, or leave --write out\.",
        ),
        (
            {"positions": "last_prompt"}, {"steerings": {"mine": MEAN}},
            rf"--positions last_prompt is the tokens of .* \(none, prompt, mine\) uses it\. Add {FITTED} to",
        ),
        ({"max_kl": 0.25}, {}, rf"--max-kl 0\.25 is the bound within which .* Add {FITTED} .* leave --max-kl out"),
        (
            {"max_kl": 0.25}, {"methods": ("none", "l2s")},
            r"--max-kl 0\.25 is the bound of --alpha calibrate, and no strength of none, l2s is chosen here\. Give",
        ),
        (
            {"prompt": "Look."}, {"methods": ("none", "mean")},
            r"--prompt 'Look\.' is the instruction of the prompt baseline: no asked method \(none, mean\) uses it\. "
            r"Add prompt to --methods, or leave --prompt out\.",
        ),
        (
            {"p_plus": "Be kind."}, {"methods": ("mean",), "steerings": {"mine": MEAN}},
            r"--p-plus 'Be kind\.' is of the pair of SteerVLM and ActAdd, as is --p-minus: no asked method \(mean, mine"
            r"\) uses it\. Add steervlm or actadd to --methods, or leave --p-plus out\.",
        ),
    ],
)  # fmt: skip
def test_an_option_that_nothing_uses_is_refused(given: dict[str, Any], lineup: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        refuse_unused(Given(**given), Lineup(**lineup), calibrated=False)


@pytest.mark.parametrize("method", ["mean", "mean_ba", "l2s", "p2s", "norm_rnd", "actadd"])
def test_fitted_methods_use_site_positions_and_bound(method: str) -> None:
    refuse_unused(Given("resid_post.1", "paper", 0.5), Lineup(("none", method)), calibrated=True)


@pytest.mark.parametrize(
    "lineup",
    [Lineup(("actadd",), pair=PAIR), Lineup(("steervlm",), {"steervlm": MODULE}, pair=PAIR),
     Lineup(("none",), {"mine": MODULE}, pair=PAIR)],
)  # fmt: skip
def test_a_pair_is_for_actadd_and_every_steervlm(lineup: Lineup) -> None:
    refuse_unused(Given(p_plus=PAIR[0]), lineup, calibrated=False)


def test_what_is_not_given_is_not_refused() -> None:
    refuse_unused(Given(), Lineup(("none",)), calibrated=False)
    refuse_unused(Given(prompt="Look."), Lineup(), calibrated=True)


def test_on_the_command_line_none_of_them_has_a_default_that_would_hide_whether_it_was_given() -> None:
    """And each is refused there, before anything is read, written or loaded."""
    for command in eval_app.registered_commands:
        assert command.callback is not None
        found = inspect.signature(command.callback).parameters
        assert all(found[name].default is None for name in get_type_hints(Given) if name in found)
        with pytest.raises(InputError, match=r"--write resid_post\.1 is the site"):
            command.callback(**{
                name: "resid_post.1" if name == "write" else one.default for name, one in found.items()
            })  # fmt: skip
