"""Options of `steer-plugin eval` that nothing in the asked run uses: each is refused instead of being dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer_plugin.errors import InputError
from steer_plugin.methods import SteerVLM

if TYPE_CHECKING:
    from steer_plugin.evaluation.lineup import Lineup
else:
    Lineup = object  # imported when needed; run-time type checkers look the name up


@dataclass(frozen=True)
class Given:
    """What the user wrote, None where nothing; `p_plus` stands for the pair."""

    write: str | None = None
    positions: str | None = None
    max_kl: float | None = None
    prompt: str | None = None
    p_plus: str | None = None


def refuse_unused(given: Given, lineup: Lineup, *, calibrated: bool) -> None:
    """Refuse what no method of the lineup uses; `calibrated` says whether strengths are chosen here.

    Raises:
        InputError: names the option, and the methods that it is for.
    """
    from steer_plugin.evaluation.lineup import FITTED, ORACLES

    fitted = (*FITTED, *ORACLES, "actadd")
    fits = bool({*fitted} & {*lineup.methods})
    for option, value, what in (("--write", given.write, "the site"), ("--positions", given.positions, "the tokens")):
        if value is not None and not fits:
            what = f"{value} is {what} of methods that are fitted here; a saved steering carries its own"
            raise _unused(option, what, fitted, lineup)
    if given.max_kl is not None and not fits:
        what = f"{given.max_kl:g} is the bound within which strengths are chosen"
        raise _unused("--max-kl", what, fitted, lineup)
    if given.max_kl is not None and not calibrated:
        raise InputError(
            f"--max-kl {given.max_kl:g} is the bound of --alpha calibrate, and no strength of "
            f"{', '.join(lineup.methods)} is chosen here. Give --alpha calibrate, or leave --max-kl out."
        )
    if given.prompt is not None and "prompt" not in lineup.methods:
        what = f"{given.prompt!r} is the instruction of the prompt baseline"
        raise _unused("--prompt", what, ("prompt",), lineup)
    saved = any(isinstance(one, SteerVLM) for one in lineup.steerings.values())
    if given.p_plus is not None and not (saved or {"steervlm", "actadd"} & {*lineup.methods}):
        what = f"{given.p_plus!r} is of the pair of SteerVLM and ActAdd, as is --p-minus"
        raise _unused("--p-plus", what, ("steervlm", "actadd"), lineup)


def _unused(option: str, what: str, users: tuple[str, ...], lineup: Lineup) -> InputError:
    asked = ", ".join((*lineup.methods, *lineup.steerings)) or "none"
    wanted = " or ".join(filter(None, (", ".join(users[:-1]), users[-1])))
    return InputError(
        f"{option} {what}: no asked method ({asked}) uses it. Add {wanted} to --methods, or leave {option} out."
    )
