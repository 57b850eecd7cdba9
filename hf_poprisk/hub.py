"""Publishing: the section of the model card, access-gated repositories, and pushes that fail aloud."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers.training_args import HubStrategy
from transformers.utils.hub import PushInProgress
from yaml import YAMLError

from hf_poprisk.arguments import OPTIM
from hf_poprisk.record import SOURCE

logger = logging.getLogger(__name__)

PLOT_NAME = "poprisk_gate.png"
_TAG = "poprisk"
_SECTION = re.compile(r"\n*<!-- hf_poprisk:begin card=(\w+) -->.*<!-- hf_poprisk:end -->\n*", re.DOTALL)
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
            HubError: the repository cannot be made or gated.
        """
        gated = self.args.poprisk_hub_access
        if not self.is_world_process_zero():
            return
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        try:
            if gated:
                created = _create_private(name, token)
                self._open_when_filled = created and private is not True
                if not created:
                    logger.warning(f"{name} exists on the Hub: it is gated, and stays private or public.")
            super().init_hf_repo(token=token, private=True if gated else private)  # type: ignore[misc]
            api = HfApi(token=token)
            if gated:
                api.update_repo_settings(self.hub_model_id, gated=gated)
            api.auth_check(self.hub_model_id, write=True)  # one that exists may be readable only
        except _UNREACHED as error:
            raise HubError(
                f"the repository {name} could not be made ready on the Hub ({_reason(error)}): check "
                "hub_model_id and hub_token, or train with push_to_hub=false and push afterwards."
            ) from error

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
        try:
            pushed = super().push_to_hub(commit_message, blocking, token, *args, **kwargs)  # type: ignore[misc]
            if self._open_when_filled and self.is_world_process_zero():
                if not blocking:
                    pushed.result()
                HfApi(token=token or self.args.hub_token).update_repo_settings(
                    self.hub_model_id, private=False
                )
                self._open_when_filled = False
            return pushed
        except HubError as error:  # transformers makes the repository before it saves the model
            self.save_model(_internal_call=True)  # type: ignore[attr-defined]
            where = f"the model is complete in {self.args.output_dir}."
            raise HubError(f"{str(error).removesuffix('.')}; {where}") from error.__cause__
        except (*_UNREACHED, RuntimeError, ValueError) as error:
            if not isinstance(error, _UNREACHED) and not isinstance(error.__cause__, _UNREACHED):
                raise  # not the Hub: its refusals of an upload or a card are the cause of another error
            raise HubError(
                f"the push to {self.hub_model_id} failed ({_reason(error)}); the model is complete in "
                f"{self.args.output_dir}: call trainer.push_to_hub() again."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        before = self.push_in_progress
        if before is not None and not before.is_done() and not self.args.hub_always_push:
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
        if push is None:
            return
        for job in [job for job in push.jobs if job.done() and job.exception() is not None]:
            push.jobs.remove(job)
            logger.warning(
                f"a push to {self.hub_model_id} failed ({_reason(job.exception())}); training goes on, and "
                f"the checkpoint is complete in {self.args.output_dir}."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in transformers; PEFT writes into the card that it finds, which is not its own."""
        path = Path(output_dir or self.args.output_dir, "README.md")
        card = path.read_bytes() if self.args.should_save and path.is_file() else None
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if card is not None and path.read_bytes() != card:
            path.write_bytes(card)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the stock trainer's, with a section about the gate.

        A card that somebody has written or changed keeps its text; only the section is renewed.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        try:
            generated = not path.is_file() or _is_generated(path.read_text(encoding="utf-8"))
            if generated:
                super().create_model_card(*args, **kwargs)  # type: ignore[misc]
            card = ModelCard.load(path, ignore_metadata_errors=True)
        except (ValueError, YAMLError) as error:
            logger.warning(f"{path} stays as it is, because it cannot be read: {_reason(error)}.")
            return
        self._complete_metadata(card)
        body = _SECTION.sub("\n", card.text).strip() + "\n"
        mark = hashlib.sha256(body.encode()).hexdigest()[:16] if generated else "written"
        section = f"<!-- hf_poprisk:begin card={mark} -->\n{self._card_section()}\n<!-- hf_poprisk:end -->\n"
        card.text = f"{body}\n{section}"
        card.save(path)

    def _complete_metadata(self, card: ModelCard) -> None:
        """Add what is missing or known better here; leave the rest."""
        data, model = card.data, self.accelerator.unwrap_model(self.model)
        tags = [str(tag) for tag in data.tags or ()]
        data.tags = sorted({*(tag for tag in tags if not _names_a_folder(tag)), _TAG})
        adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
        base = (
            getattr(getattr(model, "config", None), "_name_or_path", None)
            if adapter is None
            else adapter.base_model_name_or_path
        )
        if adapter is not None:
            data.library_name = "peft"
        if base and not Path(base).exists():
            data.base_model = data.base_model or base
        elif adapter is not None and data.base_model and Path(str(data.base_model)).exists():
            data.base_model = None  # a folder of this machine is no name
        record = self._record()
        data[_TAG] = {
            name: record[name] for name in ("source", "optim", "gate", "estimator", "units_per_step")
        }
        results = self._evaluation()
        if results:
            data.model_name = data.model_name or Path(self.args.hub_model_id or self.args.output_dir).name
            others = [r for r in data.eval_results or () if r.dataset_type != "evaluation"]
            data.eval_results = others + results

    def _evaluation(self) -> list[EvalResult]:
        """The newest evaluation of every set as model-index entries, timings left out."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        newest: dict[tuple[str, str], float] = {}
        for entry in self.state.log_history:
            # each set has a log of its own, in which TRL's metrics do not bear its name
            of = next((name for name in sets if f"eval_{name}_runtime" in entry), "")
            for name, value in entry.items():
                if name.startswith("eval_"):
                    metric = name.removeprefix("eval_").removeprefix(f"{of}_" if of else "")
                    newest[of, metric] = value
        model = type(self.accelerator.unwrap_model(self.model)).__name__
        task = "text-classification" if "Classification" in model else "text-generation"
        timing = ("runtime", "_per_second", "_time", "num_tokens")
        return [
            EvalResult(
                task_type=task,
                dataset_type="evaluation",
                dataset_name="evaluation data of the training run",
                dataset_split=of or None,
                metric_type=metric,
                metric_value=value,
            )
            for (of, metric), value in sorted(newest.items())
            if isinstance(value, float) and not metric.endswith(timing)
        ]

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
                "| gate | estimator | per step | optimizer steps |",
                "|---|---|---|---|",
                f"| {record['gate']} | {record['estimator']} "
                f"| {record['units_per_step']} {record['unit']}s | {record['steps']} |",
                "",
                *self._gate_table(),
            ]
            Path(self.args.output_dir, PLOT_NAME).unlink(missing_ok=True)  # of an earlier run
            if self._plot():
                lines += ["", f"![share of the update that the gate let through]({PLOT_NAME})"]
        if self._label_noise is not None and self._label_noise.fits:
            lines += ["", f"{self._label_noise.found(self.state.global_step)}."]
        if examples is not None:
            share = (
                "" if altered is None else f", {altered / max(examples, 1):.1%} of them with an altered label"
            )
            lines += ["", f"Training data: {examples:,} examples{share}."]
        return "\n".join([*lines, "", "Everything is in `poprisk_config.json`.", "", _CITATION])

    def _gate_table(self) -> list[str]:
        """What the gate did over the run, by kind of layer."""
        optimizer = self._poprisk_optimizer()
        if optimizer is None:
            return ["No step was gated."]
        parameters = optimizer.statistics.of_run(optimizer.names)["parameters"]
        if not parameters:
            return ["No step was gated."]
        kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for name, entry in parameters.items():
            kinds[_layer_kind(name)].append(entry)
        lines = [
            "| layers | numbers | open | open on pure noise | confirmed share of G² |",
            "|---|---|---|---|---|",
        ]
        for kind, entries in [*sorted(kinds.items()), ("all", list(parameters.values()))]:
            openness, live, energy, noise = (
                sum(column) for column in zip(*(e["sums"] for e in entries), strict=True)
            )
            numel = sum(e["numel"] for e in entries)
            null = sum(e["numel"] * e["fraction_open_null"] for e in entries) / numel
            b = sum(e["examples"] for e in entries) / sum(e["steps"] for e in entries)
            margin = f"{b / (b - 1) * (energy - noise) / energy:.3f}" if b > 1 and energy else ""
            lines.append(f"| {kind} | {numel:,} | {openness / max(live, 1):.3f} | {null:.3f} | {margin} |")
        return lines

    def _plot(self) -> bool:
        """Draw the open share over training; False where there is nothing to draw, or no matplotlib."""
        history = [e for e in self.state.log_history if "poprisk/fraction_open" in e]
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        if not history:
            return False
        figure = Figure(figsize=(6, 3))
        axes = figure.subplots()
        steps = [e["step"] for e in history]
        axes.plot(steps, [e["poprisk/fraction_open"] for e in history], label="open")
        axes.plot(steps, [e["poprisk/fraction_open_null"] for e in history], "k--", label="pure noise")
        axes.set_xlabel("optimizer step")
        axes.set_ylim(0, 1)
        axes.legend()
        figure.savefig(Path(self.args.output_dir, PLOT_NAME), dpi=100, bbox_inches="tight")
        return True


def _create_private(name: str, token: str | None) -> bool:
    """Create a private repository; False if there is one of that name."""
    try:
        HfApi(token=token).create_repo(name, private=True)
    except HfHubHTTPError as error:
        if error.response.status_code == 409:
            return False
        if error.response.status_code in (401, 403) and HfApi(token=token).repo_exists(name):
            return False  # a token may write to a repository and not make one
        raise
    return True


def _is_generated(text: str) -> bool:
    """Whether a card is as a trainer or PEFT left it, so that nothing is lost by making it anew."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    section = _SECTION.search(body)
    if section is None:
        return body.strip().startswith(_PEFT_TEMPLATE)
    rest = _SECTION.sub("\n", body).strip() + "\n"
    return hashlib.sha256(rest.encode()).hexdigest()[:16] == section[1]


def _names_a_folder(tag: str) -> bool:
    """PEFT's ``base_model:adapter:`` with a folder of this machine."""
    return tag.startswith("base_model:") and Path(tag.rsplit(":", 1)[-1]).exists()


def _layer_kind(name: str) -> str:
    """``lora_A`` …, or the layer's own name: ``q_proj``, ``embed_tokens``, ``input_layernorm``."""
    parts = name.split(".")
    adapter = [part for part in parts if part.startswith("lora_")]
    return adapter[0] if adapter else next((p for p in reversed(parts[:-1]) if not p.isdecimal()), name)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
