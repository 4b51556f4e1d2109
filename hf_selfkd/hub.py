"""Uploads to the Hub: what can go wrong in one line, and a folder that is uploaded again."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


HTTPError = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, as the client has it
HUB_ERRORS = (HTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError)
# What stays here: histories, training samples, reports, checkpoints, and files that may hold a token or a path.
IGNORED = ["_*", "*/_*", "checkpoint-*", "*/checkpoint-*", "training_args.bin", "trainer_state.json", ".env*"]


def reason(error: BaseException) -> str:
    """What a failed call of the Hub says, in one line."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    text = " ".join(str(getattr(error, "server_message", None) or error).split())
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token (401)"
    if status == 403:
        return f"{constants.ENDPOINT} does not allow this (403): {text}"
    if status is not None:
        return f"{constants.ENDPOINT} answered {status}: {text}"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{text.rstrip('.')}: {reason(error.__cause__)}"
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {text})"
    return text.rstrip(".")


def is_of_the_hub(error: BaseException) -> bool:
    """Whether an error is one of the Hub; the client makes a `RuntimeError` of a large file whose upload failed."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, HUB_ERRORS)


def push_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    message: str = "Upload model",
) -> str:
    """
    Upload the folder of a model: everything but checkpoints, histories and training arguments of a machine.

    Args:
        folder (`str` or `Path`): that a training has written.
        repo_id (`str`): `user/name`; made if it does not exist.
        token (`str`, *optional*): that of the login by default.
        private (`bool`, *optional*): whether a new repository is private.
        message (`str`, *optional*): of the commit.

    Returns:
        `str`: the address of the commit.

    Raises:
        ValueError: if the folder has no model, or the upload fails.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} has no config.json: choose the folder that `save_model` or a training wrote.")
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message=message, ignore_patterns=IGNORED
        )
    except Exception as error:
        if not is_of_the_hub(error):
            raise
        raise ValueError(f"The upload failed: {reason(error)}. Nothing in {folder} was changed.") from error
    return commit.commit_url
