"""Pure mathematics on torch tensors: Krylov subspaces, spectra, nuclear norms, similarity.

Nothing here knows of files or holds a whole matrix. The code asks for a `Pass`; the matrix's owner
makes one pass over its rows and hands back the `Products`.

This package itself has what engine and methods agree on. Methods import what they compute with
from the modules.
"""

from lean_merge.linalg.passes import Pass, Products, Reduction, gram64, random_block

__all__ = ["Pass", "Products", "Reduction", "gram64", "random_block"]
