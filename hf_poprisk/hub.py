"""Publishing: the section of the model card, access-gated repositories, and pushes that fail aloud."""

from __future__ import annotations

import logging
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.training_args import HubStrategy

from hf_poprisk.record import SOURCE

logger = logging.getLogger(__name__)

_WRITTEN = "<!-- this card was written by hand -->"
_SECTION = re.compile(r"\n*<!-- hf_poprisk:begin .*?<!-- hf_poprisk:end -->\n*", re.DOTALL)
_PEFT_TEMPLATE = "# Model Card for Model ID"  # what save_pretrained of an adapter leaves
# the first is of the HTTP client: a bad status, or a connection that broke
UNREACHED = (HfHubHTTPError.__mro__[1], OfflineModeIsEnabled)
CITATION = """\
```bibtex
@article{litman2026theory,
  title   = {A Theory of Generalization in Deep Learning},
  author  = {Litman, E. and Guo, G.},
  journal = {arXiv preprint arXiv:2605.01172},
  year    = {2026}
}
```"""


class HubError(RuntimeError):
    """A push failed; the message says where the model is."""


class HubMixin:
    """Writes the gate's section into model cards; gates repositories; says when a push has failed."""

    _open_when_filled = False  # a repository that was made private only to be gated first

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in transformers; with ``poprisk_hub_access``, the repository is private until it is filled.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the repository cannot be made, gated or written to.
        """
        if not self.is_world_process_zero():
            return
        access, token = self.args.poprisk_hub_access, token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token)
        if access:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self._open_when_filled = _create_private(api, name) and private is not True
        super().init_hf_repo(token, private)  # type: ignore[misc]
        if access:
            api.update_repo_settings(self.hub_model_id, gated=access)
        api.auth_check(self.hub_model_id, write=True)  # one that exists may be readable only

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers.

        Raises:
            HubError: the push failed; the model is complete in ``output_dir``.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        try:
            pushed = super().push_to_hub(  # type: ignore[misc]
                commit_message, blocking, token, revision, private, **kwargs
            )
            if self._open_when_filled and self.is_world_process_zero():
                if not blocking:
                    pushed.result()
                api = HfApi(token=token or self.args.hub_token)
                api.update_repo_settings(self.hub_model_id, private=False)
                self._open_when_filled = False
            return pushed
        except Exception as error:
            # a refused upload or card is the cause of another error
            if not isinstance(error.__cause__ or error, UNREACHED):
                raise
            raise HubError(
                f"the push to {self.hub_model_id} failed ({_reason(error)}); the model is complete in "
                f"{self.args.output_dir}: call trainer.push_to_hub() again."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        earlier = self.push_in_progress.jobs[:] if self.push_in_progress else []
        busy = not self.args.hub_always_push and not all(job.done() for job in earlier)
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or busy:
            return  # as in transformers, and the record stays with the weights that lie there
        # transformers copies a fixed list of files from the checkpoint, and the record is not in it
        self._write_record(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        for job in self.push_in_progress.jobs:
            if job not in earlier:
                job.add_done_callback(self._warn_if_failed)

    def _warn_if_failed(self, push: Future[Any]) -> None:
        """Pushes during training run beside it, and transformers never looks at how they ended."""
        if error := push.exception():
            logger.warning(
                f"a push to {self.hub_model_id} failed ({_reason(error)}); training goes on, and the "
                f"checkpoint is complete in {self.args.output_dir}."
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the stock trainer's, with a section about the gate; one that somebody wrote keeps its text."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        written = path.is_file() and _is_written(path.read_text(encoding="utf-8"))
        if not written:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        card, record = ModelCard.load(path), self._record()
        data = card.data
        data["poprisk"] = {k: record[k] for k in ("source", "optim", "gate", "estimator", "units_per_step")}
        if hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            data.library_name = "peft"
        # The Hub makes base_model: tags itself, and a base that is a folder of this machine is none.
        data.tags = sorted({t for t in data.tags or () if not t.startswith("base_model:")} | {"poprisk"})
        if data.base_model and Path(str(data.base_model)).exists():
            data.base_model = None
        section = f"{_WRITTEN}\n" * written + self._card_section(record)
        body = _SECTION.sub("\n", card.text).strip()
        card.text = f"{body}\n\n<!-- hf_poprisk:begin -->\n{section}\n<!-- hf_poprisk:end -->\n"
        card.save(path)

    def _card_section(self, record: dict[str, Any]) -> str:
        altered, examples = record["data"]["altered_labels"], record["data"]["examples"]
        lines = ["## Population-risk gate", ""]
        if record["gate"] == "none":
            lines += [f"Trained with hf_poprisk and the gate off ({record['optim']})."]
        else:
            lines += [
                f"Trained with hf_poprisk: {record['around'] or 'AdamW'}'s update is written only as far as "
                "the batch's signal beats its leave-one-out noise, G² > Q "
                f"([{SOURCE}](https://arxiv.org/abs/{SOURCE[6:]})).",
                "",
                "| gate | estimator | per step | optimizer steps | open | open on pure noise |",
                "|---|---|---|---|---|---|",
                f"| {record['gate']} | {record['estimator']} | {record['units_per_step']} {record['unit']}s "
                f"| {record['steps']} | {self._open_of_run()} |",
            ]
        if self._label_noise is not None and self._label_noise.fit is not None:
            lines += ["", f"{self._label_noise.found(record['weights_step'])}."]
        if examples is not None:
            share = "" if altered is None else f", {altered / max(examples, 1):.1%} with an altered label"
            lines += ["", f"Training data: {examples:,} examples{share}."]
        return "\n".join([*lines, "", "Everything is in `poprisk_config.json`.", "", CITATION])

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
        return False
    return True


def _is_written(text: str) -> bool:
    """Whether somebody wrote the card: not a trainer, whose cards have our section, and not PEFT."""
    section = _SECTION.search(text)
    return _WRITTEN in section[0] if section else _PEFT_TEMPLATE not in text


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
