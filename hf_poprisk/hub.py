"""Publishing: the section of the model card, access-gated repositories, and pushes that fail aloud."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.training_args import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_poprisk.arguments import OPTIM
from hf_poprisk.record import SOURCE

logger = logging.getLogger(__name__)

_WRITTEN = "<!-- this card was written by hand -->"
_SECTION = re.compile(r"\n*<!-- hf_poprisk:begin .*?<!-- hf_poprisk:end -->\n*", re.DOTALL)
_PEFT_TEMPLATE = "# Model Card for Model ID"  # what save_pretrained of an adapter leaves
# the first is of the HTTP client: a bad status, or a connection that broke
_UNREACHED = (HfHubHTTPError.__mro__[1], OfflineModeIsEnabled)
_CITATION = """\
```bibtex
@article{litman2026theory,
  title   = {A Theory of Generalization in Deep Learning},
  author  = {Litman, E. and Guo, G.},
  journal = {arXiv preprint arXiv:2605.01172},
  year    = {2026}
}
```"""


class HubError(RuntimeError):
    """The Hub refused or could not be reached; the message says what is safe and what to do."""


class HubMixin:
    """Writes the gate's section into model cards; gates repositories; says when a push has failed."""

    _open_when_filled = False  # a repository that was made private only to be gated first

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in transformers; with ``poprisk_hub_access``, the repository is private until it is filled.

        Raises:
            HubError: the repository cannot be made, gated or written to.
        """
        if not self.is_world_process_zero():
            return
        access, token = self.args.poprisk_hub_access, token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        api = HfApi(token=token)
        with _told(
            f"the repository {name} could not be made ready on the Hub",
            ": check hub_model_id and hub_token, or train with push_to_hub=false and push afterwards.",
        ):
            if access:
                self._open_when_filled = _create_private(api, name) and private is not True
            super().init_hf_repo(token=token, private=True if access else private)  # type: ignore[misc]
            if access:
                api.update_repo_settings(self.hub_model_id, gated=access)
            api.auth_check(self.hub_model_id, write=True)  # one that exists may be readable only

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers.

        Raises:
            HubError: the push failed; the model is complete in ``output_dir``.
        """
        with _told(
            f"the push to {self.hub_model_id} failed",
            f"; the model is complete in {self.args.output_dir}: call trainer.push_to_hub() again.",
        ):
            pushed = super().push_to_hub(commit_message, blocking, token, *args, **kwargs)  # type: ignore[misc]
            if self._open_when_filled and self.is_world_process_zero():
                if not blocking:
                    pushed.result()
                api = HfApi(token=token or self.args.hub_token)
                api.update_repo_settings(self.hub_model_id, private=False)
                self._open_when_filled = False
            return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        before = self.push_in_progress
        busy = before is not None and not before.is_done() and not self.args.hub_always_push
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or busy:
            return  # as in transformers, and the record stays with the weights that lie there
        # transformers copies a fixed list of files from the checkpoint, and the record is not in it
        self._write_record(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        self._report_failed_pushes(before)  # done, or still among those in progress

    def _finish_current_push(self) -> None:
        super()._finish_current_push()  # type: ignore[misc]
        self._report_failed_pushes(getattr(self, "push_in_progress", None))

    def _report_failed_pushes(self, push: PushInProgress | None) -> None:
        """Pushes during training run beside it, and transformers never looks at how they ended."""
        for job in [job for job in push.jobs if job.done() and job.exception()] if push else ():
            push.jobs.remove(job)
            logger.warning(
                f"a push to {self.hub_model_id} failed ({_reason(job.exception())}); training goes on, and "
                f"the checkpoint is complete in {self.args.output_dir}."
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the stock trainer's, with a section about the gate; one that somebody wrote keeps its text."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        card = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
        written = card is not None and _is_written(card.text)
        if not written:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
            card = ModelCard.load(path, ignore_metadata_errors=True)
        self._complete_metadata(card.data)
        section = f"{_WRITTEN}\n" * written + self._card_section()
        body = _SECTION.sub("\n", card.text).strip()
        card.text = f"{body}\n\n<!-- hf_poprisk:begin -->\n{section}\n<!-- hf_poprisk:end -->\n"
        card.save(path)

    def _complete_metadata(self, data: Any) -> None:
        """Add the gate, and an adapter's base unless it is a folder of this machine."""
        record = self._record()
        data["poprisk"] = {k: record[k] for k in ("source", "optim", "gate", "estimator", "units_per_step")}
        # PEFT's base_model:adapter:… may hold a folder too, and the Hub makes these tags itself
        tags = (tag for tag in map(str, data.tags or ()) if not tag.startswith("base_model:"))
        data.tags = sorted({*tags, "poprisk"})
        for adapter in getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values():
            data.library_name = "peft"
            data.base_model = data.base_model or adapter.base_model_name_or_path
        if data.base_model and Path(str(data.base_model)).exists():
            data.base_model = None

    def _card_section(self) -> str:
        record = self._record()
        altered, examples = record["data"]["altered_labels"], record["data"]["examples"]
        lines = ["## Population-risk gate", ""]
        if record["optim"] != OPTIM or record["gate"] == "none":
            lines += [f"Trained with hf_poprisk and the gate off ({record['optim']})."]
        else:
            lines += [
                "Trained with hf_poprisk: AdamW's update is written only as far as the batch's signal beats "
                f"its leave-one-out noise, G² > Q ([{SOURCE}](https://arxiv.org/abs/{SOURCE[6:]})).",
                "",
                "| gate | estimator | per step | optimizer steps | open | open on pure noise |",
                "|---|---|---|---|---|---|",
                f"| {record['gate']} | {record['estimator']} | {record['units_per_step']} {record['unit']}s "
                f"| {record['steps']} | {self._open_of_run()} |",
            ]
        if self._label_noise is not None and self._label_noise.fit is not None:
            lines += ["", f"{self._label_noise.found()}."]
        if examples is not None:
            share = "" if altered is None else f", {altered / max(examples, 1):.1%} with an altered label"
            lines += ["", f"Training data: {examples:,} examples{share}."]
        return "\n".join([*lines, "", "Everything is in `poprisk_config.json`.", "", _CITATION])

    def _open_of_run(self) -> str:
        """Two cells: the mean openness of the run, and what it would be without any signal."""
        optimizer = self._poprisk_optimizer()
        entries = optimizer.statistics.of_run(optimizer.names)["parameters"].values() if optimizer else ()
        if not entries:
            return "– | –"
        opened, live = (sum(e["sums"][k] for e in entries) for k in (0, 1))
        noise = sum(e["numel"] * e["fraction_open_null"] for e in entries) / sum(e["numel"] for e in entries)
        return f"{opened / max(live, 1):.3f} | {noise:.3f}"


def _create_private(api: HfApi, name: str) -> bool:
    """Create a private repository; False if there is one of that name, which stays private or public."""
    try:
        api.create_repo(name, private=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        logger.warning(f"{name} exists on the Hub: it is gated, and stays private or public.")
        return False
    return True


def _is_written(text: str) -> bool:
    """Whether somebody wrote the card: not a trainer, whose cards have our section, and not PEFT."""
    section = _SECTION.search(text)
    return _WRITTEN in section[0] if section else not text.strip().startswith(_PEFT_TEMPLATE)


@contextmanager
def _told(what: str, way_out: str) -> Iterator[None]:
    """Make one sentence of what the Hub refuses, with its reason between the two parts."""
    try:
        yield
    except HubError:  # from within
        raise
    except (*_UNREACHED, RuntimeError, ValueError) as error:
        # its refusals of an upload or a card are the cause of another error
        if not isinstance(error, _UNREACHED) and not isinstance(error.__cause__, _UNREACHED):
            raise
        raise HubError(f"{what} ({_reason(error)}){way_out}") from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
