"""DRIFT: reasoning injected while an MLLM is fine-tuned (arXiv:2510.15050), in torch alone."""

from lean_merge.drift.prior import Prior, PriorFactors, PriorMatrix, PriorPart, PriorWeight
from lean_merge.drift.pull import Drift

__all__ = ["Drift", "Prior", "PriorFactors", "PriorMatrix", "PriorPart", "PriorWeight"]
