"""The decomposer against independent, obvious versions of its parts, and the credits against their definitions."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stas_ippo_alicebob import (
    Decomposer,
    ReplayBuffer,
    ShapleyAttention,
    centred_correlation,
    conserve,
    decompose,
    explained_variance,
    sample_coalitions,
    update_decomposer,
)
from stas_ml_ippo_mpe import MLDecomposer

D, H = 8, 2


def make_block(num_agents: int, seed: int = 0) -> ShapleyAttention:
    """A Shapley block in float64 whose attention is far from uniform, so that coalitions matter."""
    torch.manual_seed(seed)
    block = ShapleyAttention(D, H, num_agents).double()
    with torch.no_grad():
        block.identity.mul_(30)
        block.query.mul_(3)
    return block


def attention_by_definition(block: ShapleyAttention, x: torch.Tensor, i: int, members: list[int]) -> torch.Tensor:
    """Attn_i over `members`, one head and one agent at a time: x (N, D) -> (D,)."""
    x = x + block.identity
    query = x[i] @ block.query[i]
    heads = []
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        key_weight, value_weight = block.key_value.weight[:D], block.key_value.weight[D:]
        key_bias, value_bias = block.key_value.bias[:D], block.key_value.bias[D:]
        scores, values = [], []
        for j in members:
            key, value = key_weight @ x[j] + key_bias, value_weight @ x[j] + value_bias
            scores.append(query[part] @ key[part] / math.sqrt(D // H))
            values.append(value[part])
        shares = torch.stack(scores).softmax(0)
        heads.append(sum(share * value for share, value in zip(shares, values)))
    return block.proj.weight @ torch.cat(heads) + block.proj.bias


def others_subsets(i: int, num_agents: int):
    others = [j for j in range(num_agents) if j != i]
    for size in range(num_agents):
        yield from itertools.combinations(others, size)


def brute_force(block: ShapleyAttention, x: torch.Tensor, weighting: str) -> torch.Tensor:
    """E[f_i(C)] over all coalitions by definition: x (N, D) -> (N, D). "orders" enumerates all N! orders instead."""
    N = len(x)
    rows = []
    for i in range(N):
        total = torch.zeros(D, dtype=x.dtype)
        if weighting == "orders":
            for order in itertools.permutations(range(N)):
                before = list(order[: order.index(i)])
                total = total + attention_by_definition(block, x, i, [*before, i]) / math.factorial(N)
        else:
            for coalition in others_subsets(i, N):
                c = len(coalition)
                weight = 2.0 ** -(N - 1)
                if weighting == "shapley":
                    weight = math.factorial(c) * math.factorial(N - c - 1) / math.factorial(N)
                total = total + weight * attention_by_definition(block, x, i, [*coalition, i])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("num_agents", [3, 4])
def test_samplers_agree_with_brute_force(num_agents):
    """bernoulli goes to the Banzhaf weighting, permutation to Shapley's, within 4 standard errors; exact is exact."""
    block = make_block(num_agents)
    x = torch.randn(num_agents, D, dtype=torch.float64)
    with torch.no_grad():
        limit = {"bernoulli": brute_force(block, x, "banzhaf"), "permutation": brute_force(block, x, "shapley")}
        assert torch.allclose(limit["permutation"], brute_force(block, x, "orders"))
        assert (limit["bernoulli"] - limit["permutation"]).abs().max() > 0.02  # the two can be told apart
        exact = block(x.unsqueeze(0), *sample_coalitions("exact", 1, 1, num_agents))[0]
        assert torch.allclose(exact, limit["permutation"], atol=1e-7)
        for kind in limit:
            torch.manual_seed(0)
            draws = block(x.expand(40_000, -1, -1), *sample_coalitions(kind, 1, 40_000, num_agents))
            error = (draws.mean(0) - limit[kind]).abs() / (draws.std(0) / math.sqrt(len(draws)) + 1e-12)
            assert error.max() < 4
            other = limit["permutation" if kind == "bernoulli" else "bernoulli"]
            assert (draws.mean(0) - other).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["bernoulli", "permutation"])
def test_error_falls_like_one_over_root_of_the_pairs(kind):
    block = make_block(4)
    x = torch.randn(4, D, dtype=torch.float64)
    with torch.no_grad():
        limit = brute_force(block, x, "banzhaf" if kind == "bernoulli" else "shapley")
        errors = []
        for m in (2, 8, 32, 128):
            torch.manual_seed(m)
            phi = block(x.expand(2000, -1, -1), *sample_coalitions(kind, m, 2000, 4))
            errors.append((phi - limit).square().mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(64)
    assert slope == pytest.approx(-0.5, abs=0.03)


@pytest.mark.parametrize("num_agents", [1, 2, 3, 5])
def test_exact_enumerates_every_coalition_once_with_shapleys_weights(num_agents):
    masks, weights = sample_coalitions("exact", 1, 2, num_agents)
    assert masks.shape == (2 ** (num_agents - 1), 1, num_agents, num_agents) and masks.dtype == torch.bool
    assert weights.sum().item() == pytest.approx(1)
    for i in range(num_agents):
        found = {frozenset(mask.nonzero().flatten().tolist()) for mask in masks[:, 0, i]}
        assert found == {frozenset({i, *coalition}) for coalition in others_subsets(i, num_agents)}
        for mask, weight in zip(masks[:, 0, i], weights):
            c = int(mask.sum()) - 1
            expected = math.factorial(c) * math.factorial(num_agents - c - 1) / math.factorial(num_agents)
            assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["bernoulli", "permutation"])
def test_draws_differ_between_steps_and_samples_and_are_seeded(kind):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        masks, weights = sample_coalitions(kind, 5, 200, 4)
        assert torch.equal(weights, torch.full((5,), 0.2))
        return masks

    masks = draw(0)
    assert masks.shape == (5, 200, 4, 4) and masks.dtype == torch.bool
    assert masks.diagonal(dim1=-2, dim2=-1).all()
    different = {"bernoulli": 2**4, "permutation": math.factorial(4)}[kind]  # who takes part; the order
    assert len(masks.flatten(0, 1).flatten(1).unique(dim=0)) == different
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[:, 0], masks[:, 1])
    assert torch.equal(masks, draw(0)) and not torch.equal(masks, draw(1))


def test_permutations_are_orders():
    masks, _ = sample_coalitions("permutation", 3, 50, 4)
    sizes = masks.sum(dim=-1).sort(dim=-1).values
    assert (sizes == torch.tensor([1, 2, 3, 4])).all()  # someone comes first, someone second, ...
    pairs = masks.transpose(-2, -1) ^ masks
    assert pairs[..., ~torch.eye(4, dtype=torch.bool)].all()  # of any two, exactly one comes before the other


@pytest.mark.parametrize("kind", ["bernoulli", "permutation"])
def test_coalitions_come_in_complementary_pairs(kind):
    for m in (1, 2, 5, 8):
        masks, _ = sample_coalitions(kind, m, 50, 4)
        assert masks.shape == (m, 50, 4, 4)
        pairs = (m + 1) // 2
        first, second = masks[: m - pairs], masks[pairs:]
        others = ~torch.eye(4, dtype=torch.bool)
        assert (first ^ second)[..., others].all()  # everyone else is in exactly one of the two
        for a, b in itertools.combinations(range(pairs), 2):
            assert not torch.equal(masks[a], masks[b])


@pytest.mark.parametrize("kind, limit", [("bernoulli", "banzhaf"), ("permutation", "shapley")])
def test_pairs_err_less_than_independent_draws(kind, limit):
    """And not by drawing something else: their mean is as right as that of single draws."""
    block, x = make_block(4), torch.randn(4, D, dtype=torch.float64)
    with torch.no_grad():
        limit, many = brute_force(block, x, limit), x.expand(20_000, -1, -1)
        single = torch.cat([sample_coalitions(kind, 1, 20_000, 4)[0] for _ in range(2)])
        masks, weights = sample_coalitions(kind, 2, 20_000, 4)
        pairs = block(many, masks, weights)
        error = (pairs.mean(0) - limit).abs() / (pairs.std(0) / math.sqrt(len(pairs)))
        assert error.max() < 4
        noise = [(draws - limit).square().mean().sqrt() for draws in (pairs, block(many, single, weights))]
        assert noise[0] < 0.8 * noise[1]


def test_all_is_plain_attention():
    """Everyone always: torch's own attention over the agents, with no mask at all."""
    block, x = make_block(4), torch.randn(6, 4, D, dtype=torch.float64)
    tokens = x + block.identity
    query = torch.stack([tokens[:, i] @ block.query[i] for i in range(4)], dim=1)
    heads = (y.view(6, 4, H, D // H).transpose(1, 2) for y in (query, *block.key_value(tokens).chunk(2, dim=-1)))
    expected = block.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(6, 4, D))
    assert torch.allclose(block(x, *sample_coalitions("all", 7, 6, 4)), expected, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_averaging_probabilities_equals_averaging_full_attention(weighted):
    M, B, N = 6, 10, 4
    block, x = make_block(N), torch.randn(B, N, D, dtype=torch.float64)
    masks, weights = sample_coalitions("bernoulli", M, B, N)
    if weighted:
        weights = torch.rand(M, dtype=torch.float64).softmax(0)
    fast = block(x, masks, weights)
    for b in range(B):
        for i in range(N):
            outputs = [
                attention_by_definition(block, x[b], i, masks[m, b, i].nonzero().flatten().tolist()) for m in range(M)
            ]
            expected = sum(w * out for w, out in zip(weights.double(), outputs))
            assert torch.allclose(fast[b, i], expected, atol=1e-6)


def test_one_mask_for_the_whole_batch():
    block, x = make_block(3), torch.randn(5, 3, D, dtype=torch.float64)
    masks, weights = sample_coalitions("bernoulli", 4, 1, 3)
    assert torch.allclose(block(x, masks, weights), block(x, masks.expand(-1, 5, -1, -1), weights), atol=1e-12)


def test_an_agent_masked_out_cannot_change_the_others():
    block, x = make_block(4), torch.randn(6, 4, D, dtype=torch.float64)
    masks, weights = sample_coalitions("bernoulli", 3, 6, 4)
    masks[..., 2] = False
    masks[..., 2, 2] = True
    changed = x.clone()
    changed[:, 2] += 100 * torch.randn(6, D, dtype=torch.float64)
    before, after = block(x, masks, weights), block(changed, masks, weights)
    others = [0, 1, 3]
    assert torch.equal(before[:, others], after[:, others])
    assert (before[:, 2] - after[:, 2]).abs().min() > 0


def test_large_scores_stay_finite():
    """An agent that dwarfs all others in attention leaves the coalitions without it well defined."""
    block = ShapleyAttention(D, H, 3)
    x = 1e4 * torch.randn(50, 3, D)
    phi = block(x.requires_grad_(), *sample_coalitions("bernoulli", 5, 50, 3))
    phi.sum().backward()
    assert phi.isfinite().all() and x.grad.isfinite().all() and block.query.grad.isfinite().all()


def test_queries_and_identities_tell_agents_apart():
    block, x = make_block(3), torch.randn(1, 1, D, dtype=torch.float64).expand(1, 3, D)
    alone = torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3)
    phi = block(x, alone, torch.ones(1))[0]
    assert not torch.allclose(phi[0], phi[1]) and not torch.allclose(phi[1], phi[2])


E, T, N, OBS, A = 5, 7, 3, 6, 4


@pytest.fixture(params=[Decomposer, MLDecomposer])
def kind(request) -> type:
    """Tests that use a kind run for each of them."""
    return request.param


def new_decomposer(kind: type = Decomposer, seed: int = 0, **flags) -> Decomposer | MLDecomposer:
    torch.manual_seed(seed)
    sizes = dict(obs_dim=OBS, num_actions=A, num_agents=N, horizon=T, continuous=False)
    env = SimpleNamespace(**{name: flags.pop(name, value) for name, value in sizes.items()})
    defaults = dict(emb_dim=D, num_heads=H, num_layers=2, mc_samples=3, coalition="bernoulli", attention_window=0)
    defaults |= dict(credit="stas", embedding="mlp", outcome=True)
    return kind(SimpleNamespace(**defaults | flags), env)


def make_decomposer(*args, **flags) -> Decomposer | MLDecomposer:
    decomposer = new_decomposer(*args, **flags)
    for layer in decomposer.temporal:
        torch.nn.init.normal_(layer.self_attn.out_proj.weight, std=D**-0.5)  # these start at zero
        torch.nn.init.normal_(layer.linear2.weight, std=D**-0.5)
    if hasattr(decomposer, "gate"):
        torch.nn.init.ones_(decomposer.gate)
    torch.nn.init.normal_(decomposer.head.weight)
    torch.nn.init.normal_(decomposer.position, std=0.1)
    return decomposer


def make_episodes(seed: int = 0):
    draw = generator(seed)
    obs = torch.randn(E, T, N, OBS, generator=draw)
    act = torch.randint(A, (E, T, N), generator=draw)
    length = torch.tensor([7, 3, 1, 5, 7])
    return obs, act, torch.arange(T) < length.unsqueeze(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(decomposer, *episodes, seed: int = 0) -> torch.Tensor:
    """The credits, with coalitions drawn from a fresh seed."""
    torch.manual_seed(seed)
    return decomposer(*episodes)


@pytest.mark.parametrize("coalition", ["bernoulli", "permutation", "exact", "all"])
@pytest.mark.parametrize("credit", ["stas", "temporal"])
@pytest.mark.parametrize("outcome", [False, True])
def test_no_credit_depends_on_later_steps(kind, coalition, credit, outcome):
    """Nor on later observations, but for the one a step leads to if `outcome` is set."""
    decomposer = make_decomposer(kind, coalition=coalition, credit=credit, outcome=outcome)
    obs, act, _ = make_episodes()
    valid = torch.ones(E, T, dtype=torch.bool)
    before = seeded(decomposer, obs, act, valid)
    for t in range(T):
        obs2, act2 = obs.clone(), act.clone()
        obs2[:, t] += 1
        act2[:, t] = (act2[:, t] + 1) % A
        after, first = seeded(decomposer, obs2, act2, valid), max(0, t - outcome)
        assert torch.allclose(before[:, :first], after[:, :first], atol=1e-6)
        assert ((before - after)[:, first:].abs().amax(dim=(0, 2)) > 1e-4).all()  # and all later steps see it


def test_what_lies_after_the_end_changes_nothing(kind):
    decomposer, (obs, act, valid) = make_decomposer(kind), make_episodes()
    before = seeded(decomposer, obs, act, valid)
    assert (before[~valid] == 0).all() and (before[valid] != 0).all()
    obs2, act2 = obs.clone(), act.clone()
    obs2[~valid] = 1e3
    act2[~valid] = 0
    assert torch.allclose(before, seeded(decomposer, obs2, act2, valid), atol=1e-6)


def test_a_batch_equals_single_episodes_of_their_own_length(kind):
    """Exact coalitions draw nothing, so each episode alone, cut to its length, must give the same credits."""
    decomposer, (obs, act, valid) = make_decomposer(kind, coalition="exact"), make_episodes()
    together = decomposer(obs, act, valid)
    for e in range(E):
        length = int(valid[e].sum())
        cut = slice(e, e + 1), slice(0, length)
        alone = decomposer(obs[cut], act[cut], valid[cut])
        assert torch.allclose(together[e, :length], alone[0], atol=1e-6)


def test_temporal_shares_equally(kind):
    obs, act, valid = make_episodes()
    credits = make_decomposer(kind, credit="temporal")(obs, act, valid)
    assert torch.equal(credits, credits[:, :, :1].expand(-1, -1, N)) and credits[valid].abs().min() > 0


def embedding_by_definition(decomposer, obs: torch.Tensor, act: torch.Tensor, t: int, i: int) -> torch.Tensor:
    """The token of agent i at step t of an episode cut to its length: obs (T, N, O), act (T, N[, A]) -> (D,)"""
    own_act = act[t, i] if decomposer.continuous else torch.eye(A)[act[t, i]]
    seen = (obs[t, i], obs[min(t + 1, len(obs) - 1), i]) if decomposer.outcome else (obs[t, i],)
    x = torch.cat((5 * torch.cat(seen), own_act, torch.eye(N)[i])).to(obs.dtype)
    layers = decomposer.embedding
    if isinstance(layers, torch.nn.Linear):
        return layers.weight @ x + layers.bias + decomposer.position[t]
    for layer in (layers[0], layers[2]):
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    return layers[4].weight @ x + layers[4].bias + decomposer.position[t]


@pytest.mark.parametrize("kind_of_embedding", ["mlp", "linear"])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("outcome", [False, True])
def test_embedding_by_definition(kind, kind_of_embedding, continuous, outcome):
    decomposer = make_decomposer(kind, embedding=kind_of_embedding, continuous=continuous, outcome=outcome)
    obs, act, valid = make_episodes()
    act = torch.rand(E, T, N, A) if continuous else act
    seen = []  # by the first temporal layer: one sequence of tokens per agent
    decomposer.temporal[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    decomposer(obs, act, valid)
    tokens = seen[0].view(E, N, T, D)
    for e, t, i in itertools.product(range(E), range(T), range(N)):
        end = max(int(valid[e].sum()), t + 1)  # a step of the padding stands alone
        expected = embedding_by_definition(decomposer, obs[e, :end], act[e, :end], t, i)
        assert torch.allclose(tokens[e, i, t], expected, atol=1e-5)


@pytest.mark.parametrize("outcome", [False, True])
def test_a_new_decomposer_sees_each_step_alone(kind, outcome):
    """Its temporal layers begin as the identity, so that no credit depends on earlier steps."""
    decomposer, (obs, act, valid) = new_decomposer(kind, outcome=outcome), make_episodes()
    torch.nn.init.normal_(decomposer.head.weight)
    before = seeded(decomposer, obs, act, valid)
    obs[:, 0] += 1
    changed = (seeded(decomposer, obs, act, valid) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [True] + [False] * (T - 1)


def test_blocks_of_a_new_stas_ml_do_not_feed_each_other():
    assert torch.equal(new_decomposer(MLDecomposer, num_layers=3).gate, torch.zeros(2))


@pytest.mark.parametrize("outcome", [False, True])
def test_without_temporal_layers_credits_see_their_step_alone(outcome):
    decomposer, (obs, act, valid) = make_decomposer(num_layers=0, outcome=outcome), make_episodes()
    before = seeded(decomposer, obs, act, valid)
    obs[:, 2] += 1
    changed = (seeded(decomposer, obs, act, valid) - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [2 - outcome <= t <= 2 for t in range(T)]


@pytest.mark.parametrize("continuous", [False, True])
def test_a_decomposer_takes_what_the_buffer_stores(kind, continuous):
    """Half precision and short integers, which cost a little accuracy."""
    decomposer, (obs, act, valid) = make_decomposer(kind, continuous=continuous), make_episodes()
    act = torch.rand(E, T, N, A) if continuous else act
    exact = seeded(decomposer, obs, act, valid)
    stored = seeded(decomposer, obs.half(), act.half() if continuous else act.short(), valid)
    assert torch.allclose(exact, stored, atol=2e-2) and not torch.equal(exact, stored)


def test_a_new_decomposer_gives_no_credit(kind):
    assert (new_decomposer(kind)(*make_episodes()) == 0).all()


def test_coalitions_are_drawn_anew_for_every_call_and_step(kind):
    decomposer, episodes = make_decomposer(kind, mc_samples=1), make_episodes()
    assert torch.equal(seeded(decomposer, *episodes, seed=1), seeded(decomposer, *episodes, seed=1))
    assert not torch.equal(seeded(decomposer, *episodes, seed=1), seeded(decomposer, *episodes, seed=2))
    # Two identical episodes in one batch get different draws.
    twice = [x[:1].expand(2, *x.shape[1:]) for x in episodes]
    first, second = seeded(decomposer, *twice)
    assert not torch.allclose(first, second)


def all_alike(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_coalitions` with equal weights."""
    masks, weights = sample_coalitions(*args)
    return masks, torch.full_like(weights, 1 / len(weights))


def test_the_decomposer_uses_the_coalitions_it_is_told_to(monkeypatch):
    """The mean over draws goes to `exact` for permutation, to the Banzhaf weighting for bernoulli."""
    episode = [x[:1, :2] for x in make_episodes()]
    limits, draws = {}, {}
    with torch.no_grad():
        for kind in ("bernoulli", "permutation", "exact"):
            decomposer = make_decomposer(coalition=kind, mc_samples=2)
            decomposer.shapley.identity.mul_(30)
            decomposer.shapley.query.mul_(3)
            decomposer.head.weight.mul_(10)
            if kind == "exact":
                limits["permutation"] = decomposer(*episode)[0]
                monkeypatch.setattr("stas_ippo_alicebob.sample_coalitions", all_alike)
                limits["bernoulli"] = decomposer(*episode)[0]
                monkeypatch.undo()
            else:
                many = [x.expand(5000, *x.shape[1:]) for x in episode]
                draws[kind] = seeded(decomposer, *many)
    assert (limits["permutation"] - limits["bernoulli"]).abs().max() > 0.01
    for kind, credits in draws.items():
        error = (credits.mean(dim=0) - limits[kind]).abs() / (credits.std(dim=0) / math.sqrt(len(credits)))
        assert error.max() < 4
        other = limits["bernoulli" if kind == "permutation" else "permutation"]
        assert ((credits.mean(dim=0) - other).abs() / (credits.std(dim=0) / math.sqrt(len(credits)))).max() > 6


def test_more_samples_less_noise(kind):
    episodes = make_episodes()
    noise = []
    for m in (2, 32):  # pairs, as a coalition comes with its complement
        decomposer = make_decomposer(kind, mc_samples=m)
        draws = torch.stack([seeded(decomposer, *episodes, seed=s) for s in range(50)])
        noise.append(draws.std(dim=0)[episodes[2]].mean().item())
    assert noise[0] / noise[1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(
    "kind, coalition",
    [(Decomposer, "bernoulli"), (Decomposer, "permutation"), (Decomposer, "exact"), (MLDecomposer, "bernoulli")],
)
def test_the_decomposer_learns_returns_of_a_known_decomposition(kind, coalition):
    """True reward of agent i at step t: its first feature. The fit must find the sum, and mostly who and when."""
    decomposer = make_decomposer(kind, coalition=coalition, emb_dim=32)
    optimizer, args = torch.optim.Adam(decomposer.parameters(), lr=3e-3), SimpleNamespace(reward_scale=7)
    draw = generator(1)
    for _ in range(400):
        obs = torch.randn(64, T, N, OBS, generator=draw)
        act = torch.randint(A, (64, T, N), generator=draw)
        valid = torch.arange(T) < torch.randint(1, T + 1, (64, 1), generator=draw)
        true = obs[..., 0] * valid.unsqueeze(-1)
        batch = {"obs": obs, "act": act, "valid": valid, "team_return": 7 * true.sum(dim=(1, 2))}
        loss = update_decomposer(args, decomposer, optimizer, batch)
    assert loss.item() < 0.15 * true.sum(dim=(1, 2)).var().item()
    credits = decomposer(obs, act, valid)
    assert centred_correlation(credits.sum(2), true.sum(2), valid) > 0.9
    assert centred_correlation(credits[valid], true[valid], torch.ones(int(valid.sum()), N)) > 0.8


@pytest.mark.parametrize("credit", ["stas", "temporal"])
def test_stas_ml_with_one_block_is_stas(credit):
    flags = dict(num_layers=1, credit=credit, seed=3)
    kinds = (MLDecomposer, Decomposer)
    ours, theirs = (seeded(make_decomposer(kind, **flags), *make_episodes()) for kind in kinds)
    assert torch.equal(ours, theirs) and ours.abs().max() > 0


def test_stas_ml_by_definition():
    """Three blocks, one episode and one step of one agent at a time; the head reads every block's output."""
    decomposer = make_decomposer(MLDecomposer, num_layers=3, coalition="exact").double()
    for parameter in decomposer.parameters():  # norms of a new network are all alike
        torch.nn.init.normal_(parameter, std=0.5)
    obs, act, valid = (x.double() if x.is_floating_point() else x for x in make_episodes())
    for e in range(E):
        length = int(valid[e].sum())
        episode = obs[e, :length], act[e, :length]
        tokens = [[embedding_by_definition(decomposer, *episode, t, i) for t in range(length)] for i in range(N)]
        outputs = []
        for k in range(3):
            causal = decomposer.unseen[:length, :length]
            tokens = [list(decomposer.temporal[k](torch.stack(row).unsqueeze(0), causal)[0]) for row in tokens]
            phi = []
            for t in range(length):
                x = torch.stack([decomposer.norm[k](tokens[i][t]) for i in range(N)])
                phi.append(brute_force(decomposer.shapley[k], x, "shapley"))
            gate = decomposer.gate[k] if k < 2 else 0
            tokens = [[tokens[i][t] + gate * phi[t][i] for t in range(length)] for i in range(N)]
            outputs.append(torch.stack(phi))  # (length, N, D)
        expected = decomposer.head(torch.cat(outputs, dim=-1)).squeeze(-1) / math.sqrt(T * N)
        assert torch.allclose(decomposer(obs, act, valid)[e, :length], expected, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 2, 5, 6, 7, 30])
def test_temporal_layer_against_a_loop(window):
    """A transformer layer with norms in front, one query, one head and one sequence at a time."""
    decomposer = new_decomposer(attention_window=window, num_layers=1).double()
    (layer,) = decomposer.temporal
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, T, D, dtype=torch.float64)
    result = layer(x, decomposer.unseen)
    attention = layer.self_attn
    for b in range(2):
        q, k, v = (layer.norm1(x[b]) @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)  # (T, D)
        for t in range(T):
            seen = slice(0 if window == 0 else max(0, t - window + 1), t + 1)
            heads = []
            for h in range(H):
                part = slice(h * D // H, (h + 1) * D // H)
                scores = k[seen, part] @ q[t, part] / math.sqrt(D // H)
                heads.append(scores.softmax(0) @ v[seen, part])
            y = x[b, t] + attention.out_proj(torch.cat(heads))
            expected = y + layer.linear2(layer.linear1(layer.norm2(y)).clamp(min=0))
            assert torch.allclose(result[b, t], expected, atol=1e-10)


@pytest.mark.parametrize("outcome", [False, True])
def test_how_far_a_window_reaches(kind, outcome):
    """Each of two layers looks back on W - 1 earlier steps."""
    decomposer, (obs, act, _) = make_decomposer(kind, attention_window=2, outcome=outcome), make_episodes()
    valid = torch.ones(E, T, dtype=torch.bool)
    before = seeded(decomposer, obs, act, valid)
    obs[:, 1] += 1
    reached = ((seeded(decomposer, obs, act, valid) - before).abs().amax(dim=(0, 2)) > 1e-6).tolist()
    assert reached == [outcome, True, True, True, False, False, False]


def make_args(**flags) -> SimpleNamespace:
    return SimpleNamespace(**dict(credit="stas", reward_scale=10.0) | flags)


def episodes_of(obs, act, team_reward, valid) -> dict[str, torch.Tensor]:
    return dict(obs=obs, act=act, team_reward=team_reward, valid=valid)


def make_rewards(valid: torch.Tensor) -> torch.Tensor:
    return torch.randn(valid.shape, generator=generator(5)) * valid


def test_stas_and_temporal_credits_sum_to_the_predicted_return_in_raw_units():
    obs, act, valid = make_episodes()
    reward = make_rewards(valid)
    for credit in ("stas", "temporal"):
        decomposer = make_decomposer(credit=credit)
        predicted = torch.stack([seeded(decomposer, obs, act, valid)[e][valid[e]].sum() for e in range(E)])
        torch.manual_seed(0)
        credits = decompose(make_args(credit=credit), decomposer, episodes_of(obs, act, reward, valid))
        assert credits.shape == (E, T, N) and (credits[~valid] == 0).all()
        assert torch.allclose(credits.sum(dim=(1, 2)), 10 * predicted, atol=1e-4)


@pytest.mark.parametrize("where", ["terminal", "uniform"])
def test_conserve_makes_credits_sum_to_the_true_return(where):
    obs, act, valid = make_episodes()
    reward, decomposer = make_rewards(valid), make_decomposer()
    raw = decompose(make_args(), decomposer, episodes_of(obs, act, reward, valid))
    team_return = reward.sum(dim=1)
    assert (raw.sum(dim=(1, 2)) - team_return).abs().min() > 1e-2
    kept = conserve(raw, team_return, valid, where)
    assert torch.allclose(kept.sum(dim=(1, 2)), team_return, atol=1e-4) and (kept[~valid] == 0).all()
    added = (kept - raw).detach()
    assert torch.allclose(added, added[:, :, :1].expand(-1, -1, N), atol=1e-5)  # the agents share equally
    last = valid & ~F.pad(valid, (0, 1))[:, 1:]
    if where == "terminal":
        assert (added[~last] == 0).all()
    else:
        for e in range(E):
            assert torch.allclose(added[e][valid[e]], added[e, 0].expand(int(valid[e].sum()), N), atol=1e-5)
    assert torch.equal(conserve(raw, team_return, valid, "none"), raw)


def test_dense_episodic_uniform_are_what_they_say():
    obs, act, valid = make_episodes()
    reward = make_rewards(valid)
    credits = {
        kind: decompose(make_args(credit=kind), None, episodes_of(obs, act, reward, valid))
        for kind in ("dense", "episodic", "uniform")
    }
    for e in range(E):
        length, total = int(valid[e].sum()), reward[e].sum().item()
        for t in range(T):
            expected = {
                "dense": reward[e, t].item() / N if t < length else 0,
                "episodic": total / N if t == length - 1 else 0,
                "uniform": total / length / N if t < length else 0,
            }
            for kind, value in expected.items():
                assert credits[kind][e, t].tolist() == pytest.approx([value] * N, abs=1e-5)
    oracle = torch.randn(E, T, N)
    episodes = episodes_of(obs, act, reward, valid) | {"shapley": oracle}
    assert torch.equal(decompose(make_args(credit="shapley"), None, episodes), oracle)


def test_replay_buffer_is_a_ring_of_episodes():
    buffer = ReplayBuffer(5, "cpu")
    for first in (0, 3, 6):
        rows = torch.arange(first, first + 3)
        buffer.add(number=rows, double=2 * rows.unsqueeze(1).expand(-1, 2))
    assert buffer.count == 9
    batch = buffer.sample(500)
    assert batch["number"].unique().tolist() == [4, 5, 6, 7, 8]
    assert torch.equal(batch["double"], 2 * batch["number"].unsqueeze(1).expand(-1, 2))  # rows stay together
    buffer.add(number=torch.arange(20, 32), double=torch.zeros(12, 2, dtype=torch.int64))  # more than it holds
    assert buffer.sample(500)["number"].unique().tolist() == [27, 28, 29, 30, 31]
    copy = ReplayBuffer(5, "cpu")
    copy.load_state_dict(buffer.state_dict())
    for each in (buffer, copy):
        each.add(number=torch.tensor([50, 51]), double=torch.zeros(2, 2, dtype=torch.int64))
    assert torch.equal(copy.data["number"], buffer.data["number"])
    for capacity, kept in ((3, [31, 50, 51]), (9, [29, 30, 31, 50, 51])):  # the latest, and no empty rows
        copy = ReplayBuffer(capacity, "cpu")
        copy.load_state_dict(buffer.state_dict())
        assert copy.sample(500)["number"].unique().tolist() == kept


def test_a_buffer_smaller_than_a_batch_can_be_sampled():
    buffer = ReplayBuffer(100, "cpu")
    buffer.add(number=torch.arange(1, 4))
    drawn = buffer.sample(256)["number"]
    assert drawn.shape == (256,) and drawn.unique().tolist() == [1, 2, 3]  # no empty rows


def test_centred_correlation_against_a_loop():
    x, y = torch.randn(6, 5, generator=generator(1)), torch.randn(6, 5, generator=generator(2))
    valid = torch.arange(5) < torch.tensor([5, 2, 3, 4, 5, 1]).unsqueeze(1)
    a, b = [], []
    for row in range(6):
        xs, ys = x[row][valid[row]], y[row][valid[row]]
        a += (xs - xs.mean()).tolist()
        b += (ys - ys.mean()).tolist()
    expected = torch.corrcoef(torch.tensor([a, b]))[0, 1].item()
    assert centred_correlation(x, y, valid) == pytest.approx(expected, abs=1e-5)
    shifted = x + torch.arange(6).unsqueeze(1) * 100  # a constant per episode must not flatter
    assert centred_correlation(shifted, y, valid) == pytest.approx(expected, abs=1e-3)
    assert math.isnan(centred_correlation(torch.ones(6, 5), y, valid))


def test_explained_variance():
    true = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(true, true) == 1
    assert explained_variance(torch.zeros(4), true) == 0
    assert explained_variance(-true, true) == pytest.approx(-3)
    assert math.isnan(explained_variance(true, torch.ones(4)))
