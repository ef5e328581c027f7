"""The command push, which uploads an output to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lean_merge.cli.app import app, echo
from lean_merge.cli.helping import MERGING, OUTPUT, RUN
from lean_merge.cli.options import Debug, Quiet, option
from lean_merge.errors import LeanMergeError, OutputError, RecipeError, plain, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OURS = {"README.md", "lean_merge_recipe.yml", "lean_merge_report.json"}
"""Files that lean-merge wrote and that name the models, if they are there."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@app.command("push", rich_help_panel=MERGING)
def push_command(
    out: Annotated[
        Path, typer.Argument(help="The folder of a complete output.", rich_help_panel=OUTPUT)
    ],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME", help="The repository, made if need be.", rich_help_panel=OUTPUT
        ),
    ],
    public: Annotated[
        bool, option(OUTPUT, "--public", help="Let everybody see the repository.")
    ] = False,
    yes: Annotated[
        bool, option(RUN, "--yes", help="Do not ask before something becomes public.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a complete output to the Hugging Face Hub, into a private repository.

    The journal stays on this machine. Where the model card, the recipe or the report name a model
    by its folder, only the last part of it is uploaded. Log in first with `hf auth login`.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise RecipeError(f"{shown(repository)} is no repository; write ORG/NAME.")
    files = list(_files(out))
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        known = _visible_to_all(api, repository)
        shown_to_all = public or known is True
        if shown_to_all and not yes:
            _ask(repository, already=known is True)
        if known is None:
            api.create_repo(repository, private=not public, exist_ok=False)
        api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files],
            commit_message="Upload a merge made by lean-merge",
        )
        if known is False and public:
            api.update_repo_settings(repository, private=False)
    except (LocalTokenNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        raise LeanMergeError(
            f"{repository}: the upload failed ({said}). Log in with `hf auth login`, with a token "
            "that may write; the same command then goes on."
        ) from error
    if not quiet:
        echo(f"{api.endpoint}/{repository} ({'public' if shown_to_all else 'private'})")


def _visible_to_all(api: HfApi, repository: str) -> bool | None:
    """Return whether everybody sees the repository; None if there is none yet."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(repository).private
    except RepositoryNotFoundError:
        return None


def _ask(repository: str, *, already: bool) -> None:
    """Ask whether a public repository is meant; raise typer.Abort if not.

    Raises
    ------
    RecipeError
        Nobody can answer.
    """
    fact = f"{repository} {'is' if already else 'will be'} public: everybody can see the model"
    if not sys.stdin.isatty():
        raise RecipeError(f"{fact}. Say --yes if that is meant.")
    if not typer.confirm(f"{plain(fact)}. Upload it?"):
        raise LeanMergeError("Nothing was uploaded.")


def _files(out: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Yield what is uploaded: a name in the repository, and a file or other content for it.

    In files of ours that name a model by its folder, the folder's last part stands instead.

    Raises
    ------
    OutputError
        The folder holds no complete model or adapter.
    """
    from lean_merge.store.journal import JOURNAL
    from lean_merge.store.state import State, look

    state, journal = look(out)
    if state is State.UNFINISHED:
        raise OutputError(f"{out} is unfinished; the command that began it continues it.")
    if state is not State.COMPLETE or journal is None or not any(out.glob("*model*.safetensors")):
        raise OutputError(f"{out} is no complete model or adapter that lean-merge wrote.")
    run = journal.start["run"]
    recipe = run["recipe"]
    models = [recipe["base_model"], recipe.get("mllm_model")]
    models += [each.get(key) for each in recipe["experts"] for key in ("model", "parent")]
    folders = {model for model in models if model and Path(model).expanduser().is_absolute()}
    folders |= {str((out / role["path"]).resolve()) for role in run["inputs"]}
    for file in sorted(each for each in out.rglob("*") if each.is_file()):
        name = file.relative_to(out).as_posix()
        if name == JOURNAL or name.startswith("."):
            continue
        yield name, _without(folders, file) if name in _OURS else file


def _without(folders: set[str], file: Path) -> bytes:
    """Return a file's text with the last parts of folders in their places."""
    text = file.read_text(encoding="utf-8")
    # A folder may lie in another, so that the longest name goes first.
    for folder in sorted(folders, key=len, reverse=True):
        for spelt in (folder, json.dumps(folder)[1:-1]):
            text = text.replace(spelt, Path(folder).name)
    return text.encode("utf-8")
