"""PopRiskAdamW against torch.optim.AdamW and against the textbook step."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.gate import openness
from hf_poprisk.gated_adamw import decide
from hf_poprisk.options import matching
from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.streaming import EMA_DECAY, StreamingPopRiskAdamW

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("embed.weight", "norm.bias", "mlp.up", "scale")
NAN, INF = float("nan"), float("inf")


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


def draw_examples(
    params: list[nn.Parameter], b: int, seed: int = 0, signal: float = 0.5
) -> list[list[Tensor]]:
    """Per-example gradients with a population gradient of their own in every coordinate."""
    g = torch.Generator().manual_seed(seed)
    shift = [signal * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in params]
    return [
        [(s + torch.randn(s.shape, generator=g).double()).to(params[0].dtype) for s in shift]
        for _ in range(b)
    ]


def run_examples(optimizer: PopRiskAdamW, params: list[nn.Parameter], examples: list[list[Tensor]]) -> None:
    """Feed given per-example gradients through real backwards: the loss is their inner product with p."""
    for example in examples:
        with optimizer.example():
            sum((p * h).sum() for p, h in zip(params, example, strict=True)).backward()


def step(optimizer: PopRiskAdamW, params: list[nn.Parameter], examples: list[list[Tensor]]) -> None:
    run_examples(optimizer, params, examples)
    optimizer.step()
    optimizer.zero_grad()


def step_both(
    ours: PopRiskAdamW,
    params: list[nn.Parameter],
    examples: list[list[Tensor]],
    stock: torch.optim.AdamW,
    twins: list[nn.Parameter],
) -> None:
    """A step of each, with the same accumulated gradient."""
    run_examples(ours, params, examples)
    for p, w in zip(params, twins, strict=True):
        w.grad = p.grad.clone()
    ours.step()
    ours.zero_grad()
    stock.step()


def assert_same(ours: PopRiskAdamW, stock: torch.optim.AdamW, tolerance: float = 0.0) -> None:
    """Weights and both moments and step counts, parameter by parameter."""
    for mine, theirs in zip(ours.param_groups, stock.param_groups, strict=True):
        for p, w in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(p, w, rtol=tolerance, atol=tolerance)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(
                    ours.state[p][key], stock.state[w][key], rtol=tolerance, atol=tolerance
                )


# The step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_gate_it_is_adamw_to_the_bit(dtype: torch.dtype) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    ours, stock = PopRiskAdamW(groups(mine), gate="none"), torch.optim.AdamW(groups(theirs))
    for number in range(50):
        set_gradients(mine, number)
        set_gradients(theirs, number)
        ours.close_window()
        ours.step()
        stock.step()
    assert_same(ours, stock)
    assert ours._window is None  # nothing was allocated


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 0.0)]
)
def test_an_open_gate_is_adamw(dtype: torch.dtype, tolerance: float) -> None:
    """The gated update itself, not the stock kernel: all examples agree, so everything is open."""
    mine, theirs = parameters(dtype), parameters(dtype)
    ours = PopRiskAdamW(groups(mine), gate="hard")
    stock = torch.optim.AdamW(groups(theirs), fused=True)  # bit for bit the kernel inside the gated update
    for number in range(50):
        set_gradients(theirs, number)
        step_both(ours, mine, [[p.grad / 4 for p in theirs]] * 4, stock, theirs)
    assert_same(ours, stock, tolerance)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_gated_steps_follow_the_textbook(gate: str) -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, gate=gate, **HYPER)
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for number in range(1, 6):
        examples = draw_examples(params, b=4, seed=number)
        step(optimizer, params, examples)
        for k, (w, m, v) in enumerate(expected):
            h = torch.stack([example[k] for example in examples])
            q = reference.openness(h, gate)
            expected[k] = reference.adamw_step(w, h.sum(0), q, m, v, number, **HYPER)
    for p, (w, m, v) in zip(params, expected, strict=True):
        state = dict(optimizer.state[p])
        assert state.pop("step") == 5
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            state, {"exp_avg": m.detach(), "exp_avg_sq": v.detach()}, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_streaming_form_follows_its_equations(gate: str, alpha: float | None) -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, gate=gate, estimator="ema", ema_alpha=alpha, **HYPER)
    beta1 = HYPER["betas"][0]
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
            expected[k] = (*reference.adamw_step(w, g, q, m, v, t, **HYPER), s)
        optimizer.step()
    for p, (w, *_) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-11, atol=1e-11)
    logs = optimizer.statistics.pop("examples")
    assert logs.pop("poprisk/fraction_open") == pytest.approx(
        opened / 29 / sum(p.numel() for p in params), rel=1e-5
    )
    assert set(logs) == {"poprisk/fraction_open_null"}


def test_a_single_example_takes_the_stock_step(caplog: pytest.LogCaptureFixture) -> None:
    params, twins = parameters(), parameters()
    optimizer, stock = PopRiskAdamW(params, **HYPER), torch.optim.AdamW(twins, **HYPER)
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            step_both(optimizer, params, draw_examples(params, 1, seed, signal=0), stock, twins)
    assert_same(optimizer, stock)
    assert caplog.text.count("single example") == 1  # said once
    assert not optimizer.statistics.pop("examples")


def test_ungated_parameters_take_the_stock_step() -> None:
    params, twins = parameters(), parameters()
    chosen = matching(zip(NAMES, params, strict=True), ["embed", r"bias$"])
    optimizer = PopRiskAdamW(params, ungated=chosen, **HYPER)
    stock = torch.optim.AdamW(twins, **HYPER)
    step_both(optimizer, params, draw_examples(params, 4, signal=0), stock, twins)
    assert [torch.equal(p, w) for p, w in zip(params[:3], twins[:3], strict=True)] == [True, True, False]


def test_a_group_is_whatever_one_block_holds_but_no_batch() -> None:
    params, twins = parameters(), parameters()
    grouped, exact = PopRiskAdamW(params, estimator="group"), PopRiskAdamW(twins)
    for optimizer, ps in ((grouped, params), (exact, twins)):
        step(optimizer, ps, draw_examples(ps, 4))
    assert all(map(torch.equal, params, twins))
    assert grouped.statistics.pop("groups")["poprisk/groups"] == 4
    assert exact.statistics.pop("examples")["poprisk/examples"] == 4
    layers = BatchedGradients(nn.Module(), [])
    with pytest.raises(ValueError, match="takes a batch as one unit: use optimizer.example"):
        grouped.batch(layers, Rows(2, 2))
    with PopRiskAdamW(twins, gate="none").batch(layers, Rows(2, 2)) as capture:
        assert capture is None


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_what_no_example_touches_is_not_counted(gate: str) -> None:
    """A penalty opens its coordinates, and ten open ones of two are no share."""
    grad, square = torch.ones(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    square[:2] = torch.tensor([0.5, 2.0])
    expected = openness(grad, square, 3, gate)
    sums = decide(grad, square, 3, gate)
    assert torch.equal(square, expected) and expected[2:].eq(1).all()
    assert sums.tolist() == pytest.approx([expected[:2].sum().item(), 2, 10, 2.5])


def test_statistics_are_averages_over_live_coordinates() -> None:
    params = parameters(torch.float64)
    optimizer = PopRiskAdamW(params, **HYPER)
    opened = live = energy = noise = 0.0
    for seed in range(3):
        examples = draw_examples(params, 4, seed)
        for example in examples:
            example[0][:3] = 0  # coordinates no example touches: they count for nothing
        step(optimizer, params, examples)
        for h in map(torch.stack, zip(*examples, strict=True)):
            touched = h.square().sum(0) > 0
            opened += (reference.openness(h) * touched).sum().item()
            live += touched.sum().item()
            energy += h.sum(0).square().sum().item()
            noise += h.square().sum().item()
    assert optimizer.statistics.pop("examples") == {
        "poprisk/fraction_open": pytest.approx(opened / live, rel=1e-6),
        "poprisk/fraction_open_null": pytest.approx(0.3910, abs=1e-4),
        "poprisk/examples": 4,
        "poprisk/margin": pytest.approx(4 / 3 * (energy - noise) / energy, rel=1e-5),
        "poprisk/noise_scale": pytest.approx((4 * noise - energy) / (energy - noise), rel=1e-4),
    }
    assert optimizer.statistics.pop("examples") == {}


# The window


CALLS: dict[str, Callable[[PopRiskAdamW, list[nn.Parameter]], Any]] = {
    "examples": lambda optimizer, params: run_examples(optimizer, params, draw_examples(params, 3)),
    "backward": lambda optimizer, params: params[0].sum().backward(),
    "gradients": lambda optimizer, params: set_gradients(params, 0),
    "clip": lambda optimizer, params: nn.utils.clip_grad_norm_(params, 1e-3),
    "close": lambda optimizer, params: optimizer.close_window(),
    "step": lambda optimizer, params: optimizer.step(),
}


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        ("examples clip step", "before clipping"),
        ("examples backward step", "inside `with optimizer.example"),
        ("gradients step", "saw no example"),
        ("examples close examples", r"after close_window\(\)"),
        ("examples step examples", r"call optimizer.zero_grad\(\)"),
    ],
)
def test_a_misused_window_is_refused(calls: str, sentence: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params)
    *before, last = calls.split()
    for call in before:
        CALLS[call](optimizer, params)
    with pytest.raises(RuntimeError, match=sentence):
        CALLS[last](optimizer, params)


@pytest.mark.parametrize("drop", ["zero_grad", "in place", "set to none", "after the gate", "exception"])
def test_a_dropped_window_leaves_nothing_behind(drop: str) -> None:
    """A window that is thrown away (a loss scaler's overflow, a bad batch) must not leak into the next."""
    params, twins = parameters(), parameters()
    optimizer, fresh = PopRiskAdamW(params, **HYPER), PopRiskAdamW(twins, **HYPER)
    run_examples(optimizer, params, draw_examples(params, 3, seed=9))
    if drop in ("zero_grad", "in place"):
        optimizer.zero_grad(set_to_none=drop == "zero_grad")
    else:  # what model.zero_grad() does: the optimizer is not told
        if drop == "after the gate":
            optimizer.close_window()
        if drop == "exception":
            with pytest.raises(ZeroDivisionError), optimizer.example():
                assert all(p._backward_hooks for p in params)
                raise ZeroDivisionError
        for p in params:
            p.grad = None
    assert not any(p._backward_hooks for p in params)
    step(optimizer, params, draw_examples(params, 4))
    step(fresh, twins, draw_examples(twins, 4))
    assert all(map(torch.equal, params, twins))


def test_a_parameter_that_is_unfrozen_later_is_gated() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = PopRiskAdamW(params)
    for gated in (False, True):
        params[0].requires_grad_(gated)
        run_examples(optimizer, params, draw_examples(params, 3))
        optimizer.close_window()
        assert (params[0] in optimizer._openness) == gated
        optimizer.step()
        optimizer.zero_grad()


# Numbers that are not finite


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("kind", ["gated", "ema", "ungated"])
def test_a_gradient_that_is_not_finite_leaves_the_step_out(
    kind: str, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    params = parameters()
    options = {"gated": {}, "ema": {"estimator": "ema"}, "ungated": {"ungated": params[:1]}}[kind]
    optimizer = PopRiskAdamW(params, **options, **HYPER)
    step(optimizer, params, draw_examples(params, 4))
    before = copy.deepcopy((params, [optimizer.state[p] for p in params]))
    examples = draw_examples(params, 4)
    examples[2][0][0, 0] = bad
    with caplog.at_level(logging.WARNING):
        step(optimizer, params, examples)
    assert "not finite" in caplog.text
    assert optimizer.statistics.pop("examples")["poprisk/steps_skipped"] == 1
    torch.testing.assert_close((params, [optimizer.state[p] for p in params]), before, rtol=0, atol=0)
    step(optimizer, params, draw_examples(params, 4))
    assert all((p != w).any() and p.isfinite().all() for p, w in zip(params, before[0], strict=True))


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("kind", ["example", "group", "ema", "ungated", "one example"])
def test_weights_that_are_not_finite_stop_the_first_step(kind: str, closed: bool) -> None:
    params = parameters()
    estimator = kind if kind in ("group", "ema") else "example"
    ungated = params[:1] if kind == "ungated" else []
    optimizer = PopRiskAdamW(zip(NAMES, params, strict=True), estimator=estimator, ungated=ungated)
    with torch.no_grad():
        params[2][0, 0, 0] = NAN
    for _ in range(1 if kind == "one example" else 4):
        with optimizer.example():
            torch.stack([(p * p).sum() for p in params]).prod().backward()
    if closed:
        optimizer.close_window()
        nn.utils.clip_grad_norm_(params, 1.0)
    sentence = r"^no gradient of the first step is finite, because mlp\.up is not: load"
    with pytest.raises(RuntimeError, match=sentence):
        optimizer.step()


@pytest.mark.parametrize("estimator", ["example", "ema"])
def test_a_loss_that_is_not_finite_stops_the_first_step_and_no_other(estimator: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, estimator=estimator)
    bad = [torch.full_like(p, NAN) for p in params]
    bad[1].zero_()  # an expert that no token was sent to does not hide that no other gradient is finite
    with pytest.raises(RuntimeError, match="^no gradient of the first step is finite, although the weights"):
        step(optimizer, params, [bad, bad])
    optimizer.zero_grad()
    examples = draw_examples(params, 4)
    for h in examples[1][:3]:  # of four
        h.fill_(NAN)
    run_examples(optimizer, params, examples)
    optimizer.close_window()
    nn.utils.clip_grad_norm_(params, 1.0)  # spreads the NaN over all of them
    assert not any(p.grad.isfinite().any() for p in params)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.statistics.pop("examples") == {"poprisk/steps_skipped": 1.0}
    step(optimizer, params, draw_examples(params, 4))
    resumed = PopRiskAdamW(params, estimator=estimator)
    resumed.load_state_dict(optimizer.state_dict())
    bad[1].fill_(NAN)  # no gradient at all is finite
    for later in (optimizer, resumed):
        later.statistics.pop("examples")
        step(later, params, [*draw_examples(params, 3), bad])
        assert later.statistics.pop("examples") == {"poprisk/steps_skipped": 1.0}


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


# Options, copies, checkpoints, names


@pytest.mark.parametrize("where", ["option", "group", "checkpoint"])
def test_amsgrad_is_refused(where: str) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, amsgrad=where == "option")
    if where == "group":
        optimizer.param_groups[0]["amsgrad"] = True
    if where == "checkpoint":
        optimizer.load_state_dict(torch.optim.AdamW(parameters(), amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        step(optimizer, params, draw_examples(params, 3))


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be finite; got inf"):
        PopRiskAdamW(parameters(), **{name: INF})


@pytest.mark.parametrize("gate", ["hard", "none"])
def test_nothing_to_train_is_said_as_such(gate: str) -> None:
    params = parameters()
    for p in params:
        p.requires_grad_(False)
    for given in (params, [{"params": []}, {"params": []}]):
        with pytest.raises(ValueError, match="^nothing to train: .* load an adapter with is_trainable=True"):
            PopRiskAdamW(given, gate=gate)
    with pytest.raises(ValueError, match="^nothing to train: "):
        matching(zip(NAMES, params, strict=True), ["embed"])
    params[1].requires_grad_(True)  # the others may be unfrozen later
    assert PopRiskAdamW(params).gated_parameters == params[1:2]
    with pytest.raises(ValueError, match="every parameter is ungated"):
        PopRiskAdamW(params, ungated=params)
    with pytest.raises(ValueError, match="names parameters that this optimizer does not hold"):
        PopRiskAdamW(params, ungated=parameters())


def test_the_streaming_form_is_a_class_of_its_own() -> None:
    class Mine(PopRiskAdamW):
        pass

    params = parameters()
    assert type(PopRiskAdamW(params, estimator="ema")) is StreamingPopRiskAdamW
    assert type(PopRiskAdamW(params, estimator="ema", gate="none")) is PopRiskAdamW
    assert type(Mine(params)) is Mine
    with pytest.raises(TypeError, match="^Mine with estimator='ema' must subclass StreamingPopRiskAdamW.$"):
        Mine(params, estimator="ema")


@pytest.mark.parametrize("options", [{"gate": "soft"}, {"estimator": "ema", "ema_alpha": 0.5}], ids=str)
def test_a_copy_is_gated_as_well(options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = PopRiskAdamW(params, ungated=params[1:2], **options)
    step(optimizer, params, draw_examples(params, 4))
    twins, twin = copy.deepcopy((params, optimizer))
    assert type(twin) is type(optimizer) and vars(twin).items() >= options.items()
    assert [p is w for p, w in zip(twin.gated_parameters, [twins[0], *twins[2:]], strict=True)] == [True] * 3
    for each, ps in ((optimizer, params), (twin, twins)):
        step(each, ps, draw_examples(ps, 4, seed=1))
    assert all(map(torch.equal, params, twins))


def test_names_are_in_messages_and_records() -> None:
    params, others = parameters(), parameters()
    named = list(zip(NAMES, params, strict=True))
    optimizer = PopRiskAdamW(iter(named[:2]))
    optimizer.add_param_group({"params": named[2:]})
    step(optimizer, params, draw_examples(params, 4))
    stock = torch.optim.AdamW([{"params": others[:2]}, {"params": others[2:]}])
    optimizer.load_state_dict(stock.state_dict())  # which has none
    assert optimizer.names == {p: name for name, p in named}
    assert optimizer.statistics.of_run(optimizer.names)["parameters"].keys() == set(NAMES)
    assert optimizer.describe(params[2]) == "mlp.up"
    optimizer.name_parameters([("other", params[0])])
    assert optimizer.names[params[0]] == "other" and optimizer.names[params[1]] == "norm.bias"


def regression(dtype: torch.dtype, steps: int = 600, **options: Any) -> tuple[float, PopRiskAdamW]:
    """The loss of a regression whose writes are below the resolution of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(512, 16, generator=generator), torch.randn(16, generator=generator)
    w = nn.Parameter((true + 0.1 * torch.randn(16, generator=generator).sign()).to(dtype))
    optimizer = PopRiskAdamW([w], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options)
    for _ in range(steps):
        for i in torch.randint(512, (4,), generator=generator).tolist():
            with optimizer.example():
                ((x[i].to(dtype) * (w - true.to(dtype))).sum() ** 2 / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(((x @ (w.detach().float() - true)) ** 2).mean()), optimizer


@pytest.mark.parametrize("gate", ["hard", "none"])
def test_kahan_keeps_what_rounding_loses(gate: str) -> None:
    start = regression(torch.float32, 0)[0]
    exact = regression(torch.float32, gate=gate)[0]
    assert exact < 0.75 * start
    assert regression(torch.bfloat16, gate=gate)[0] > 0.95 * start  # it stalls
    loss, optimizer = regression(torch.bfloat16, gate=gate, kahan=True)
    assert loss == pytest.approx(exact, abs=0.05 * start)
    (state,) = optimizer.state.values()
    assert {x.dtype for n, x in state.items() if n != "step"} == {torch.bfloat16}


def test_kahan_goes_on_from_a_checkpoint_and_into_copies() -> None:
    params = [nn.Parameter(p.detach().to(torch.bfloat16)) for p in parameters()]
    optimizer = PopRiskAdamW(params, lr=1e-4, kahan=True)
    step(optimizer, params, draw_examples(params, b=4, seed=0))
    twins, twin = copy.deepcopy((params, optimizer))
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    other = PopRiskAdamW(fresh, lr=1e-4, kahan=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = []
    for one in (optimizer, twin, other):
        held = one.param_groups[0]["params"]
        for seed in range(1, 9):
            step(one, held, draw_examples(held, b=4, seed=seed))
        ends.append([*held, *(one.state[p]["lost"] for p in held)])
    for end in ends[1:]:
        assert all(map(torch.equal, ends[0], end))
    assert any(x.any() for x in ends[0][len(params) :])


def test_weights_of_float16_are_refused() -> None:
    """The squares of gradients below 2e-4 are zero there, and so is AdamW's eps."""
    half = [nn.Parameter(p.detach().half()) for p in parameters()]
    with pytest.raises(ValueError, match="load them in bfloat16, or in float32"):
        PopRiskAdamW(half)
    PopRiskAdamW(half, gate="none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"kahan": True},
            "^kahan=True is for weights of bfloat16, and one is torch.float32: leave",
        ),
        ({"kahan": True, "basis": "eigen"}, "^kahan=True does not go with basis='eigen', whose writes"),
    ],
)
def test_kahan_is_refused_where_it_does_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PopRiskAdamW(parameters(), **options)
