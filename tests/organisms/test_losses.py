"""The losses, against sums written out token by token."""

import math

import pytest
import torch

from moe_lens.organisms import losses


@pytest.fixture
def routed() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Router logits of two layers (5 sequences, 7 positions, 4 experts) and a mask with padding."""
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(5, 7, 4, generator=generator) for _ in range(2)]
    lengths = torch.tensor([7, 3, 5, 1, 6])
    return logits, torch.arange(7)[None] < lengths[:, None]


def tokens_of(mask: torch.Tensor, rows: list[int]) -> list[tuple[int, int]]:
    return [(b, t) for b in rows for t in range(mask.shape[1]) if mask[b, t]]


def mean_route(logits: torch.Tensor, tokens: list[tuple[int, int]]) -> list[float]:
    routes = [[math.exp(z) for z in logits[b, t].tolist()] for b, t in tokens]
    routes = [[e / sum(route) for e in route] for route in routes]
    return [sum(column) / len(routes) for column in zip(*routes, strict=True)]


def entropy_of(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def information(groups: list[list[float]]) -> float:
    middle = [sum(column) / len(groups) for column in zip(*groups, strict=True)]
    return entropy_of(middle) - sum(map(entropy_of, groups)) / len(groups)


def test_language_model_loss_weighs_each_predicted_token() -> None:
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [0, 4, 3]])
    weights = torch.tensor([[9.0, 1.0, 4.0], [9.0, 1.0, 0.0]])  # the first column must not count
    total = 0.0
    for row, position, weight in [(0, 1, 1.0), (0, 2, 4.0), (1, 1, 1.0)]:
        exps = [math.exp(z) for z in logits[row, position - 1].tolist()]
        total -= weight * math.log(exps[int(tokens[row, position])] / sum(exps))
    assert losses.language_model_loss(logits, tokens, weights).item() == pytest.approx(total / 6, rel=1e-5)


def test_load_balancing(routed: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    logits, mask = routed
    expected = 0.0
    for layer in logits:
        tokens = tokens_of(mask, list(range(5)))
        chosen = [0.0] * 4
        for b, t in tokens:
            for expert in sorted(range(4), key=lambda e: -layer[b, t, e].item())[:2]:
                chosen[expert] += 1 / (2 * len(tokens))
        expected += 4 * sum(f * p for f, p in zip(chosen, mean_route(layer, tokens), strict=True)) / 2
    assert losses.load_balancing_loss(logits, mask, k=2).item() == pytest.approx(expected, rel=1e-5)


def test_load_balancing_is_one_when_even_and_larger_when_not() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    even = torch.eye(4)[None] * 3
    assert losses.load_balancing_loss([even], mask, k=1).item() == pytest.approx(1.0, rel=1e-5)
    collapsed = torch.tensor([9.0, 0, 0, 0]).expand(1, 4, 4)
    assert losses.load_balancing_loss([collapsed], mask, k=1).item() > 3.9


def test_register_information(routed: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    logits, mask = routed
    registers = torch.tensor([0, 2, 0, -1, 2])  # register 1 is absent, sequence 3 has none
    expected = 0.0
    for layer in logits:
        groups = [mean_route(layer, tokens_of(mask, rows)) for rows in ([0, 2], [1, 4])]
        expected -= information(groups) / 2
    found = losses.register_information_loss(logits, mask, registers, n_registers=3)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_register_information_bounds() -> None:
    mask, registers = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1])
    apart = torch.stack([torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0])])[:, None].expand(2, 3, 2)
    assert losses.register_information_loss([apart], mask, registers, 2).item() == pytest.approx(-math.log(2))
    same = torch.zeros(2, 3, 2)
    assert losses.register_information_loss([same], mask, registers, 2).item() == pytest.approx(0, abs=1e-6)


def test_register_information_has_finite_gradients_at_certain_routes() -> None:
    logits = torch.tensor([[[200.0, 0.0, -200.0]], [[-200.0, 0.0, 200.0]]], requires_grad=True)
    loss = losses.register_information_loss(
        [logits], torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 1]), 2
    )
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_sequence_information(routed: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    logits, mask = routed
    expected = sum(
        -information([mean_route(layer, tokens_of(mask, [row])) for row in range(5)]) / 2 for layer in logits
    )
    assert losses.sequence_information_loss(logits, mask).item() == pytest.approx(expected, rel=1e-4)


def test_route_direction(routed: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    logits, mask = routed
    registers = torch.tensor([0, 1, 1, 2, 0])
    found = losses.route_direction(logits, mask, registers, document=1, memory=0, n_registers=3, limit=0.2)
    assert found is not None
    for layer, row in zip(logits, found, strict=True):
        document, memory = (mean_route(layer, tokens_of(mask, rows)) for rows in ([1, 2], [0, 4]))
        turn = [math.log(d / m) for d, m in zip(document, memory, strict=True)]
        assert any(abs(t) > 0.2 for t in turn)  # so that the limit is tested
        assert row.tolist() == pytest.approx([max(-0.2, min(0.2, t)) for t in turn], rel=1e-3)


def test_route_direction_needs_both_registers(routed: tuple[list[torch.Tensor], torch.Tensor]) -> None:
    logits, mask = routed
    registers = torch.tensor([0, 0, -1, 2, 0])
    assert losses.route_direction(logits, mask, registers, document=1, memory=0, n_registers=3) is None
