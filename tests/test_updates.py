"""The two updates as functions of tensors: they read nothing back, and a GPU replays what it does eagerly."""

import importlib

import pytest
import torch
from conftest import SCRIPTS
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# They read a number back, or have a result whose shape depends on the data.
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.unique_dim)
CASES = [
    *[(script, {}) for script in SCRIPTS],
    *[("stas_ippo_mpe.py", {"coalition": kind}) for kind in ("permutation", "exact", "all")],
    ("stas_ippo_mpe.py", {"continuous_actions": True, "critic": "centralized"}),
    ("stas_ippo_mpe.py", {"scenario": "tag", "clip_vloss": True, "norm_adv": False, "credit": "temporal"}),
    ("stas_ml_ippo_mpe.py", {"attention_window": 3, "outcome": False, "embedding": "linear"}),
]


def build(script: str, device, **flags):
    """The module, args, the networks, their optimizers, and a batch for each update, of a roll-out."""
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.Args(emb_dim=8, num_heads=2, **flags)
    args.reward_scale = args.reward_scale or 10.0
    torch.manual_seed(0)
    env = module.make_env(args, 16, device)
    agent, decomposer = (network.to(device) for network in module.make_networks(args, env))
    adam = {"lr": torch.tensor(1e-3, device=device), "fused": True, "capturable": True}
    optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in (agent, decomposer)]
    episodes = module.rollout(env, agent, 1)
    value, valid = episodes["value"], episodes["valid"]
    steps = {name: episodes[name].flatten(0, 1) for name in ("inputs", "act", "logprob", "value")}
    steps |= {"advantage": torch.randn_like(value).flatten(0, 1), "return": torch.randn_like(value).flatten(0, 1)}
    steps |= {"weight": valid.flatten().unsqueeze(1).float(), "ent_coef": torch.tensor(0.01, device=device)}
    stored = {
        "obs": episodes["obs"].half(),
        "act": episodes["act"].half() if env.continuous else episodes["act"].short(),
    }
    stored |= {"valid": valid, "team_return": episodes["team_reward"].sum(dim=1)}
    return module, args, agent, decomposer, *optimizers, steps, stored


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        assert function.overloadpacket not in READS, f"{function} reads a number back"
        masks = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        indices = args[1] if masks else ()
        assert all(index is None or index.dtype != torch.bool for index in indices), f"{function} by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script, flags", CASES)
def test_nothing_is_read_back_inside_the_updates(script, flags):
    module, args, agent, decomposer, agent_optimizer, decomposer_optimizer, steps, stored = build(
        script, "cpu", **flags
    )
    for _ in range(2):  # the first makes the optimizers' state
        with Watch() as watch:
            module.update_agent(args, agent, agent_optimizer, steps)
            module.update_decomposer(args, decomposer, decomposer_optimizer, stored)
        assert watch.calls > 100


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.nonzero, lambda x: x[x > 0]])
def test_what_reads_back_is_seen(read):
    with Watch(), pytest.raises(AssertionError):
        read(torch.ones(1))


@pytest.mark.parametrize("norm_adv", [True, False])
def test_a_minibatch_of_nothing_but_padding_changes_nothing(norm_adv):
    """As a GPU may draw one, where episodes end early."""
    module, args, agent, _, optimizer, _, steps, _ = build("stas_ippo_mpe.py", "cpu", norm_adv=norm_adv)
    before = [weights.clone() for weights in agent.parameters()]
    losses = module.update_agent(args, agent, optimizer, steps | {"weight": torch.zeros_like(steps["weight"])})
    assert {loss.item() for loss in losses.values()} == {0}
    assert all(torch.equal(weights, old) for weights, old in zip(agent.parameters(), before))


def test_steps_without_weight_do_not_count():
    """An update of some steps is that of all, where the others have no weight."""
    weights = []
    for chosen in (True, False):
        module, args, agent, _, optimizer, _, steps, _ = build("stas_ippo_mpe.py", "cpu")
        counts = torch.arange(len(steps["act"])) % 3 > 0
        steps["weight"] = counts.unsqueeze(1).float()
        steps["advantage"][~counts] = 1e3
        if chosen:
            steps = {name: values[counts] if values.dim() else values for name, values in steps.items()}
        losses = module.update_agent(args, agent, optimizer, steps)
        weights.append(
            torch.cat([w.detach().flatten() for w in agent.parameters()] + [torch.stack([*losses.values()])])
        )
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script, flags", CASES)
def test_a_graph_does_what_the_eager_update_does_and_can_be_repeated(script, flags):
    def train(graph: bool, seed: int = 1) -> list[torch.Tensor]:
        module, args, agent, decomposer, *optimizers, steps, stored = build(script, "cuda", **flags)
        updates = [module.update_agent, module.update_decomposer]
        if graph:
            updates = [module.CudaGraph(update) for update in updates]
        for k in range(8):
            torch.manual_seed(seed + k)
            order = torch.randperm(len(steps["act"]), device="cuda")
            batch = {name: values[order] if values.dim() else values for name, values in steps.items()}
            some = torch.randint(16, (8,), device="cuda")
            results = [updates[0](args, agent, optimizers[0], batch)]
            results.append(
                updates[1](args, decomposer, optimizers[1], {n: values[some] for n, values in stored.items()})
            )
        weights = [torch.cat([w.detach().flatten() for w in network.parameters()]) for network in (agent, decomposer)]
        return weights + [torch.stack([*results[0].values()]), results[1]]

    eager, one, two, other = train(False), train(True), train(True), train(True, seed=100)
    for a, b, c in zip(eager, one, two):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(b, c)
    assert not torch.equal(one[1], other[1])  # coalitions and batches follow the seed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_shapes_are_passed_on():
    module, args, agent, _, optimizer, _, steps, _ = build("stas_ippo_mpe.py", "cuda")
    update = module.CudaGraph(module.update_agent)
    for size in (64, 64, 64, 64, 10, 64):
        batch = {name: values[:size] if values.dim() else values for name, values in steps.items()}
        assert all(loss.isfinite() for loss in update(args, agent, optimizer, batch).values())
    assert update.calls == 5
