"""mergekit's own recipes, in our words."""

from lean_merge.recipe.mergekit.translation import Translated, translated

__all__ = ["Translated", "translated"]
