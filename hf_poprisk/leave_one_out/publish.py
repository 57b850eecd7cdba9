"""Judged labels on the Hub, as a data set."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from hf_poprisk.hub import CITATION, UNREACHED
from hf_poprisk.leave_one_out.report import rate
from hf_poprisk.leave_one_out.table import Run
from hf_poprisk.user_errors import UserError, one_line

_CARD = """\
---
tags:
- poprisk
- label-noise
---

# Labels of {data}, judged by {model}

How likely each label is correct, by what the other examples say of it: `hf-poprisk judge`, without training.

{rate}

`judged.parquet` has a row per example: `index` (its `example_index`, or its position in the data),
`p_correct` in [0, 1], `log_odds` (leave-one-out, in nats), `rank` (0 is the most suspicious) and `weight`.
`report.html` shows the most suspicious ones with their texts.

{citation}
"""


def make_repository(name: str) -> str:
    """A private data set repository, or the one that is there, as it is; its whole name.

    Raises:
        UserError: it cannot be made or written to.
    """
    api = HfApi()
    try:
        repo = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True).repo_id
        api.auth_check(repo, repo_type="dataset", write=True)
    except (*UNREACHED, ValueError) as error:  # of a name that is none
        raise UserError(f"--push_to_hub {name} cannot be made or written to ({one_line(error)}).") from error
    return repo


def push(repo: str, run: Run, files: list[Path], data: str, model: str) -> str:
    """Upload the files of a judged run with a card; the address of the commit.

    Args:
        data, model: their names; of a folder or a file of this machine the last part is said.

    Raises:
        UserError: the push failed.
    """
    named = {
        what: Path(name).name if Path(name).exists() else name
        for what, name in (("data", data), ("model", model))
    }
    card = _CARD.format(**named, rate="\n".join(rate(run)), citation=CITATION)
    operations = [CommitOperationAdd(file.name, file) for file in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    try:
        return (
            HfApi()
            .create_commit(repo, operations, commit_message="Judged labels", repo_type="dataset")
            .commit_url
        )
    except (*UNREACHED, RuntimeError) as error:
        raise UserError(
            f"the push to {repo} failed ({one_line(error)}), and {run.folder} is complete: hf upload {repo} "
            f"{run.folder} --repo-type dataset."
        ) from error
