"""Measure every candidate on every family, and gather what is known about the task vectors.

The result is plain data: what is written to results.json, and all that tables, figures and claims
are made from. Lists run over the seeds.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduction import intervals, oracles
from reproduction.candidates import Candidate, candidates
from reproduction.exam import Marks, Weights
from reproduction.family import Family, TaskVectors
from reproduction.kept import KeptMarks

PROBLEMS = 1000
"""Of each task, as in the training logs."""
PARTS = 2
"""Jobs for each seed at most; more would spend their time on preparing the questions."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One candidate on one family: its marks, and what its update is like.

    Attributes
    ----------
    marks
        By task.
    norm
        The Frobenius norm of what was added to the MLLM, over that of dM, all weights in scope.
    changed
        Weights that differ from the MLLM's.
    """

    marks: dict[str, Marks]
    norm: float
    changed: int


@dataclass
class Job:
    """A part of the candidates on one family.

    `facts` are those of the task vectors, or empty; `seconds` are of the CPU.
    """

    seed: int
    measured: dict[int, Measured] = field(default_factory=dict)
    facts: Result = field(default_factory=dict)
    seconds: float = 0.0


def measure_all(
    seeds: Sequence[int],
    *,
    problems: int | None,
    workers: int,
    groups: Sequence[str] | None = None,
    kept: Path | None = None,
    say: Callable[[str], None],
) -> Result:
    """Everything, in `workers` processes of one thread each.

    Parameters
    ----------
    seeds
        Of the families.
    problems
        Held-out problems for each task, or all.
    groups
        Of candidates that are measured, beside the MLLM itself; all by default.
    kept
        A folder of marks, from which a run that was stopped goes on.
    """
    weights = len(Family(seeds[0], problems=1).base)
    listed = [
        c
        for i, c in enumerate(candidates(weights))
        if i == 0 or groups is None or c.group in groups
    ]
    say(f"{len(listed)} models for each of the seeds {', '.join(map(str, seeds))}")
    jobs: dict[int, Job] = {seed: Job(seed) for seed in seeds}
    parts = min(PARTS, workers)
    tasks = [(seed, listed, part, parts, problems, kept) for seed in seeds for part in range(parts)]
    for done in _each(tasks, workers):
        jobs[done.seed].measured |= done.measured
        jobs[done.seed].facts |= done.facts
        jobs[done.seed].seconds += done.seconds
        say(f"seed {done.seed}: {len(jobs[done.seed].measured)} of {len(listed)} measured")
    return gathered([jobs[seed] for seed in seeds], listed, weights)


def _each(tasks: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Job]:
    """Work on all tasks, in this process if there is one worker."""
    if workers == 1:
        yield from (_work(*task) for task in tasks)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = [pool.submit(_work, *task) for task in tasks]
        yield from (each.result() for each in running)


def gathered(by_seed: Sequence[Job], listed: Sequence[Candidate], weights: int) -> Result:
    """All jobs' figures as plain data."""
    return {
        "seeds": [job.seed for job in by_seed],
        "cpu_minutes": round(sum(job.seconds for job in by_seed) / 60, 2),
        "problems": len(by_seed[0].measured[0].marks["text_sums"].right),
        "weights": weights,
        "facts": [job.facts for job in by_seed],
        "candidates": [
            summary(c, [job.measured[i] for job in by_seed], [job.measured[0] for job in by_seed])
            for i, c in enumerate(listed)
        ],
    }


def _work(
    seed: int,
    listed: Sequence[Candidate],
    part: int,
    parts: int,
    problems: int | None,
    kept: Path | None,
) -> Job:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    began = time.process_time()
    family = Family(seed, problems=problems)
    job = Job(seed)
    known: MutableMapping[str, dict[str, Marks]] = {}
    if kept is not None:
        known = KeptMarks(kept, f"{seed} {problems} {_digest(family.mllm)}")
    for index in range(part, len(listed), parts):
        job.measured[index] = measure(family, listed[index], known)
    if part == 0:
        job.facts = facts(family)
    job.seconds = time.process_time() - began
    if isinstance(known, KeptMarks):
        job.seconds += known.seconds
    return job


def measure(
    family: TaskVectors, candidate: Candidate, known: MutableMapping[str, dict[str, Marks]]
) -> Measured:
    """Make one candidate and mark it; weights that were marked before are not marked again."""
    weights = candidate.make(family)
    key = f"{candidate.exam} {candidate.tasks} {candidate.limit} {_digest(weights)}"
    if key not in known:
        exam = family.exams[candidate.exam]
        known[key] = dict(exam.take(weights, candidate.tasks, limit=candidate.limit))
    change = oracles.difference(weights, family.mllm)
    return Measured(
        marks=known[key],
        norm=oracles.norm(change) / oracles.norm(family.of_expert),
        changed=sum(bool(update.any()) for update in change.values()),
    )


def _digest(weights: Weights) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- as plain data ------------------------------------------------------------------------


def summary(candidate: Candidate, measured: Sequence[Measured], mllm: Sequence[Measured]) -> Result:
    """One candidate over the seeds, against the MLLM on the same problems."""
    tasks = {
        task: compared([m.marks[task] for m in measured], [m.marks[task] for m in mllm])
        for task in measured[0].marks
    }
    return {
        "group": candidate.group,
        "name": candidate.name,
        "norm": [_round(m.norm) for m in measured],
        "changed": [m.changed for m in measured],
        "tasks": tasks,
    }


def compared(marks: Sequence[Marks], before: Sequence[Marks]) -> Result:
    """One task: counts and losses of each seed, and the difference to before with intervals."""
    asked = len(marks[0].right)
    differences = np.stack(
        [
            mine.right.astype(np.float64) - his.right[:asked]
            for mine, his in zip(marks, before, strict=True)
        ]
    )
    means = differences.mean(1)
    loss = [
        float((mine.loss - his.loss[:asked]).mean())
        for mine, his in zip(marks, before, strict=True)
    ]
    return {
        "asked": asked,
        "right": [int(mine.right.sum()) for mine in marks],
        "gained": [int((row > 0).sum()) for row in differences],
        "lost": [int((row < 0).sum()) for row in differences],
        "loss_change": [_round(each) for each in loss],
        "over_problems": [_round(each) for each in intervals.over_problems(differences)],
        "over_seeds": _finite(intervals.over_seeds(means.tolist())),
    }


def _finite(interval: intervals.Interval) -> list[float] | None:
    return [_round(each) for each in interval] if np.isfinite(interval).all() else None


def _round(value: float) -> float:
    """Five significant digits: the rest is noise in a diff."""
    return float(f"{value:.5g}")


# --- what is known of the task vectors ----------------------------------------------------


def facts(family: TaskVectors) -> Result:
    """Norms, spectra, similarities and energies of one family's task vectors."""
    weights = [_weight(family, name) for name in family.base]
    return {
        "spectra": {
            "mllm": _mean_spectrum([each.sigma for each in family.svd_of_mllm.values()]),
            "expert": _mean_spectrum([each.sigma for each in family.svd_of_expert.values()]),
        },
        "energy": {
            "its own": _mean_energy(family, lambda n: family.svd_of_expert[n].right),
            "the MLLM's": _mean_energy(family, lambda n: family.svd_of_mllm[n].right),
            "random": _mean_energy(family, _random_basis(family)),
        },
        "cosine": _round(cosine(family)),
        "weights": weights,
        "auto": {
            "threshold": family.survey["auto"],
            "chance": _round(family.survey["null"]["chance"]),
            "bearable": _round(family.survey["bearable"]),
            "p_value": _round(family.survey["null"]["p_value"]),
            "gap": family.survey["gap"] is not None,
        },
    }


def _weight(family: TaskVectors, name: str) -> Result:
    similarity = family.similarity[name]
    return {
        "name": name.removesuffix(".weight"),
        "base": _round(float(family.base[name].norm())),
        "mllm": _round(float(family.of_mllm[name].norm())),
        "expert": _round(float(family.of_expert[name].norm())),
        "lambda": _round(family.ratio[name]),
        "s_1": _round(float(similarity[0])),
        "s_max": _round(float(similarity.max())),
        "energy_kept": _round(energy_kept(family, name)),
        "energy_of_rank_1": _round(
            float(
                oracles.energy_inside(
                    family.of_expert[name], family.svd_of_expert[name].right[:, :1]
                )[0]
            )
        ),
        "energy_inside_8": _round(
            float(
                oracles.energy_inside(
                    family.of_expert[name], family.svd_of_mllm[name].right[:, :8]
                )[-1]
            )
        ),
    }


def energy_kept(family: TaskVectors, name: str, temperature: float = 32.0) -> float:
    """||dM V_V diag(gamma^2)||^2 / ||dM||^2: the share of dM that the projection lets through."""
    gamma = torch.softmax(temperature * family.similarity[name], 0)
    matrix = family.of_expert[name].double()
    kept = (matrix @ family.svd_of_mllm[name].right) * gamma**2
    return float(kept.square().sum() / matrix.square().sum())


def cosine(family: TaskVectors) -> float:
    """<dV, dM> / (||dV|| ||dM||) over all weights in scope."""
    pairs = [(family.of_mllm[n].double(), family.of_expert[n].double()) for n in family.base]
    inner = sum(float((v * m).sum()) for v, m in pairs)
    return inner / (oracles.norm(family.of_mllm) * oracles.norm(family.of_expert))


def _mean_spectrum(spectra: Sequence[torch.Tensor]) -> list[float]:
    """sigma_i / sigma_1, the mean over the weights, for the ranks that all have."""
    rank = min(len(sigma) for sigma in spectra)
    return [_round(v) for v in torch.stack([s[:rank] / s[0] for s in spectra]).mean(0).tolist()]


def _mean_energy(family: TaskVectors, basis: Callable[[str], torch.Tensor]) -> list[float]:
    """Share of ||dM||^2 in the first k directions of a basis, over all weights together."""
    total = np.zeros(0)
    whole = 0.0
    for name, matrix in family.of_expert.items():
        square = float(matrix.double().square().sum())
        inside = square * oracles.energy_inside(matrix, basis(name)).numpy()
        rank = min(len(inside), len(total)) or len(inside)
        total = inside[:rank] + (total[:rank] if len(total) else 0)
        whole += square
    return [_round(v) for v in (total / whole).tolist()]


def _random_basis(family: TaskVectors) -> Callable[[str], torch.Tensor]:
    def of(name: str) -> torch.Tensor:
        rows, width = family.base[name].shape
        return oracles.random_directions(name, width, min(rows, width))

    return of
