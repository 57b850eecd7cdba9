"""PopRiskAdamW against torch.optim.AdamW and against the textbook step."""

import copy
import logging
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.options import matching
from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.streaming import EMA_DECAY, StreamingPopRiskAdamW, streaming_null_openness

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 5), (5,), (3, 2, 4), ())
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run_examples(optimizer: PopRiskAdamW, params: list[nn.Parameter], examples: list[list[Tensor]]) -> None:
    """Feed given per-example gradients through real backwards: the loss is their inner product with p."""
    for example in examples:
        with optimizer.example():
            sum((p * h).sum() for p, h in zip(params, example, strict=True)).backward()


def draw_examples(
    params: list[nn.Parameter], b: int, seed: int = 0, signal: float = 0.5
) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shift = [signal * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]
    return [
        [
            (s + torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype)
            for p, s in zip(params, shift, strict=True)
        ]
        for _ in range(b)
    ]


def assert_same(ours: PopRiskAdamW, stock: torch.optim.AdamW, rtol: float, atol: float) -> None:
    """Weights and both moments and step counts, parameter by parameter."""
    for mine, theirs in zip(ours.param_groups, stock.param_groups, strict=True):
        for p, w in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(p, w, rtol=rtol, atol=atol)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(ours.state[p][key], stock.state[w][key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_gate_it_is_adamw_to_the_bit(dtype: torch.dtype) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    ours = PopRiskAdamW(groups(mine), gate="none")
    stock = torch.optim.AdamW(groups(theirs))
    for step in range(50):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        ours.step()
        stock.step()
    assert_same(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 0.0)]
)
def test_an_open_gate_is_adamw(dtype: torch.dtype, rtol: float) -> None:
    """The gated update itself, not the stock kernel: all examples agree, so everything is open."""
    mine, theirs = parameters(dtype), parameters(dtype)
    ours = PopRiskAdamW(groups(mine), gate="hard")
    stock = torch.optim.AdamW(groups(theirs), fused=True)  # bit for bit the kernel inside the gated update
    for step in range(50):
        set_gradients(theirs, step)
        same = [[p.grad / 4 for p in theirs]] * 4
        run_examples(ours, mine, same)
        for p, w in zip(mine, theirs, strict=True):
            w.grad = p.grad.clone()
        ours.step()
        ours.zero_grad()
        stock.step()
    assert_same(ours, stock, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_gated_steps_follow_the_textbook(gate: str) -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, gate=gate, **HYPER)
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in range(1, 6):
        examples = draw_examples(params, b=4, seed=step)
        run_examples(optimizer, params, examples)
        optimizer.step()
        optimizer.zero_grad()
        for k, (w, m, v) in enumerate(expected):
            stacked = torch.stack([example[k] for example in examples])
            q = reference.openness(stacked, gate)
            expected[k] = reference.adamw_step(w, stacked.sum(0), q, m, v, step, **HYPER)
    for p, (w, m, v) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v.detach(), rtol=1e-12, atol=1e-12)


def test_a_closed_gate_leaves_only_the_decay() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = PopRiskAdamW(params, **HYPER)
    example = draw_examples(params, b=1)[0]
    run_examples(optimizer, params, [example, [-h for h in example]])  # G = 0 everywhere, Q > 0
    optimizer.step()
    factor = 1 - HYPER["lr"] * HYPER["weight_decay"]
    for p, w in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), w * factor, rtol=1e-7, atol=0)
        assert optimizer.state[p]["step"] == 1


def test_moments_see_the_ordinary_gradient() -> None:
    params, twins = parameters(), parameters()
    optimizer, stock = PopRiskAdamW(params, **HYPER), torch.optim.AdamW(twins, **HYPER)
    for step in range(3):
        run_examples(optimizer, params, draw_examples(params, 4, seed=step, signal=0))
        for p, w in zip(params, twins, strict=True):
            w.grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        stock.step()
    assert any((p != w).any() for p, w in zip(params, twins, strict=True))
    for p, w in zip(params, twins, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], stock.state[w]["exp_avg"])


def test_clipping_after_the_decision_does_not_change_it() -> None:
    opened = []
    for clip in (None, 1e-3):
        params = parameters()
        before = [p.detach().clone() for p in params]
        optimizer = PopRiskAdamW(params, weight_decay=0.0)
        run_examples(optimizer, params, draw_examples(params, 4))
        optimizer.close_window()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        opened.append([p.detach() != w for p, w in zip(params, before, strict=True)])
    for free, clipped in zip(*opened, strict=True):
        assert torch.equal(free, clipped)
    assert 0 < sum(int(o.sum()) for o in opened[0]) < sum(o.numel() for o in opened[0])


def test_clipping_before_the_decision_is_refused() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    run_examples(optimizer, params, draw_examples(params, 4))
    nn.utils.clip_grad_norm_(params, 1e-3)
    with pytest.raises(RuntimeError, match="before clipping"):
        optimizer.step()


def test_a_backward_outside_the_block_is_refused() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    first, second = draw_examples(params, 2)
    run_examples(optimizer, params, [first])
    sum((p * h).sum() for p, h in zip(params, second, strict=True)).backward()
    with pytest.raises(RuntimeError, match="inside `with optimizer.example"):
        optimizer.step()


def test_gradients_without_examples_are_refused() -> None:
    params = parameters()
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="saw no example"):
        PopRiskAdamW(params).step()


def test_an_example_after_the_decision_is_refused() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    run_examples(optimizer, params, draw_examples(params, 3))
    optimizer.close_window()
    with pytest.raises(RuntimeError, match=r"after close_window\(\)"):
        run_examples(optimizer, params, draw_examples(params, 1))


def test_forgetting_zero_grad_is_refused() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    run_examples(optimizer, params, draw_examples(params, 3))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\)"):
        run_examples(optimizer, params, draw_examples(params, 1))


@pytest.mark.parametrize("drop", ["zero_grad", "zero_grad_in_place", "set_none", "set_none_after_the_gate"])
def test_a_dropped_window_leaves_nothing_behind(drop: str) -> None:
    """A window that is thrown away (a loss scaler's overflow, a bad batch) must not leak into the next."""
    params, twins = parameters(), parameters()
    optimizer, fresh = PopRiskAdamW(params, **HYPER), PopRiskAdamW(twins, **HYPER)
    run_examples(optimizer, params, draw_examples(params, 3, seed=9))
    if drop.startswith("set_none"):  # what model.zero_grad() does: the optimizer is not told
        if drop == "set_none_after_the_gate":
            optimizer.close_window()
        for p in params:
            p.grad = None
    else:
        optimizer.zero_grad(set_to_none=drop == "zero_grad")
    for opt, ps in ((optimizer, params), (fresh, twins)):
        run_examples(opt, ps, draw_examples(ps, 4))
        opt.step()
    for p, w in zip(params, twins, strict=True):
        assert torch.equal(p, w)


def test_a_gradient_that_is_not_finite_leaves_the_step_out(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, **HYPER)
    run_examples(optimizer, params, draw_examples(params, 4))
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy((params, [optimizer.state[p] for p in params]))
    for bad in (float("nan"), float("inf")):
        examples = draw_examples(params, 4)
        examples[2][1][0] = bad
        run_examples(optimizer, params, examples)
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        optimizer.zero_grad()
    assert "not finite" in caplog.text
    for p, w, s in zip(params, before[0], before[1], strict=True):
        assert torch.equal(p, w)
        assert all(torch.equal(optimizer.state[p][k], s[k]) for k in s)
    assert optimizer.statistics.pop("examples")["poprisk/steps_skipped"] == 2
    run_examples(optimizer, params, draw_examples(params, 4))
    optimizer.step()
    assert all((p != w).any() and p.isfinite().all() for p, w in zip(params, before[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"estimator": "ema"}, {"ungated": "first"}])
def test_not_finite_is_seen_wherever_it_is(options: dict[str, Any]) -> None:
    params = parameters()
    if "ungated" in options:
        options = {"ungated": params[:1]}
    optimizer = PopRiskAdamW(params, **options)
    before = [p.detach().clone() for p in params]
    examples = draw_examples(params, 4)
    examples[0][0][0, 0] = float("inf")
    run_examples(optimizer, params, examples)
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "ema"}, {"estimator": "group"}, {"ungated": True}, {"b": 1}], ids=str
)
def test_weights_that_are_not_finite_stop_the_first_step(options: dict[str, Any], closed: bool) -> None:
    params = parameters()
    options, b = dict(options), options.get("b", 4)
    options.pop("b", None)
    if "ungated" in options:
        options["ungated"] = params[:1]
    optimizer = PopRiskAdamW(params, **options)
    optimizer.name_parameters(zip("abcd", params, strict=True))
    with torch.no_grad():
        params[2][0, 0, 0] = float("nan")
    for _ in range(b):
        with optimizer.example():
            torch.stack([(p * p).sum() for p in params]).prod().backward()
    if closed:
        optimizer.close_window()
        nn.utils.clip_grad_norm_(params, 1.0)
    with pytest.raises(
        RuntimeError, match=r"^no gradient of the first step is finite, because c is not: load"
    ):
        optimizer.step()


@pytest.mark.parametrize("estimator", ["example", "ema"])
def test_a_loss_that_is_not_finite_stops_the_first_step_and_no_other(estimator: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, estimator=estimator)
    bad = [torch.full_like(p, float("nan")) for p in params]
    run_examples(optimizer, params, [*draw_examples(params, 3), bad])
    with pytest.raises(
        RuntimeError, match="^no gradient of the first step is finite, although the weights are"
    ):
        optimizer.step()
    optimizer.zero_grad()
    run_examples(optimizer, params, draw_examples(params, 4))
    optimizer.step()
    optimizer.zero_grad()
    for resumed in (False, True):
        if resumed:
            before, optimizer = optimizer.state_dict(), PopRiskAdamW(params, estimator=estimator)
            optimizer.load_state_dict(before)
        run_examples(optimizer, params, [*draw_examples(params, 3), bad])
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.statistics.pop("examples")["poprisk/steps_skipped"] == 1


@pytest.mark.parametrize("estimator", ["example", "ema"])
def test_a_first_step_with_some_finite_gradients_is_left_out(estimator: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, estimator=estimator)
    examples = draw_examples(params, 4)
    for p_index in range(3):  # of four
        examples[1][p_index].fill_(float("nan"))
    run_examples(optimizer, params, examples)
    optimizer.close_window()
    nn.utils.clip_grad_norm_(params, 1.0)  # spreads the NaN over all of them
    assert not any(p.grad.isfinite().any() for p in params)
    optimizer.step()
    assert optimizer.statistics.pop("examples") == {"poprisk/steps_skipped": 1.0}


def test_gradients_of_zero_do_not_hide_that_no_other_is_finite() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    bad = [torch.full_like(p, float("nan")) for p in params]
    bad[1].zero_()  # an expert that no token was sent to
    run_examples(optimizer, params, [bad, bad])
    with pytest.raises(RuntimeError, match="^no gradient of the first step is finite"):
        optimizer.step()


@pytest.mark.parametrize("estimator", ["example", "ema"])
def test_windows_that_a_loss_scaler_throws_away_are_none(estimator: str) -> None:
    """At its first scales nothing is finite, and it does not call the step."""
    params = parameters()
    optimizer = PopRiskAdamW(params, estimator=estimator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)
    taken = []
    for _ in range(4):
        for example in draw_examples(params, 3):
            with optimizer.example():
                loss = 1e6 * sum((p * h).sum() for p, h in zip(params, example, strict=True))
                scaler.scale(loss).backward()
        optimizer.close_window()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        taken.append(bool(optimizer.state))
        for p in params:  # as model.zero_grad() does
            p.grad = None
    assert not taken[0] and taken[-1]


def test_a_single_example_is_plain_adamw_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    params, twins = parameters(), parameters()
    optimizer, stock = PopRiskAdamW(params, **HYPER), torch.optim.AdamW(twins, **HYPER)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            example = draw_examples(params, 1, seed=step)
            run_examples(optimizer, params, example)
            for w, h in zip(twins, example[0], strict=True):
                w.grad = h.clone()
            optimizer.step()
            optimizer.zero_grad()
            stock.step()
    assert_same(optimizer, stock, rtol=0, atol=0)
    assert caplog.text.count("single example") == 1
    assert optimizer.statistics.pop("examples") == {}


def test_warm_up_steps_are_ungated() -> None:
    params, twins = parameters(), parameters()
    optimizer = PopRiskAdamW(params, warmup_steps=2, **HYPER)
    stock = torch.optim.AdamW(twins, **HYPER)
    for step in range(3):
        run_examples(optimizer, params, draw_examples(params, 4, seed=step, signal=0))
        for p, w in zip(params, twins, strict=True):
            w.grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        stock.step()
        same = all(torch.equal(p, w) for p, w in zip(params, twins, strict=True))
        assert same == (step < 2)


def test_ungated_parameters_take_the_stock_step() -> None:
    params, twins = parameters(), parameters()
    named = list(zip(["embed.weight", "norm.bias", "mlp.up", "scale"], params, strict=True))
    chosen = matching(named, ["embed", r"bias$"])
    assert [p is q for p, q in zip(chosen, params[:2], strict=True)] == [True, True]
    optimizer = PopRiskAdamW(params, ungated=chosen, **HYPER)
    stock = torch.optim.AdamW(twins, **HYPER)
    run_examples(optimizer, params, draw_examples(params, 4, signal=0))
    for p, w in zip(params, twins, strict=True):
        w.grad = p.grad.clone()
    optimizer.step()
    stock.step()
    assert torch.equal(params[0], twins[0]) and torch.equal(params[1], twins[1])
    assert not torch.equal(params[2], twins[2])


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_streaming_form_follows_its_equations(gate: str, alpha: float | None) -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, gate=gate, estimator="ema", ema_alpha=alpha, **HYPER)
    beta1, beta2 = HYPER["betas"]
    threshold = (1 - beta1) / (1 + beta1) if alpha is None else alpha
    expected = [(p.detach().clone(), *(torch.zeros_like(p) for _ in range(3))) for p in params]
    opened = 0.0
    for t in range(1, 30):
        set_gradients(params, t)
        for k, (w, m, v, s) in enumerate(expected):
            g = params[k].grad
            s = EMA_DECAY * s + (1 - EMA_DECAY) * (g - m) ** 2
            m_hat = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
            noise = threshold * s / (1 - EMA_DECAY**t)
            excess = (m_hat**2 - noise).clamp(min=0)
            q = (excess > 0).double() if gate == "hard" else excess / (excess + noise)
            opened += q.sum().item()
            w, m, v = reference.adamw_step(w, g, q, m, v, t, **HYPER)
            expected[k] = (w.detach(), m.detach(), v.detach(), s)
        optimizer.step()
    for p, (w, *_) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-11)
    logs = optimizer.statistics.pop("examples")
    total = 29 * sum(p.numel() for p in params)
    assert logs["poprisk/fraction_open"] == pytest.approx(opened / total, rel=1e-5)
    assert set(logs) == {"poprisk/fraction_open", "poprisk/fraction_open_null"}


def test_group_units_are_whatever_one_block_holds() -> None:
    params, twins = parameters(torch.float64), parameters(torch.float64)
    grouped = PopRiskAdamW(params, estimator="group", **HYPER)
    exact = PopRiskAdamW(twins, **HYPER)
    examples = draw_examples(params, 8)
    pairs = [
        [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(examples[::2], examples[1::2], strict=True)
    ]
    run_examples(grouped, params, pairs)
    run_examples(exact, twins, examples)
    grouped.step()
    exact.step()
    assert grouped.statistics.pop("groups")["poprisk/groups"] == 4
    assert exact.statistics.pop("examples")["poprisk/examples"] == 8
    assert any((p != w).any() for p, w in zip(params, twins, strict=True))


def test_statistics_are_averages_over_live_coordinates() -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, **HYPER)
    opened = live = energy = noise = 0.0
    for step in range(3):
        examples = draw_examples(params, 4, seed=step)
        for example in examples:
            example[0][:3] = 0  # coordinates no example touches: they count for nothing
        run_examples(optimizer, params, examples)
        optimizer.step()
        optimizer.zero_grad()
        for k in range(len(params)):
            h = torch.stack([e[k] for e in examples])
            touched = h.square().sum(0) > 0
            opened += (reference.openness(h) * touched).sum().item()
            live += touched.sum().item()
            energy += h.sum(0).square().sum().item()
            noise += h.square().sum().item()
    logs = optimizer.statistics.pop("examples")
    assert logs["poprisk/fraction_open"] == pytest.approx(opened / live, rel=1e-6)
    assert logs["poprisk/fraction_open_null"] == pytest.approx(0.3910, abs=1e-4)
    assert logs["poprisk/examples"] == 4
    assert logs["poprisk/margin"] == pytest.approx(4 / 3 * (energy - noise) / energy, rel=1e-5)
    assert optimizer.statistics.pop("examples") == {}


def test_checkpoints_go_both_ways() -> None:
    params, twins = parameters(), parameters()
    gated, stock = PopRiskAdamW(params, **HYPER), torch.optim.AdamW(twins, foreach=True, **HYPER)
    set_gradients(twins, 0)
    stock.step()
    gated.load_state_dict(copy.deepcopy(stock.state_dict()))
    for p, w in zip(params, twins, strict=True):
        assert torch.equal(gated.state[p]["exp_avg"], stock.state[w]["exp_avg"])
    assert gated.gate == "hard"  # options are the run's, not the checkpoint's
    run_examples(gated, params, draw_examples(params, 4))
    gated.step()
    stock.load_state_dict(copy.deepcopy(gated.state_dict()))
    set_gradients(twins, 1)
    stock.step()
    assert all(stock.state[w]["step"] == 3 for w in twins)


def test_state_holds_nothing_but_adamws() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, **HYPER)
    run_examples(optimizer, params, draw_examples(params, 4))
    optimizer.step()
    assert {key for p in params for key in optimizer.state[p]} == {"step", "exp_avg", "exp_avg_sq"}


def test_without_a_gate_nothing_is_hooked_or_allocated() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, gate="none", **HYPER)
    with optimizer.example():
        assert all(not p._backward_hooks for p in params)
        sum(p.sum() for p in params).backward()
    optimizer.close_window()
    optimizer.step()
    assert optimizer._window is None


def test_no_hook_outlives_its_block() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    with pytest.raises(ZeroDivisionError), optimizer.example():
        assert all(p._backward_hooks for p in params)
        raise ZeroDivisionError
    assert all(not p._backward_hooks for p in params)


def test_a_copy_is_gated_as_well() -> None:
    model = nn.Linear(3, 2)
    optimizer = PopRiskAdamW(model.parameters(), gate="soft", ungated=[model.bias])
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin.gate == "soft" and twin.gated_parameters[0] is twin_model.weight
    with twin.example():
        twin_model(torch.ones(1, 3)).sum().backward()
    twin.step()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gate": "firm"}, "gate must be one of hard, soft, none"),
        ({"estimator": "batch"}, "estimator must be one of example, group, ema"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer"),
        ({"ema_alpha": 0.0, "estimator": "ema"}, "ema_alpha must be a number > 0"),
        ({"ema_alpha": 1.0}, "ema_alpha has no effect"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"ungated": [nn.Parameter(torch.ones(1))]}, "does not hold"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PopRiskAdamW(parameters(), **options)


def test_the_streaming_form_is_a_class_of_its_own() -> None:
    class Mine(PopRiskAdamW):
        pass

    params = parameters()
    assert type(PopRiskAdamW(params, estimator="ema")) is StreamingPopRiskAdamW
    assert type(PopRiskAdamW(params, estimator="ema", gate="none")) is PopRiskAdamW
    assert type(Mine(params)) is Mine
    with pytest.raises(TypeError, match="^Mine with estimator='ema' must subclass StreamingPopRiskAdamW.$"):
        Mine(params, estimator="ema")
    optimizer = PopRiskAdamW(params, estimator="ema", ema_alpha=0.5)
    set_gradients(params, 1)
    optimizer.step()
    twin_params, twin = copy.deepcopy((params, optimizer))
    assert type(twin) is StreamingPopRiskAdamW and twin.ema_alpha == 0.5
    for ps, each in ((params, optimizer), (twin_params, twin)):
        set_gradients(ps, 2)
        each.step()
    assert all(map(torch.equal, params, twin_params))


def test_nothing_left_to_gate_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="every parameter is ungated"):
        PopRiskAdamW(params, ungated=params)


def test_amsgrad_in_a_group_is_refused() -> None:
    optimizer = PopRiskAdamW([{"params": parameters(), "amsgrad": True}], gate="none")
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        optimizer.step()


def test_a_parameter_that_is_unfrozen_later_is_gated() -> None:
    model = torch.nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        for _ in range(3):
            with optimizer.example():
                model(torch.randn(1, 4)).square().sum().backward()
        optimizer.close_window()
        assert (model.weight in optimizer._openness) == (step == 1)
        optimizer.step()
        optimizer.zero_grad()
        model.weight.requires_grad_(True)


def test_a_batch_is_no_group() -> None:
    model = torch.nn.Linear(4, 3)
    layers = BatchedGradients(model, model.parameters())
    with pytest.raises(ValueError, match="takes a batch as one unit: use optimizer.example"):
        PopRiskAdamW(model.parameters(), estimator="group").batch(layers, Rows(2, 2))
    with PopRiskAdamW(model.parameters(), gate="none").batch(layers, Rows(2, 2)) as capture:
        assert capture is None


def test_the_streaming_form_opens_what_it_opens_of_noise() -> None:
    """``open_share``: what it will open is not known before the step, and in warm-up all is written."""
    weight = nn.Parameter(torch.zeros(5))
    optimizer = PopRiskAdamW([weight], gate="soft", estimator="ema", warmup_steps=1)
    shares = []
    for _ in range(2):
        weight.grad = torch.ones(5)
        optimizer.close_window()
        shares.append(optimizer.open_share)
        optimizer.step()
    assert shares == [1.0, streaming_null_openness((1 - 0.9) / (1 + 0.9), 0.9, "soft")]
    assert 0.0 < shares[1] < 1.0


def named_parameters() -> list[tuple[str, nn.Parameter]]:
    return list(zip(["embed.weight", "norm.bias", "mlp.up", "scale"], parameters(), strict=True))


@pytest.mark.parametrize("as_groups", [False, True])
def test_names_that_torch_was_given_are_in_messages_and_records(as_groups: bool) -> None:
    named = named_parameters()
    given: Any = [{"params": named[:2], "lr": 1e-2}, {"params": named[2:]}] if as_groups else iter(named)
    optimizer = PopRiskAdamW(given)
    assert optimizer.names == {p: name for name, p in named}
    params = [p for _, p in named]
    run_examples(optimizer, params, draw_examples(params, 4))
    optimizer.step()
    assert set(optimizer.statistics.of_run(optimizer.names)["parameters"]) == {name for name, _ in named}
    optimizer.zero_grad()
    said = pytest.raises(RuntimeError, match=r"the gradient of mlp\.up arrived in several parts")
    with said, optimizer.example():
        params[2].sum().backward()
        params[2].sum().backward()


def test_names_of_groups_that_come_later_and_of_a_loaded_state() -> None:
    named = named_parameters()
    optimizer = PopRiskAdamW(named[:2])
    optimizer.add_param_group({"params": named[2:]})
    optimizer.load_state_dict(
        torch.optim.AdamW([{"params": parameters()[:2]}, {"params": parameters()[2:]}]).state_dict()
    )
    assert optimizer.names == {p: name for name, p in named}
    optimizer.name_parameters([("other", named[0][1])])
    assert optimizer.names[named[0][1]] == "other" and optimizer.names[named[1][1]] == "norm.bias"


def test_plain_parameters_go_by_their_shape() -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    assert optimizer.names == {}
    said = pytest.raises(RuntimeError, match=r"the gradient of a parameter of shape \(7, 5\) arrived")
    with said, optimizer.example():
        params[0].sum().backward()
        params[0].sum().backward()


@pytest.mark.parametrize("gate", ["hard", "none"])
def test_nothing_to_train_is_said_as_such(gate: str) -> None:
    params = parameters()
    for p in params:
        p.requires_grad_(False)
    for given in (params, [{"params": []}, {"params": []}]):
        with pytest.raises(ValueError, match="^nothing to train: .* load an adapter with is_trainable=True"):
            PopRiskAdamW(given, gate=gate)
    with pytest.raises(ValueError, match="^nothing to train: "):
        matching(zip("abcd", params, strict=True), ["a"])
    params[1].requires_grad_(True)  # the others may be unfrozen later
    assert PopRiskAdamW(params).gated_parameters == params[1:2]
