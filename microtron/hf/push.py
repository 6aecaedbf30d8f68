"""``microtron push``: uploads an exported folder to the Hugging Face hub, as one commit.

    microtron convert to-hf outputs/debug exports/debug
    microtron push exports/debug me/debug --private

huggingface_hub does the work and finds the token itself (HF_TOKEN, or `hf auth login`); here it is
never read into anything that is printed or written. Only files of an export are sent: a folder
that holds anything else is refused, so that no pickle, log or .env goes out by accident.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtron.data.optional import import_package
from microtron.errors import UserError
from microtron.hf.folder import Folder

MAY_BE_SENT = re.compile(
    r"config\.json|generation_config\.json|README\.md|LICENSE(\.txt|\.md)?|\.gitattributes"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model"
)


def push(
    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")],
    private: bool = False,
    revision: str = "main",
    message: str = "Upload by microtron",
) -> str:
    """Uploads an exported folder to the hub; the repository is made if it is not there.

    Args:
        ckpt: A folder that `microtron convert to-hf` wrote.
        repo: The repository.
        private: Make it private, if it is made now.
        revision: Branch to commit to; made if it is not there.
        message: The commit's message.

    Returns: the commit's address. Raises: UserError for a folder that is no export or holds more
        than one; no token, a refused one, no such repository, no network.
    """
    folder = Path(ckpt).expanduser()
    names = files_of(folder)
    hub = import_package("huggingface_hub")
    _check_name(repo)
    if not sys.stderr.isatty():
        import_package("huggingface_hub.utils").disable_progress_bars()
    with _one_line(repo):
        api = hub.HfApi()
        if hub.get_token() is None:
            raise UserError(
                "no token for the hub: set HF_TOKEN, or run `hf auth login` once, and try again"
            )
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        files = [hub.CommitOperationAdd(file, folder / file) for file in names]
        commit = api.create_commit(name, files, commit_message=message, revision=revision)
    print(f"pushed {folder} to {name}: {len(names)} files, {commit.commit_url}")
    return commit.commit_url


def _check_name(repo: str) -> None:
    """Raises: UserError for what cannot name a repository."""
    validators = import_package("huggingface_hub.utils")
    try:
        validators.validate_repo_id(repo)
    except validators.HFValidationError:
        raise UserError(
            f"{repo!r} cannot name a repository of the hub: give USER/NAME, of letters, digits, "
            "'-', '_' and '.'"
        ) from None


def files_of(folder: Path) -> list[str]:
    """The names of an export's files.

    Raises: UserError: it is a checkpoint, or incomplete, or holds what an export does not.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that `microtron convert to-hf` wrote")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json, so it is no export: run `microtron convert to-hf "
            f"{folder} OUT`, then push OUT"
        )
    names = sorted(path.name for path in folder.iterdir())
    strange = [
        name
        for name in names
        if not MAY_BE_SENT.fullmatch(name)
        or (folder / name).is_symlink()
        or not (folder / name).is_file()
    ]
    if strange:
        raise UserError(
            f"{folder} holds what is no part of an export ({', '.join(strange)}): move it out, or "
            "push a folder with the export alone"
        )
    Folder(folder)  # whole: index, shards, lengths
    return names


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Whatever the hub or the network says, in one line. Raises: UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # requests', httpx's and the library's own, by version
        raise UserError(f"push to {repo}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    chain = list(_chain(error))
    names = {type(link).__name__ for link in chain}
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set; unset it to reach the hub"
    answered = next((link for link in chain if _status(link)), None)
    remedies = {
        400: "the hub refuses the request",
        401: "the hub does not accept the token; make a new one with write access and set HF_TOKEN",
        403: "the token may not write there; use one with write access, or another repository",
        404: "there is no such repository or user for this token; check the name",
    }
    if answered is not None:
        status = _status(answered)
        said = _first_line(getattr(answered, "server_message", None) or str(answered))
        return f"{remedies.get(status, 'the hub failed; try again later')} ({status}: {said})"
    if names & {"ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "NetworkError"}:
        return f"the hub cannot be reached ({_first_line(str(chain[0]))}); check the network"
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Any) -> int | None:  # noqa: ANN401
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(text: str) -> str:
    return next((line.strip()[:160] for line in text.splitlines() if line.strip()), "nothing said")
