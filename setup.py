"""What pyproject.toml cannot say: the long description is README.md with absolute links.

In a clone the links of README.md lead to files beside it. On the package's page there are no such
files, so each link gets the address of the repository in front.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent


def absolute(markdown: str, repository: str) -> str:
    """Return Markdown whose relative links lead into the repository, pictures to their content."""
    return re.sub(
        r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+\))",
        lambda found: (
            f"{found[1]}{found[2]}{repository}/{'raw' if found[1] else 'blob'}/main/{found[3]}"
        ),
        markdown,
    )


def main() -> None:
    from setuptools import setup

    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.*)"$', settings, re.MULTILINE)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute(text, repository),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
