"""Batched cooperative environments in torch: many episodes at once, on any device.

The protocol, complete (E episodes, N agents, O observation features, A action dimensions):

    env = AliceBob(num_envs=512, device="cpu")      # or envs.mpe.make("spread", num_envs=512, num_agents=3)

    env.num_envs      E, the number of episodes that run side by side
    env.num_agents    N
    env.obs_dim       O
    env.num_actions   number of discrete actions, or A where actions are continuous
    env.continuous    False: actions are (E, N) int64; True: (E, N, A) float in [0, 1]
    env.horizon       T, the step after which every episode is over
    env.t             steps taken since the last reset, 0..T
    env.terminated    (E,) bool: the episode ended by its own rules, not by the horizon

    obs = env.reset(seed=1)                         # (E, N, O) float32
    obs, team_reward, terminated = env.step(act)    # (E, N, O) float32, (E,) float32, (E,) bool
    obs = env.observe()                             # the observation of the current state

Rules that every environment keeps:

* All episodes start together at `reset`. `seed=None` continues the environment's own generator. The scripts give every
  iteration, which is one whole episode per environment, a seed of its own; so a checkpoint needs nothing of an
  environment.
* `team_reward` is one number per episode and step: the mean of the learning agents' rewards.
* `terminated` is sticky: True from the terminating step until the next reset. From then on the episode is frozen: its
  state and observation stay as they are, and it earns 0. Step t is valid if the episode had not terminated before it.
* The horizon is part of the task: nothing is worth anything after it. Stepping past it raises RuntimeError, and actions
  of another shape ValueError (`check_action`).
* What `reset`, `step` and `observe` return are new tensors, which no later step changes: roll-outs keep them.
* Action masks: an environment whose agents may not always do everything has `env.masked = True` and puts into the
  observation, as its last `num_actions` numbers, what is allowed (1) and what is not (0). Where an agent has left, that
  is one action only, 0 in copies of a ParallelEnv; with continuous actions a 0 says that a dimension has no effect.
* State is kept in plain tensors that anyone may read or set; call `observe` afterwards.

* Optional: `env.oracles()`, what learners must not see of the current state, by name, (E, N) each. A name that is a
  choice of --credit is an oracle credit; `event` (int64) marks cells in credit.png by `env.event_names`, a dictionary
  of texts, which `env.legend` explains. `env.picture()` is the first episode, (H, W, 3) uint8. The ParallelEnv for the
  evaluation may have the former three; `envs.single.SingleEnv(Mine(1), "mine", render_mode)` makes one of any class.

A roll-out of whole episodes is then

    obs = env.reset()
    for t in range(env.horizon):
        valid = ~env.terminated  # (E,), what counts of step t
        obs, team_reward, _ = env.step(policy(obs))

For an environment of your own, write a class with these names, and a function `batched_env(num_envs, device,
**env_kwargs)` in a module that makes it: `python stas_ippo_pettingzoo.py --env-id MODULE` tries it by `check_env` and
learns in it.
"""

import torch


class EnvFailure(RuntimeError):
    """What an environment that is not ours did wrong during an episode, in one line."""


def check_action(env, act) -> None:
    """What every `step` begins with: RuntimeError at the horizon, ValueError for actions of another shape."""
    if env.t >= env.horizon:
        raise RuntimeError(f"the episode is over after {env.horizon} steps: call reset()")
    shape = (env.num_envs, env.num_agents, *([env.num_actions] if env.continuous else []))
    if act.shape != shape:
        raise ValueError(f"actions must have shape {shape}, got {tuple(act.shape)}")


def check_env(env) -> None:
    """Play a random episode in each environment; ValueError names the first of the rules above that `env` breaks."""

    def must(hold: bool, rule: str) -> None:
        if not hold:
            raise ValueError(f"{type(env).__name__}, step {env.t}: {rule}")

    shape, generator = (env.num_envs, env.num_agents), torch.Generator().manual_seed(0)
    sizes = {"observations": (*shape, env.obs_dim), "team_reward": shape[:1], "terminated": shape[:1]}

    def check_tensors(**tensors: torch.Tensor) -> None:
        for name, values in tensors.items():
            must(isinstance(values, torch.Tensor), f"{name} must be a tensor, is a {type(values).__name__}")
            kind = torch.bool if name == "terminated" else torch.float32
            found = f"are {tuple(values.shape)} {values.dtype}"
            must(values.shape == sizes[name] and values.dtype == kind, f"{name} must be {sizes[name]} {kind}, {found}")
            must(values.isfinite().all(), f"{name} must be finite")
            kept = name != "observations" or values.half().isfinite().all()
            must(kept, "observations must be within 65,504, as replay buffers hold half precision")

    start = obs = env.reset(seed=1)
    check_tensors(observations=obs, terminated=env.terminated)
    must(torch.equal(env.observe(), obs), "observe() must be of the current state")
    reward = terminated = torch.zeros(0)
    for t in range(env.horizon):
        act = torch.rand(*shape, env.num_actions, generator=generator)
        if getattr(env, "masked", False):
            mask = obs[..., -env.num_actions :].cpu()
            must(((mask == 0) | (mask == 1)).all(), "the mask at the end of observations must be 0 or 1")
            must(env.continuous or mask.any(dim=-1).all(), "the mask must allow each agent an action")
            act = act * mask
        act = (act if env.continuous else act.argmax(dim=-1)).to(obs.device)
        over, last = env.terminated.clone(), (obs, reward, terminated)
        kept = [values.clone() for values in last]
        obs, reward, terminated = env.step(act)
        check_tensors(observations=obs, team_reward=reward, terminated=terminated)
        must(all(map(torch.equal, last, kept)), "what step returns must be new tensors, which no later step changes")
        still = torch.equal(obs[over], kept[0][over]) and not reward[over].any() and terminated[over].all()
        must(still, "an episode that has terminated must stay as it is, earn 0 and remain terminated")
        current = env.t == t + 1 and torch.equal(env.terminated, terminated) and torch.equal(env.observe(), obs)
        must(current, "t, terminated and observe() must be of the current state")
    for wrong, error, rule in ((act, RuntimeError, "at the horizon"), (act[:-1], ValueError, "on another shape")):
        try:
            env.step(wrong)
        except error:
            env.reset()
        else:
            must(False, f"step must raise {error.__name__} {rule}")
    must(torch.equal(env.reset(seed=1), start), "reset must start the same episodes from the same seed")
    must(env.t == 0 and not env.terminated.any(), "reset must set t and terminated back")
