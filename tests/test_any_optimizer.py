"""PopRiskGate: the gate around other optimizers, in a loop and in the trainers."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from accelerate import Accelerator
from models import layout, rows, tiny_model, trainer_of
from pytorch_optimizer import MADGRAD, SOAP, Lion, Lookahead, ScheduleFreeAdamW
from test_checkpoints import OPTIONS, assert_same, resume
from test_optimizer import NAN, draw_examples, groups, parameters, run_examples, step
from torch import nn
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Muon, Optimizer, RMSprop

from hf_poprisk import PopRiskAdamW, PopRiskGate, load_record

Make = Callable[[list[nn.Parameter]], Optimizer]
# of LoRA+, say, groups have rates of their own
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: AdamW(groups(params)),
    "adafactor": partial(Adafactor, lr=0.01),
    "rmsprop": partial(RMSprop, lr=0.01),
    "muon": lambda params: Muon(params[:1], lr=0.01),
    "lion": partial(Lion, lr=0.01, weight_decay=0.1),
    "soap": partial(SOAP, lr=0.01),
}


def feed(params: list[nn.Parameter], seed: int) -> list[list[torch.Tensor]]:
    return draw_examples(params, b=4, seed=seed, signal=0.1)


def same(params: list[nn.Parameter], others: list[nn.Parameter]) -> bool:
    return all(map(torch.equal, params, others))


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_around_adamw_it_is_poprisk_adamw(gate: str) -> None:
    mine, theirs = parameters(), parameters()
    gated = PopRiskGate(AdamW(mine, lr=1e-2, weight_decay=0.0, fused=True), gate=gate)
    ours = PopRiskAdamW(theirs, lr=1e-2, weight_decay=0.0, gate=gate)
    for seed in range(10):
        for optimizer, params in ((gated, mine), (ours, theirs)):
            run_examples(optimizer, params, feed(params, seed))
            optimizer.close_window()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for p, w in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                gated.state[p]["exp_avg"], ours.state[w]["exp_avg"], rtol=1e-6, atol=1e-7
            )
    assert gated.statistics.pop("examples") == ours.statistics.pop("examples")


@pytest.mark.parametrize("gate", ["none", "hard"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_gate_and_with_an_open_one_it_is_the_inner_one_to_the_bit(name: str, gate: str) -> None:
    mine, theirs = parameters(), parameters()
    gated, stock = PopRiskGate(OPTIMIZERS[name](mine), gate=gate), OPTIMIZERS[name](theirs)
    for seed in range(5):
        examples = [feed(mine, seed)[0]] * 4  # all agree
        run_examples(gated, mine, examples)
        for p, w in zip(mine, theirs, strict=True):
            w.grad = p.grad.clone()
        gated.step()
        gated.zero_grad()
        stock.step()
    assert same(mine, theirs) and not same(mine[:1], parameters()[:1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_write_is_gated_and_the_state_is_not(name: str) -> None:
    """From where it stands, each step writes q times what the inner optimizer would, decay included."""
    params = parameters()
    gated = PopRiskGate(OPTIMIZERS[name](params))
    for seed in range(4):
        twins, state, its_groups = copy.deepcopy((params, gated.state, gated.param_groups))
        twin = object.__new__(type(gated.inner))  # copies of some optimizers lack attributes
        vars(twin).update(vars(gated.inner), state=state, param_groups=its_groups)
        examples = feed(params, seed)
        run_examples(gated, params, examples)
        for p, w in zip(params, twins, strict=True):
            w.grad = p.grad.clone()
        before = [p.detach().clone() for p in params]
        gated.step()
        twin.step()
        held = [p for group in gated.param_groups for p in group["params"]]
        closed = 0
        for k, p in enumerate(params[: len(held)]):
            q = reference.openness(torch.stack([e[k] for e in examples])).float()
            closed += int((q == 0).sum())
            assert torch.equal(p, torch.where(q > 0, twins[k], before[k]))
            for key, value in gated.state[p].items():
                torch.testing.assert_close(value, twin.state[twins[k]][key], rtol=0, atol=0)
        assert closed > 5
        gated.zero_grad()
    assert gated.statistics.pop("examples")["poprisk/examples"] == 4


def test_ungated_parameters_and_bad_gradients() -> None:
    params, twins = parameters(), parameters()
    gated, stock = PopRiskGate(SGD(params, lr=0.1), ungated=params[1:2]), SGD(twins, lr=0.1)
    run_examples(gated, params, feed(params, 0))
    for p, w in zip(params, twins, strict=True):
        w.grad = p.grad.clone()
    gated.step()
    gated.zero_grad()
    stock.step()
    assert same(params[1:2], twins[1:2]) and not same(params[:1], twins[:1])
    before = copy.deepcopy(params)
    bad = feed(params, 1)
    for h in bad[2]:  # all of it, but not in the first step
        h.fill_(NAN)
    step(gated, params, bad)
    assert same(params, before) and gated.statistics.pop("examples")["poprisk/steps_skipped"] == 1


def test_schedulers_groups_copies_and_checkpoints_are_the_inner_ones() -> None:
    params = parameters()
    inner = SGD(groups(params), momentum=0.9)
    gated = PopRiskGate(inner)
    schedule = torch.optim.lr_scheduler.LambdaLR(gated, lambda n: 0.5**n)
    step(gated, params, feed(params, 0))
    schedule.step()
    assert inner.param_groups[1]["lr"] == 3e-3 * 0.5 and gated.param_groups is inner.param_groups
    twins, twin = copy.deepcopy((params, gated))
    fresh = parameters()
    other = PopRiskGate(SGD(groups(fresh), momentum=0.9))
    with torch.no_grad():
        for p, w in zip(fresh, params, strict=True):
            p.copy_(w)
    other.load_state_dict(copy.deepcopy(inner.state_dict()))
    for optimizer, ps in ((gated, params), (twin, twins), (other, fresh)):
        step(optimizer, ps, feed(ps, 1))
    assert same(params, twins) and same(params, fresh) and twin.gate == "hard"
    extra = nn.Parameter(torch.zeros(3))
    gated.add_param_group({"params": [extra]})
    assert any(extra is p for p in gated.gated_parameters)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda ps: ASGD(ps), ValueError, r"the state of ASGD holds weights \(ax\): use another"),
        (lambda ps: MADGRAD(ps), ValueError, r"the state of MADGRAD holds weights \(x0\)"),
        (lambda ps: ScheduleFreeAdamW(ps), ValueError, "evaluates other weights than it trains"),
        (lambda ps: Lookahead(SGD(ps)), ValueError, "Lookahead steps SGD: put PopRiskGate around that one"),
        (lambda ps: Accelerator(cpu=True).prepare(SGD(ps)), ValueError, "AcceleratedOptimizer steps SGD"),
        (lambda ps: LBFGS(ps), ValueError, r"LBFGS takes no step on its own \(.*closure"),
        (lambda ps: PopRiskAdamW(ps), TypeError, "an optimizer without a gate; got PopRiskAdamW"),
        (lambda ps: ps, TypeError, "got list"),
    ],
)
def test_optimizers_that_cannot_be_gated_are_refused(make: Any, error: type[Exception], said: str) -> None:
    params = parameters()
    inner = make(params)
    with pytest.raises(error, match=said):
        PopRiskGate(inner)
    if error is ValueError:
        PopRiskGate(inner, gate="none")  # which only passes it on
        assert same(params, parameters())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="^gate must be one of"):
        PopRiskGate(SGD(parameters()), gate="open")
    with pytest.raises(ValueError, match="^estimator='ema' reads AdamW's moments"):
        PopRiskGate(SGD(parameters()), estimator="ema")
    with pytest.raises(ValueError, match="^every parameter is ungated"):
        PopRiskGate(SGD(params := parameters()), ungated=params)


# In the trainers


@pytest.mark.parametrize("optim", ["rmsprop", "adafactor", "adamw_torch"])
def test_a_stock_optim_with_a_gate(optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Given by name it is on, in logs, record and card; a resumed run is the uninterrupted one."""

    def build(**options: Any) -> Any:
        return trainer_of(tmp_path, rows(10), tiny_model(), **{**OPTIONS, "optim": optim, **options})

    gate = {"poprisk_gate": "hard", "poprisk_exclude": ["norm"]}
    whole, resumed, plain = build(**gate), build(**gate), build(save_strategy="no")
    with caplog.at_level(logging.WARNING):
        whole.train()
    inner = type(whole._poprisk_optimizer().inner).__name__
    assert f"population-risk gate: hard around {inner}, estimator=example, 4 examples per step" in caplog.text
    plain.train()
    assert plain._poprisk_optimizer() is None
    assert not same(list(whole.model.parameters()), list(plain.model.parameters()))
    assert 0.1 < whole.state.log_history[0]["poprisk/fraction_open"] < 0.9
    assert_same(whole, resume(resumed, tmp_path / "checkpoint-2"))
    config = load_record(tmp_path / "checkpoint-5").config
    assert (config["optim"], config["gate"], config["around"]) == (optim, "hard", inner)
    assert load_record(tmp_path / "checkpoint-5").statistics["parameters"]
    with pytest.raises(ValueError, match="poprisk_gate from 'hard' to 'soft'"):
        build(poprisk_gate="soft", poprisk_exclude=["norm"]).train(str(tmp_path / "checkpoint-5"))
    with pytest.raises(ValueError, match=f"would change optim from '{optim}' to 'sgd': set it back"):
        build(**{**gate, "optim": "sgd"}).train(str(tmp_path / "checkpoint-5"))


def test_a_gate_around_an_optimizer_that_is_handed_over(tmp_path: Path) -> None:
    """As such, or without a gate, which the trainer then puts around it."""
    ends = []
    for ready in (True, False):
        trainer = trainer_of(tmp_path, **layout(1, 4), max_steps=2, optim="sgd", poprisk_gate="hard")
        inner = SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
        trainer.optimizer = PopRiskGate(inner) if ready else inner
        trainer.train()
        ends.append(list(trainer.model.parameters()))
        assert trainer._poprisk_optimizer().inner is inner and inner.state
    assert same(*ends)
    trainer = trainer_of(tmp_path, **layout(1, 4), optim="sgd")
    trainer.optimizer = PopRiskGate(SGD(trainer.model.parameters()))
    with pytest.raises(ValueError, match="the PopRiskGate handed .* gate='hard', but poprisk_gate='none'"):
        trainer.train()


def test_several_examples_in_a_backward_are_those_of_one_by_one(tmp_path: Path) -> None:
    ends = []
    for micro_batch in (1, 4):
        options = {**layout(micro_batch, 4), "max_steps": 3, "learning_rate": 0.1, "optim": "sgd"}
        trainer = trainer_of(tmp_path, rows(12), tiny_model(), **options, poprisk_gate="soft")
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[0] - start).norm() > 0


@pytest.mark.parametrize(
    ("options", "gate", "around"),
    [
        ({"optim": "sgd"}, "none", None),
        ({"optim": "sgd", "poprisk_gate": "none"}, "none", None),
        ({"optim": "sgd", "poprisk_gate": "soft"}, "soft", "SGD"),
        ({"poprisk_gate": "none"}, "none", None),
        ({}, "hard", None),
    ],
)
def test_the_record_says_whether_there_was_a_gate(
    options: dict[str, Any], gate: str, around: str | None, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, rows(4), tiny_model(), **layout(1, 4), max_steps=1, **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    config, card = load_record(tmp_path).config, (tmp_path / "README.md").read_text()
    assert (config["gate"], config["gated"], config["around"]) == (gate, gate != "none", around)
    assert ("and the gate off (" in card) == (gate == "none")
    assert (f"{around or 'AdamW'}'s update is written only as far as" in card) == (gate != "none")
