"""DRIFT: reasoning injected while an MLLM is fine-tuned (arXiv:2510.15050), in torch alone."""

from lean_merge.drift.prior import Prior, PriorFactors, PriorMatrix, PriorPart, PriorWeight

__all__ = ["Prior", "PriorFactors", "PriorMatrix", "PriorPart", "PriorWeight"]
