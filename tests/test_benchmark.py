"""What the benchmarks compute themselves, against definitions."""

import importlib
import itertools
import math

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def shapley(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    return importlib.import_module("shapley")


@pytest.mark.parametrize("kind", ["additive", "pairwise", "multiplicative"])
@pytest.mark.parametrize("num_agents", [2, 3, 5])
def test_shapley_values_of_the_games_by_enumeration(shapley, kind, num_agents):
    given = torch.rand(num_agents, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(coalition: tuple[int, ...]) -> float:
        """The team reward if only the coalition gives something."""
        parts = [given[i].item() if i in coalition else 0.0 for i in range(num_agents)]
        if kind == "additive":
            return sum(parts) / num_agents
        if kind == "pairwise":
            products = [a * b for a, b in itertools.combinations(parts, 2)]
            return sum(products) / len(products)
        return math.prod(parts)

    values = shapley.game(kind, given)
    orders = list(itertools.permutations(range(num_agents)))
    for i in range(num_agents):
        before = [order[: order.index(i)] for order in orders]
        expected = sum(value((*some, i)) - value(some) for some in before) / len(orders)
        assert values[i].item() == pytest.approx(expected)
    assert values.sum().item() == pytest.approx(value(tuple(range(num_agents))))
    batch = shapley.game(kind, given.expand(4, 2, -1))
    assert torch.allclose(batch, values.expand(4, 2, -1))


def test_unknown_game(shapley):
    with pytest.raises(ValueError, match="game"):
        shapley.game("chess", torch.ones(3))


def test_steps_to_pass_waits_for_a_mean_of_five(shapley):
    returns = [-30, -30, -19, -30, -30, -19, -19, -19, -19, -19, -19]
    assert shapley.steps_to_pass([1000 * (i + 1) for i in range(11)], returns) == 10_000
    assert shapley.steps_to_pass([1, 2, 3, 4, 5, 6], [-10, -10, -30, -30, -30, -20.5]) == math.inf


def test_exponent(shapley):
    assert shapley.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_independent_coalitions_have_no_pairs(shapley):
    masks = shapley.independent_coalitions("bernoulli", 2, 500, 4, torch.Generator().manual_seed(0))
    both = (masks[0] == masks[1])[:, ~torch.eye(4, dtype=torch.bool)]
    assert masks.shape == (2, 500, 4, 4) and both.double().mean().item() == pytest.approx(0.5, abs=0.03)
