"""The engine carries out a plan: it reads rows, lets methods decide, and hands over results.

`run` and `steps` do so for an output's sink, and `early_look` judges the models before that. Other
rooms use what is named here and nothing else.
"""

from lean_merge.engine.crew import CREW, Crew
from lean_merge.engine.judging import ON_LOOK, EarlyLook, early_look
from lean_merge.engine.loop import Event, RunResult, run, steps
from lean_merge.engine.workers import Workers, worker_pool

__all__ = [
    "CREW",
    "ON_LOOK",
    "Crew",
    "EarlyLook",
    "Event",
    "RunResult",
    "Workers",
    "early_look",
    "run",
    "steps",
    "worker_pool",
]
