"""The engine carries out a plan: it reads rows, lets methods decide, and hands over results.

`run` and `steps` do so for an output's sink. Other rooms use what is named here and nothing else.
"""

from lean_merge.engine.loop import Event, RunResult, run, steps
from lean_merge.engine.workers import Workers, worker_pool

__all__ = ["Event", "RunResult", "Workers", "run", "steps", "worker_pool"]
