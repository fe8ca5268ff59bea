"""Taking a steering apart; every result has `.plot()` and `.to_frame()`.

directions  cosines, shift_map, explained, by_behaviour; footprint, project (where it acts, token by token)
lens        logit_lens (the stream, at text and image tokens), direction_lens (a vector, or the mean steps of a gate)
probes      read_parts, image_deltas, probe
patching    activation_patching, steering_patching, localise; attribution_patching, attributed_steering (by gradients)
gates       plot_gates, plot_profile, gate_overlap, gate_stability, mean_steps
composition compose
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer_plugin.analysis._sweeps import Patching
    from steer_plugin.analysis.attribution import attributed_steering, attribution_patching
    from steer_plugin.analysis.composition import Composition, compose
    from steer_plugin.analysis.directions import (
        Cosines,
        Explained,
        ShiftMap,
        by_behaviour,
        cosines,
        explained,
        shift_map,
    )
    from steer_plugin.analysis.footprints import Footprint, Projection, footprint, project
    from steer_plugin.analysis.gate_sets import GateOverlap, GateStability, gate_overlap, gate_stability, mean_steps
    from steer_plugin.analysis.gates import plot_gates, plot_profile
    from steer_plugin.analysis.hovering import interactive
    from steer_plugin.analysis.lens import DirectionLens, Lens, direction_lens, logit_lens
    from steer_plugin.analysis.metrics import LogitDifference, LogProbability, log_probability, logit_difference
    from steer_plugin.analysis.patching import activation_patching, localise, patch_streams, steering_patching
    from steer_plugin.analysis.pictures import plot_positions
    from steer_plugin.analysis.probes import Probes, ProbeShift, probe
    from steer_plugin.analysis.reading import image_deltas, read_parts
    from steer_plugin.analysis.tokens import Tokens

__all__ = [
    "Composition",
    "Cosines",
    "DirectionLens",
    "Explained",
    "Footprint",
    "GateOverlap",
    "GateStability",
    "Lens",
    "LogProbability",
    "LogitDifference",
    "Patching",
    "ProbeShift",
    "Probes",
    "Projection",
    "ShiftMap",
    "Tokens",
    "activation_patching",
    "attributed_steering",
    "attribution_patching",
    "by_behaviour",
    "compose",
    "cosines",
    "direction_lens",
    "explained",
    "footprint",
    "gate_overlap",
    "gate_stability",
    "image_deltas",
    "interactive",
    "localise",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "mean_steps",
    "patch_streams",
    "plot_gates",
    "plot_positions",
    "plot_profile",
    "probe",
    "project",
    "read_parts",
    "shift_map",
    "steering_patching",
]

# scikit-learn takes a second to import: a name is fetched when it is first used. No module may be named as a function
# is: once imported it would hide it.
_HOMES = {
    "_sweeps": ("Patching",),
    "attribution": ("attributed_steering", "attribution_patching"),
    "composition": ("Composition", "compose"),
    "directions": ("Cosines", "Explained", "ShiftMap", "by_behaviour", "cosines", "explained", "shift_map"),
    "footprints": ("Footprint", "Projection", "footprint", "project"),
    "gate_sets": ("GateOverlap", "GateStability", "gate_overlap", "gate_stability", "mean_steps"),
    "gates": ("plot_gates", "plot_profile"),
    "hovering": ("interactive",),
    "lens": ("DirectionLens", "Lens", "direction_lens", "logit_lens"),
    "metrics": ("LogitDifference", "LogProbability", "log_probability", "logit_difference"),
    "patching": ("activation_patching", "localise", "patch_streams", "steering_patching"),
    "pictures": ("plot_positions",),
    "probes": ("ProbeShift", "Probes", "probe"),
    "reading": ("image_deltas", "read_parts"),
    "tokens": ("Tokens",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
