"""Saved steerings on the command line: whatever a folder or a published file holds."""

from __future__ import annotations

from pathlib import Path

from steer_plugin.artefact import read as read_artefact
from steer_plugin.methods import L2S, MeanSteering, SteerVLM


def load_steering(path: Path) -> L2S | MeanSteering | SteerVLM:
    """Load a saved L2S, mean steering or SteerVLM, or a network that the L2S authors published.

    Raises:
        ArtefactError: missing, corrupt, or of an unknown kind.
    """
    if path.suffix == ".pt":
        return L2S.from_published(path)
    kinds = {L2S.kind: L2S, SteerVLM.kind: SteerVLM}
    return kinds.get(read_artefact(path).kind, MeanSteering).load(path)
