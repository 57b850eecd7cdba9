"""AdamW in the eigenbasis of the gradients: the step against the textbook, the bases, and a run with them."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from leave_one_out.helpers import classify, examples, first_gradients, planted, prefer, same, weights
from models import orthogonal, tiny_model, trainer_of
from peft import LoraConfig
from test_optimizer import (
    HYPER,
    assert_same,
    draw_examples,
    groups,
    parameters,
    run_examples,
    set_gradients,
    step,
)
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_poprisk import PopRiskAdamW, risk
from hf_poprisk.eigen import EigenPopRiskAdamW, MeasureBases
from hf_poprisk.gate import null_openness
from hf_poprisk.output_space.preconditioner import kind as preconditioner_kind
from hf_poprisk.per_example import basis, capture

EIGEN: dict[str, Any] = {"poprisk_gate": "none", "poprisk_basis": "eigen"}
adamw_in_basis = partial(PopRiskAdamW, gate="none", basis="eigen")


# The step


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_identity_gives_adamw(dtype: torch.dtype, tolerance: float) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    ours, stock = adamw_in_basis(groups(mine)), torch.optim.AdamW(groups(theirs))
    ours.set_bases({mine[0]: (torch.eye(7), torch.eye(5))})
    for number in range(50):
        set_gradients(mine, number)
        set_gradients(theirs, number)
        ours.step()
        stock.step()
    assert_same(ours, stock, tolerance)


@pytest.mark.parametrize(
    ("gate", "sides"),
    [("none", "both"), ("none", "left"), ("none", "right"), ("hard", "both"), ("soft", "both")],
)
def test_steps_follow_the_textbook(gate: str, sides: str) -> None:
    """Rotate, gate, Adam, rotate back; with weight decay, and clipping, which leaves the gate alone."""
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, gate=gate, basis="eigen", **HYPER)
    left, right = (orthogonal(7) if sides != "right" else None), (orthogonal(5) if sides != "left" else None)
    optimizer.set_bases({params[0]: (left, right)})
    u, v = (torch.eye(n).double() if x is None else x for n, x in ((7, left), (5, right)))
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    opened = 0.0
    for number in range(1, 6):
        examples = draw_examples(params, b=4, seed=number)
        run_examples(optimizer, params, examples)
        optimizer.close_window()
        for p in params:
            p.grad *= 0.3
        optimizer.step()
        optimizer.zero_grad()
        for k, (w, m, s) in enumerate(expected):
            h = torch.stack([example[k] for example in examples])
            if k == 0:
                w, h = u.T @ w @ v, u.T @ h @ v
            q = reference.openness(h, gate)
            opened += q.sum().item()
            w, m, s = reference.adamw_step(w, 0.3 * h.sum(0), q, m, s, number, **HYPER)
            expected[k] = (u @ w @ v.T if k == 0 else w, m, s)
    for p, (w, m, s) in zip(params, expected, strict=True):
        state = optimizer.state[p]
        for got, wanted in ((p, w), (state["exp_avg"], m), (state["exp_avg_sq"], s)):
            torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-11, atol=1e-12)
    logs = optimizer.statistics.pop("examples")
    if gate != "none":
        share = opened / 5 / sum(p.numel() for p in params)
        assert logs["poprisk/fraction_open"] == pytest.approx(share, rel=1e-6)
        assert logs["poprisk/fraction_open_null"] == pytest.approx(null_openness(4, gate))


def test_noise_opens_the_gate_as_often_in_any_basis() -> None:
    p = nn.Parameter(torch.zeros(60, 50))
    optimizer = PopRiskAdamW([p], gate="hard", basis="eigen", lr=0.0)
    optimizer.set_bases({p: (orthogonal(60), orthogonal(50))})
    for seed in range(10):
        step(optimizer, [p], draw_examples([p], b=4, seed=seed, signal=0))
    logs = optimizer.statistics.pop("examples")
    assert logs["poprisk/fraction_open"] == pytest.approx(logs["poprisk/fraction_open_null"], abs=0.01)


def test_a_gated_run_without_a_finite_gradient_says_so() -> None:
    """The state holds bases, and no step."""
    params = parameters()
    optimizer = PopRiskAdamW(params, basis="eigen")
    optimizer.set_bases({params[0]: (orthogonal(7), None)})
    run_examples(optimizer, params, [[torch.full_like(p, float("nan")) for p in params]] * 2)
    with pytest.raises(RuntimeError, match="finite"):
        optimizer.step()


def test_bfloat16_is_rotated_in_float32_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamw_in_basis(params, lr=1e-2)
    u, v = orthogonal(7, torch.float32), orthogonal(5, torch.float32)
    optimizer.set_bases({params[0]: (u, v)})
    set_gradients(params, 0)
    optimizer.step()
    # the first step of Adam is lr · sign, here in the basis
    write = u @ (u.T @ params[0].grad.float() @ v).sign() @ v.T
    before = parameters(torch.bfloat16)[0].detach()
    torch.testing.assert_close(params[0].detach(), before - (1e-2 * write).bfloat16(), rtol=1e-2, atol=1e-2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = copy.deepcopy(params)
    other = adamw_in_basis(copies, lr=1e-2)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.state[copies[0]]["basis_left"], u)
    for mine, held in ((params, optimizer), (copies, other)):
        set_gradients(mine, 1)
        held.step()
    assert_same(optimizer, other)


@pytest.mark.parametrize("gate", ["none", "soft"])
def test_the_gain_is_what_the_step_is_worth_on_the_next_gradient(gate: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, gate=gate, basis="eigen", lr=1e-2, weight_decay=0.0)
    optimizer.keep_written = True
    optimizer.set_bases({params[0]: (orthogonal(7), orthogonal(5))})
    before = [p.detach().clone() for p in params]
    step(optimizer, params, draw_examples(params, b=4))
    set_gradients(params, 1)
    worth = sum(float(((b - p.detach()) * p.grad).sum()) for b, p in zip(before, params, strict=True))
    assert float(risk.gains(optimizer)[0]) == pytest.approx(worth, rel=1e-4)


# The bases


def causal(count: int, length: int = 7) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def sums_of(loss_of: Any, count: int, params: dict[str, nn.Parameter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every parameter ``Σ H_i H_iᵀ`` and ``Σ H_iᵀ H_i``, from a backward per example."""
    sums = {
        name: (torch.zeros(len(p), len(p)), torch.zeros(p.shape[1], p.shape[1])) for name, p in params.items()
    }
    for i in range(count):
        for (left, right), h in zip(
            sums.values(), torch.autograd.grad(loss_of(i), params.values()), strict=True
        ):
            left += h @ h.T
            right += h.T @ h
    return sums


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied", "DPO"])
def test_the_bases_are_orthogonal_and_diagonalise_the_sums(
    kind: str, llama_dir: Path, tmp_path: Path
) -> None:
    """Of the loss of single examples, or of the log-odds of pairs; a vocabulary is not rotated."""
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, **EIGEN}
    if kind == "DPO":
        trainer = prefer("DPO", llama_dir, tmp_path, planted(11)[0], **options)
    else:
        model = tiny_model("gpt2" if kind == "gpt2" else "llama", tied=kind == "tied")
        trainer = trainer_of(tmp_path, causal(11), model, **{**options, "per_device_train_batch_size": 4})
    trainer.train()
    model = trainer.model.eval()

    def objective(i: int) -> Tensor:
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i]]))
        return trainer.label_log_odds(model, batch)[0] if kind == "DPO" else model(**batch).loss

    optimizer = trainer._poprisk_optimizer()
    held = {name: p for name, p in model.named_parameters() if p in optimizer.bases}
    linear = [m for m in model.modules() if hasattr(m, "weight") and type(m).__name__ in ("Linear", "Conv1D")]
    assert len(held) == len(linear) > 8
    for name, (left, right) in sums_of(objective, 11, held).items():
        state = optimizer.state[held[name]]
        vocabulary = any(part in name for part in ("lm_head", "embed", "wte"))
        assert ("basis_left" in state, "basis_right" in state) == (not vocabulary, True)
        for side, total in (("basis_left", left), ("basis_right", right)):
            if side not in state:
                continue
            u, scale = state[side], total.diagonal().max()
            torch.testing.assert_close(u.T @ u, torch.eye(len(u)), rtol=0, atol=1e-5)
            if kind == "tied" and "embed" in name:
                continue  # its gradient is that of the embedding too; the basis is of the head
            turned = u.T @ total @ u
            assert (turned - turned.diagonal().diag()).abs().max() < 1e-4 * scale, (name, side)
            assert turned.diagonal()[0] > 0.99 * turned.diagonal().max() > 0, "leading first"
            assert (total - total.diagonal().diag()).abs().max() > 0.01 * scale, "rotated at all"


class Restless(nn.Module):
    """Draws, counts and drops out, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen_modes.append(self.training)
        self.calls += 1
        hidden = nn.functional.dropout(self.net[0](x), 0.5)
        return {"loss": nn.functional.cross_entropy(self.net[1](hidden), labels)}


seen_modes: list[bool] = []  # of the forward passes of Restless


def test_measuring_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """In eval mode; the same examples and the same random numbers in the first step."""
    found, calls = [], []
    for options in (EIGEN, {"poprisk_gate": "none"}):
        seen_modes.clear()
        trainer = classify(tmp_path, examples(), Restless(), max_steps=2, **options)
        found.append(first_gradients(trainer))
        trainer.train()
        assert seen_modes == [False] * (15 if options is EIGEN else 0) + [True, True]
        calls.append(int(trainer.model.calls))
        assert all(module.training for module in trainer.model.modules())
    assert len(found[0]) == 4 and same(*found)
    assert calls == [2, 2]


# The run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Tensor]]]:
    """The weights at which bases were measured."""
    found, measure = [], MeasureBases._measure
    monkeypatch.setattr(
        MeasureBases, "_measure", lambda self, o: found.append(weights(self._trainer)) or measure(self, o)
    )
    yield found


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_a_resumed_run_is_the_uninterrupted_one(
    gate: str,
    llama_dir: Path,
    tmp_path: Path,
    measured: list[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, without measuring again; with judged labels."""
    monkeypatch.setattr(capture, "_SMALL", 0)  # the way of large layers
    in_basis = {**EIGEN, "poprisk_gate": gate}
    options = {"poprisk_label_noise": "weight", "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    run = partial(prefer, "DPO", llama_dir, tmp_path, planted()[0], **options)
    whole, resumed = run(**in_basis), run(**in_basis)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed))
    assert_same(resumed._poprisk_optimizer(), whole._poprisk_optimizer())
    whole.train()  # a second training of the same model keeps them as well
    assert len(measured) == 1
    what = "AdamW's moments" if gate == "none" else "AdamW's moments and the gate"
    share = f"{what} of 9,632 of 14,736 parameters (15 matrices)"
    assert caplog.text.count(f"poprisk_basis=eigen: {share}") == 3
    if gate != "none":
        assert "one by one" not in caplog.text  # the self-check has compared the squares
        assert 0.1 < whole.state.log_history[1]["poprisk/fraction_open"] < 0.9
        return
    with pytest.raises(ValueError, match="poprisk_basis from 'eigen' to 'coordinate'"):
        run(poprisk_gate="none").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="poprisk_basis from 'eigen' to 'coordinate'"):
        stock = {"optim": "adamw_torch", "poprisk_gate": "hard", "save_strategy": "no", "max_steps": 6}
        prefer("DPO", llama_dir, tmp_path, **stock).train(str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="moments to be loaded are not of basis='coordinate'"):
        run(poprisk_gate="none", poprisk_allow_change=True).train(str(tmp_path / "checkpoint-3"))


def test_it_measures_where_the_leap_has_led(llama_dir: Path, tmp_path: Path, measured: list[Any]) -> None:
    options = {"poprisk_label_noise": "weight", "poprisk_leap": 0.5, "max_steps": 1}
    trainer = prefer("DPO", llama_dir, tmp_path, planted()[0], **options, **EIGEN)
    before = weights(trainer)
    trainer.train()
    assert trainer._label_noise.leap.reached > 0
    assert len(measured) == 1 and not same(measured[0], before)


# Refusals


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(examples())


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_the_streaming_form_is_refused(gate: str, tmp_path: Path) -> None:
    """By the fields and by the optimizer."""
    sentence = "basis='eigen' does not go with {0}estimator='ema': set {0}estimator='example', or"
    with pytest.raises(ValueError, match=f"^poprisk_{sentence.format('poprisk_')} poprisk_basis='coord"):
        options = {"poprisk_basis": "eigen", "poprisk_gate": gate, "poprisk_estimator": "ema"}
        classify(tmp_path, examples(), **options)
    with pytest.raises(ValueError, match=f"^{sentence.format('')} basis='coordinate'"):
        PopRiskAdamW(parameters(), basis="eigen", gate=gate, estimator="ema")


def test_what_has_no_basis_is_refused(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"which an adapter keeps: .* or set poprisk_basis=coordinate\.$"):
        prefer("DPO", llama_dir, tmp_path, peft_config=LoraConfig(), **EIGEN)
    with pytest.raises(ValueError, match="which a stream does not have: .* set poprisk_basis=coordinate"):
        classify(tmp_path, Stream(), max_steps=1, **EIGEN)
    with pytest.raises(ValueError, match="fsdp is not supported .* poprisk_gate=none, poprisk_basis=coord"):
        trainer = classify(tmp_path, examples(), **EIGEN)
        trainer.args.fsdp = "full_shard"
        trainer.train()
    with pytest.raises(ValueError, match="deepspeed is not supported .* poprisk_basis=coordinate"):
        trainer = classify(tmp_path, examples(), **EIGEN)
        trainer.is_deepspeed_enabled = True
        trainer.train()
    data = [{**row, "x": row["x"] * float("nan")} for row in examples()]
    with pytest.raises(ValueError, match=r"nothing to measure \(.* not finite: .*: set poprisk_basis=coord"):
        classify(tmp_path, data, **EIGEN).train()
    monkeypatch.setattr(basis, "LONGEST", 2)
    with pytest.raises(ValueError, match=r"a side that is short enough\): set poprisk_basis=coordinate"):
        classify(tmp_path, examples(), **EIGEN).train()


def test_moments_of_another_basis_are_refused() -> None:
    params = parameters()
    eigen, coordinate = adamw_in_basis(params), PopRiskAdamW(params, gate="none")
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="basis='eigen' has no bases: call set_bases"):
        eigen.step()
    coordinate.step()
    with pytest.raises(ValueError, match="the moments to be loaded are not of basis='eigen'"):
        eigen.load_state_dict(coordinate.state_dict())
    eigen.set_bases({params[0]: (None, torch.eye(5))})
    with pytest.raises(RuntimeError, match="call set_bases before any step"):
        eigen.set_bases({params[0]: (torch.eye(7), None)})
    with pytest.raises(ValueError, match="cannot read a step of poprisk_basis='eigen'"):
        preconditioner_kind(eigen)
    assert copy.deepcopy(eigen).basis == "eigen" and isinstance(eigen, EigenPopRiskAdamW)
