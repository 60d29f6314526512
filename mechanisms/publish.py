"""A finished result -> a repository on the Hugging Face Hub: the files of the result, and nothing else.

Trainer's own upload would take what lies beside them, checkpoints and a pickle of all arguments with the token in it.
Here the token stays where `hf auth login` or HF_TOKEN has it; huggingface_hub reads it, and nothing writes it.
"""

import contextlib
import os
import shlex

from mechanisms import card
from mechanisms.errors import UserError, first_line
from mechanisms.hubs import uses_modelscope

PRIVATE_FILES = "rejected.jsonl", "trainer_state.json"  # records of the data, paths of this machine


def without_push(args):
    """Flags of a program that have no effect without --push_to_hub, as lines."""
    return [f"--{name} has no effect without --push_to_hub" for name in ("hub_model_id", "hub_private_repo")
            if getattr(args, name) is not None and not args.push_to_hub]


def check_account():
    """Raises UserError if this machine may not upload: told before the work, not after it."""
    from huggingface_hub import HfApi, constants, get_token  # takes a while to import

    if uses_modelscope():
        raise UserError("--push_to_hub uploads to the Hugging Face Hub, and MODELSCOPE is set: leave one of them out")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub needs the network, and HF_HUB_OFFLINE is set: leave one of them out")
    if not get_token():
        raise UserError("--push_to_hub: this machine has no token of the Hugging Face Hub: hf auth login, or set "
                        "HF_TOKEN, with a token that may write")
    with _told(f"--push_to_hub: {constants.ENDPOINT} does not take the token of this machine"):
        HfApi().whoami()


def make_repository(name, private):
    """Make the repository, if it is not there, before the work: who may not is told now. -> its full name, USER/NAME.

    Raises UserError.
    """
    from huggingface_hub import HfApi

    with _told(f"--hub_model_id {name}: no repository of that name can be made or written"):
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id


def repository_of(args):
    """The repository that a training with these arguments uploads to, made if it is not there; or None."""
    if not args.uploads or args.dry_run:
        return None
    return make_repository(args.hub_model_id or default_name(args.output_dir), args.hub_private_repo)


def upload(folder, names, repository):
    """Upload these files of `folder`, in one commit. -> the address of the repository. Raises UserError."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    names = sorted(set(names) - set(PRIVATE_FILES))
    files = {name: os.path.join(folder, name) for name in names}
    if "README.md" in files:
        with open(files["README.md"], encoding="utf-8") as file:
            files["README.md"] = card.for_the_hub(file.read()).encode()
    again = ["hf", "upload", repository, str(folder), "--include", *names]
    with _told(f"{folder} is finished, and not uploaded. To try again: {shlex.join(again)}\n       {repository}"):
        HfApi().create_commit(repository, commit_message=f"Upload {default_name(folder)}", operations=[
            CommitOperationAdd(name, content) for name, content in files.items()])
    return f"{constants.ENDPOINT}/{repository}"


def default_name(folder):
    """The name of the repository for the result in `folder`, if none is given."""
    return os.path.basename(os.path.abspath(folder))


@contextlib.contextmanager
def _told(message):
    """What fails meanwhile is a UserError. Errors of the Hub, of connecting and of uploading have no type in common."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{message}: {first_line(error.__cause__ or error)}") from error
