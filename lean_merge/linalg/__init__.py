"""Pure mathematics on torch tensors: Krylov subspaces, spectra, nuclear norms, similarity.

Nothing here knows of files or holds a whole matrix. The code asks for a `Pass`; the matrix's owner
makes one pass over its rows and hands back the `Products`.
"""

from lean_merge.linalg.krylov import BlockKrylov, Deflation
from lean_merge.linalg.magnitudes import counting_bytes, largest_magnitudes
from lean_merge.linalg.null import Split, null_cdf, null_quantile, otsu_split, uniform_distance
from lean_merge.linalg.passes import Pass, Products, Reduction, gram64, random_block
from lean_merge.linalg.similarity import (
    Omitted,
    corresponding_cosines,
    importance,
    log_omitted,
    omitted_errors,
)
from lean_merge.linalg.sketch import SingularSums, Sketch
from lean_merge.linalg.spectrum import exact_spectrum, numerical_rank
from lean_merge.linalg.truncation import Truncation, truncate

__all__ = [
    "BlockKrylov",
    "Deflation",
    "Omitted",
    "Pass",
    "Products",
    "Reduction",
    "SingularSums",
    "Sketch",
    "Split",
    "Truncation",
    "corresponding_cosines",
    "counting_bytes",
    "exact_spectrum",
    "gram64",
    "importance",
    "largest_magnitudes",
    "log_omitted",
    "null_cdf",
    "null_quantile",
    "numerical_rank",
    "omitted_errors",
    "otsu_split",
    "random_block",
    "truncate",
    "uniform_distance",
]
