"""Measures a model of the embedded family; prints its shares of right answers as one JSON object.

    python bench/skills.py FOLDER [--problems 500]

FOLDER holds a whole model: that of a merge, of a point of a sweep, or one of
lean_merge/demo/family. The problems are held out, and the same for every model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lean_merge.demo.evaluate import evaluate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=500, help="Of each task.")
    given = parser.parse_args()
    scores = evaluate(given.folder, problems=given.problems)
    print(json.dumps({task: accuracy.share for task, accuracy in scores.items()}))


if __name__ == "__main__":
    main()
