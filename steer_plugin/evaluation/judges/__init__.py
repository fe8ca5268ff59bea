"""Judges: one interface for a guard model, a model behind an OpenAI-compatible server, and a list of phrases.

`verdicts` asks any of them and keeps prompts, raw answers and scores in a file that a killed run resumes.
"""

from steer_plugin.evaluation.judges._chat import Budget
from steer_plugin.evaluation.judges.base import Judge, Judged, Verdict
from steer_plugin.evaluation.judges.llama_guard import EXCHANGE, RESPONSE, LlamaGuardJudge
from steer_plugin.evaluation.judges.log import VerdictLog, verdicts
from steer_plugin.evaluation.judges.openai_judge import OpenAIJudge
from steer_plugin.evaluation.judges.phrases import PhraseJudge
from steer_plugin.evaluation.judges.rubrics import QUALITY, STANCE

__all__ = [
    "EXCHANGE",
    "QUALITY",
    "RESPONSE",
    "STANCE",
    "Budget",
    "Judge",
    "Judged",
    "LlamaGuardJudge",
    "OpenAIJudge",
    "PhraseJudge",
    "Verdict",
    "VerdictLog",
    "verdicts",
]
