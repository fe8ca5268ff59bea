"""Steer, read and take apart vision-language models through nnsight, TransformerLens or plain PyTorch.

import steer_plugin as sp
vlm = sp.attach(model, processor)
ids = vlm.generate(**inputs, steering=sp.L2S.load("l2s/") * 1.5, max_new_tokens=32)
"""

from steer_plugin import analysis as analysis
from steer_plugin import pocket as pocket
from steer_plugin.activations import Activations
from steer_plugin.adapters import AttachedModel, CheckReport, attach
from steer_plugin.context import Aside, Context, Read
from steer_plugin.contrast.prompt import Prompt
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.errors import (
    ArtefactError,
    FamilyError,
    FrameworkError,
    InputError,
    JobError,
    PositionError,
    SiteError,
    SteeringError,
)
from steer_plugin.evaluation.bounds import KLBound, QualityBound
from steer_plugin.evaluation.calibrate import Calibration, calibrate
from steer_plugin.evaluation.evaluate import evaluate
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.steerability import Steerability, steerability
from steer_plugin.evaluation.strengths import Strengths
from steer_plugin.evaluation.sweep import Sweep, sweep
from steer_plugin.families import Family, register_family
from steer_plugin.intervention import Intervention, Steerable, Write, add, patch
from steer_plugin.methods import (
    L2S,
    P2S,
    BehaviourMeans,
    MeanSteering,
    NormRandom,
    SteerVLM,
    SteerVLMConfig,
    read_gguf,
    write_gguf,
)
from steer_plugin.positions import (
    Positions,
    completion,
    everywhere,
    generated,
    image,
    last_prompt,
    prompt,
    text,
    user_end,
)
from steer_plugin.record import Record
from steer_plugin.shifts import Shifts
from steer_plugin.sites import (
    Site,
    attn_out,
    attn_raw,
    mlp_out,
    mlp_raw,
    projector,
    resid_post,
    resid_pre,
    vision_attn_out,
    vision_attn_raw,
    vision_mlp_out,
    vision_mlp_raw,
    vision_resid_post,
    vision_resid_pre,
)
from steer_plugin.training.config import FitConfig
from steer_plugin.training.steervlm_config import SteerVLMTraining

__version__ = "0.1.0"

__all__ = [
    "L2S",
    "P2S",
    "Activations",
    "ArtefactError",
    "Aside",
    "AttachedModel",
    "BehaviourMeans",
    "Calibration",
    "CheckReport",
    "Context",
    "Evaluation",
    "Family",
    "FamilyError",
    "FitConfig",
    "FrameworkError",
    "InputError",
    "Intervention",
    "JobError",
    "KLBound",
    "Lineup",
    "MeanSteering",
    "NormRandom",
    "PositionError",
    "Positions",
    "Prompt",
    "QualityBound",
    "Read",
    "Record",
    "Shifts",
    "Site",
    "SiteError",
    "SteerVLM",
    "SteerVLMConfig",
    "SteerVLMTraining",
    "Steerability",
    "Steerable",
    "SteeringError",
    "SteeringRow",
    "Strengths",
    "Sweep",
    "Write",
    "add",
    "analysis",
    "attach",
    "attn_out",
    "attn_raw",
    "calibrate",
    "completion",
    "evaluate",
    "everywhere",
    "generated",
    "image",
    "last_prompt",
    "mlp_out",
    "mlp_raw",
    "patch",
    "pocket",
    "projector",
    "prompt",
    "read_gguf",
    "register_family",
    "resid_post",
    "resid_pre",
    "steerability",
    "sweep",
    "text",
    "user_end",
    "vision_attn_out",
    "vision_attn_raw",
    "vision_mlp_out",
    "vision_mlp_raw",
    "vision_resid_post",
    "vision_resid_pre",
    "write_gguf",
]  # fmt: skip
