"""`hf-selfkd push`: upload the folder of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import one_line_errors


def push(
    folder: Annotated[Path, typer.Argument(help="Of the model, as a training wrote it.")],
    repo_id: Annotated[str, typer.Option(help="user/name; made if it does not exist.")],
    token: Annotated[str | None, typer.Option(help="If not that of the login.", envvar="HF_TOKEN")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
) -> None:
    """
    Upload model, tokenizer and card to the Hub; checkpoints and histories stay here.

    hf-selfkd push outputs/images --repo-id me/digits
    """
    from ..hub import push_folder

    with one_line_errors():
        typer.echo(f"Uploaded: {push_folder(folder, repo_id, token, private or None, message)}")
