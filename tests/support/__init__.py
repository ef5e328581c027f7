"""What several tests need. Its assertions tell as much as those of the tests when they fail."""

import pkgutil

import pytest

pytest.register_assert_rewrite(
    *(f"support.{found.name}" for found in pkgutil.iter_modules(__path__))
)
