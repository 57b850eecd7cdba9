"""The kernel against the slow textbook: one full Jacobian, all outputs at once, in float64."""

import weakref

import pytest
import torch
from models import adapted, tiny_model, token_examples
from torch import Tensor, nn

from hf_poprisk.output_space import ClassLogits, DPOMargin, SequenceLogProb, empirical_ntk, kernels
from hf_poprisk.output_space.kernel import _Jacobian
from hf_poprisk.output_space.tasks import Batch, Outputs, loss_terms


def reference_jacobian(model: nn.Module, batches: list[Batch], outputs: Outputs) -> Tensor:
    """[N, P] float64: every output differentiated by every trainable parameter, nothing shared or saved."""
    rows = []
    params = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        for j in range(outputs(model, batch).numel()):
            value = outputs(model, batch).reshape(-1)[j]
            grads = torch.autograd.grad(value, params, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def pairs(count: int) -> list[Batch]:
    """Preference pairs as TRL collates them, one to a batch."""
    rows, found = token_examples(2 * count), []
    for i in range(count):
        batch = {k: torch.cat([rows[2 * i][k], rows[2 * i + 1][k]]) for k in ("input_ids", "attention_mask")}
        completion = batch["attention_mask"].clone()
        completion[:, :2] = 0
        reference = {"ref_chosen_logps": torch.tensor([-9.0]), "ref_rejected_logps": torch.tensor([-8.0 - i])}
        found.append({**batch, "completion_mask": completion, **reference})
    return found


def classified(count: int) -> list[Batch]:
    return [{**row, "labels": torch.tensor([i % 3])} for i, row in enumerate(token_examples(count))]


def x_of(forward: object, batch: Batch) -> Tensor:
    return forward(batch["x"])


CASES = {
    "classes": (lambda: tiny_model("bert"), ClassLogits(), classified),
    "sequences": (tiny_model, SequenceLogProb(), token_examples),
    "tied sequences": (lambda: tiny_model("gpt2", tied=True), SequenceLogProb(), token_examples),
    "pairs": (lambda: tiny_model("qwen2"), DPOMargin(0.1), pairs),
    "adapter": (lambda: adapted(tiny_model(), "lora"), DPOMargin(0.1), pairs),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_textbook_one(case: str) -> None:
    make, task, data = CASES[case]
    model, batches = make().double().eval(), data(7)
    probe, test = batches[:5], batches[5:]
    j, j_test = (reference_jacobian(model, part, task.outputs) for part in (probe, test))
    close = {"rtol": 1e-10, "atol": 1e-10 * float((j @ j.T).abs().max())}
    torch.testing.assert_close(empirical_ntk(model, probe, task.outputs, chunk=2), j @ j.T, **close)
    scales = {name: torch.rand_like(p) for name, p in model.named_parameters() if p.requires_grad}
    p = torch.cat([s.reshape(-1) for s in scales.values()])
    for chunk in (3, 100):
        kernel, cross = kernels(model, probe, test, task.outputs, chunk, scales)
        torch.testing.assert_close(kernel, j * p @ j.T, **close)
        torch.testing.assert_close(cross, j_test * p @ j.T, **close)


def test_chunks_of_every_size_give_one_kernel() -> None:
    """Batches of several examples, outputs of one example in different chunks, more test than probe."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    probe, test = ([{"x": torch.randn(b, 3).double()} for b in sizes] for sizes in ((1, 2, 1), (3, 2, 1)))
    j, j_test = (reference_jacobian(model, part, x_of) for part in (probe, test))
    for chunk in range(1, 14):
        for found, against in zip(kernels(model, probe, test, x_of, chunk), (j, j_test), strict=True):
            torch.testing.assert_close(found, against @ j.T, rtol=1e-12, atol=1e-12)


def test_no_more_than_two_chunks_of_gradients_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    made, most, form = [], [], _Jacobian.__call__

    def counted(self: _Jacobian, picked: slice) -> Tensor:
        made.append(weakref.ref(found := form(self, picked)))
        most.append(sum(ref() is not None for ref in made))
        return found

    monkeypatch.setattr(_Jacobian, "__call__", counted)
    batches = [{"x": torch.randn(1, 50)}] * 10
    kernels(nn.Linear(50, 4), batches, batches[:2], x_of, chunk=8)
    assert len(made) == 1 + (4 + 3 + 2 + 1) + 5 and max(most) == 2  # 5 chunks in pairs, 5 times the test's


def test_the_model_is_left_as_it_was() -> None:
    model, hooked = tiny_model().train(), list[Tensor]()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for p in model.parameters():
        p.register_hook(hooked.append)
    empirical_ntk(model, token_examples(2), SequenceLogProb().outputs)
    assert [module.training for module in model.modules()] == before
    assert not hooked and all(p.grad is None for p in model.parameters())


def test_curvature_and_gradient_of_the_losses() -> None:
    u, labels = torch.randn(4, 3).double(), {"labels": torch.tensor([0, 1, 2, 0])}
    losses, g, b = loss_terms(ClassLogits(), u, labels)
    p = u.softmax(1)
    torch.testing.assert_close(g, p - torch.eye(3)[labels["labels"]].double())
    torch.testing.assert_close(b, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    torch.testing.assert_close(losses, -p.gather(1, labels["labels"][:, None]).squeeze(1).log())
    _, g, b = loss_terms(SequenceLogProb(), u[:, :1], {"labels": torch.zeros(4, 6, dtype=torch.long)})
    assert bool((g == -1 / 5).all()) and not b.any()


def test_what_cannot_be_is_refused() -> None:
    model, probe = nn.Linear(2, 1), [{"x": torch.ones(1, 2)}]
    for given, chunk, message in ((probe, 0, "chunk must be"), ([], 1, "at least one example")):
        with pytest.raises(ValueError, match=message):
            empirical_ntk(model, given, x_of, chunk)
    with pytest.raises(ValueError, match="no trainable parameter"):
        empirical_ntk(model.requires_grad_(False), probe, x_of)
