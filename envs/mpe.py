"""Multi-agent particle environments (MPE), many episodes at once in torch, equal to the package mpe2 step for step.

`SimpleSpread` and `SimpleTag` are mpe2 1.1.1's simple_spread_v3 and simple_tag_v3 (https://github.com/Farama-Foundation/MPE2);
`CooperativePush` has the dynamics of mpe2's world and a scenario of our own, because mpe2 has none of the kind. `make`
builds one of them by name; `make_pettingzoo` the same game on mpe2 itself, which only `envs/mpe_pettingzoo.py` imports.

Axes: episode E, agent N, landmark L, prey P, body B (whatever moves or collides; the first K move), 2 coordinates.
The dynamics (of mpe2's core.py): a step lasts 0.1; positions move with the old velocity; velocities lose a quarter and
gain force per mass; then speed limits bind. Bodies in contact repel each other softly.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F

from envs import check_action

HORIZON = 25
DT, DAMPING, CONTACT_FORCE, CONTACT_MARGIN = 0.1, 0.25, 100.0, 1e-3
MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]  # action 0 none, 1 left, 2 right, 3 down, 4 up


class Physics:
    """One time step of B bodies, of which the first K move; all of them collide with each other.

    Args:
        size: radii of all B bodies. mass, max_speed: of the K moving ones (inf: no limit).
    """

    def __init__(self, size: list[float], mass: list[float], max_speed: list[float], device, dtype):
        self.num_moving = len(mass)
        # Column p of `incidence` has +1 at the first and -1 at the second body of pair p: multiplying with it gives
        # the offsets of all pairs, multiplying with its transpose adds up the forces on every body.
        pairs = [(a, b) for a, b in combinations(range(len(size)), 2) if a < self.num_moving]
        self.incidence = torch.zeros(len(size), len(pairs), device=device, dtype=dtype)
        for p, (a, b) in enumerate(pairs):
            self.incidence[a, p], self.incidence[b, p] = 1, -1
        self.contact = torch.tensor([size[a] + size[b] for a, b in pairs], device=device, dtype=dtype)  # (pairs,)
        self.mass = torch.tensor(mass, device=device, dtype=dtype).unsqueeze(1)  # (K, 1)
        self.max_speed = torch.tensor(max_speed, device=device, dtype=dtype)
        self.limited = bool(self.max_speed.isfinite().any())

    def contact_forces(self, pos: torch.Tensor) -> torch.Tensor:
        """Soft repulsion between bodies: pos (E, B, 2) -> force (E, K, 2)."""
        offset = pos.transpose(1, 2) @ self.incidence  # (E, 2, pairs)
        # Bodies at exactly the same place have no direction to part in (mpe2 divides by 0).
        distance = offset.square().sum(dim=1).sqrt().clamp(min=1e-12)  # (E, pairs)
        penetration = F.softplus(self.contact - distance, beta=1 / CONTACT_MARGIN, threshold=40)
        force = (CONTACT_FORCE * penetration / distance).unsqueeze(1) * offset  # (E, 2, pairs)
        return (force @ self.incidence[: self.num_moving].T).transpose(1, 2)

    def step(self, pos: torch.Tensor, vel: torch.Tensor, force: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pos (E, B, 2); vel and force, of what drives the bodies, (E, K, 2) -> new pos and vel (E, K, 2)"""
        force = force + self.contact_forces(pos)
        pos = pos[:, : self.num_moving] + DT * vel
        vel = (1 - DAMPING) * vel + DT * force / self.mass
        if self.limited:
            speed = vel.square().sum(dim=2).sqrt()  # (E, K)
            vel = torch.where((speed > self.max_speed).unsqueeze(2), vel * (self.max_speed / speed).unsqueeze(2), vel)
        return pos, vel


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances of all pairs: (E, I, 2), (E, J, 2) -> (E, I, J)"""
    dx, dy = ((a[:, :, c].unsqueeze(2) - b[:, :, c].unsqueeze(1)).square() for c in range(2))
    return (dx + dy).sqrt()


def nearest(offsets: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The k shortest of offsets (E, N, J, 2), shortest first, zeros where there are fewer: (E, N, k, 2), and which."""
    if k is None:
        return offsets, None
    distance = offsets.square().sum(dim=3)
    order = distance.topk(min(k, offsets.shape[2]), largest=False).indices  # (E, N, up to k)
    chosen = offsets.gather(2, order.unsqueeze(3).expand(-1, -1, -1, 2))
    return F.pad(chosen, (0, 0, 0, k - order.shape[2])), order


class ParticleEnv:
    """What the three scenarios share; see `envs/__init__.py` for the protocol.

    Args:
        num_envs: E. num_agents: N, the learning agents.
        dtype: of the state, the observations and the rewards.
        continuous_actions: False: actions 0..4 are none, left, right, down, up. True: the strengths of the five, in
            [0, 1]; what lies outside is clipped.
        num_agent_neighbors: how many other agents an agent sees, nearest first (None: all, in order).
        num_landmark_neighbors: the same for landmarks.
        horizon: steps of an episode, T (None: 25, as in mpe2; 50 in push).
    State: agent_pos, agent_vel (E, N, 2), landmark_pos (E, L, 2); further bodies as the scenario says.

    A scenario adds `build`, which sets `physics`, `reset_state`, `advance(force)` with what drives the agents
    (E, N, 2), `observe`, `team_reward` (E,) and `touching` (E, N): how many bodies that matter each agent touches.
    """

    num_actions = len(MOVES)
    event_names = {1: "o"}  # marks in pictures of the credits
    accel = 5.0  # force of an action
    usual_horizon = HORIZON

    def __init__(
        self,
        num_envs: int,
        num_agents: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        continuous_actions: bool = False,
        num_agent_neighbors: int | None = None,
        num_landmark_neighbors: int | None = None,
        horizon: int | None = None,
    ):
        self.num_envs, self.num_agents, self.continuous = num_envs, num_agents, continuous_actions
        self.horizon = horizon or self.usual_horizon
        self.num_agent_neighbors, self.num_landmark_neighbors = num_agent_neighbors, num_landmark_neighbors
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device)
        self.moves = torch.tensor(MOVES, device=self.device, dtype=dtype)
        self.others_index: torch.Tensor | None = None
        self.build()
        self.reset()
        self.obs_dim = self.observe().shape[2]

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all episodes anew. Returns obs (E, N, obs_dim)."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.t = 0
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # never, before the horizon
        self.agent_pos, self.agent_vel = self.uniform(self.num_agents, 1.0), self.still(self.num_agents)
        self.reset_state()
        return self.observe()

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """act (E, N) int64, or (E, N, 5) if continuous -> obs (E, N, obs_dim), team_reward (E,), terminated (E,).

        Raises RuntimeError at the horizon, and ValueError for actions of another shape.
        """
        check_action(self, act)
        self.t += 1
        if self.continuous:
            direction = (act.clamp(0, 1) @ self.moves.to(act.dtype)).to(self.dtype)  # (E, N, 2)
        else:
            direction = self.moves[act]
        self.advance(self.accel * direction)
        return self.observe(), self.team_reward(), self.terminated.clone()

    def oracles(self) -> dict[str, torch.Tensor]:
        """What learners must not see, of the current state: event (E, N) int64, by `event_names`."""
        return {"event": (self.touching() > 0).long()}

    def uniform(self, count: int, limit: float) -> torch.Tensor:
        """Points drawn uniformly from [-limit, limit]^2: (E, count, 2)"""
        shape = (self.num_envs, count, 2)
        return limit * (2 * torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype) - 1)

    def still(self, count: int) -> torch.Tensor:
        """Velocities of bodies at rest: (E, count, 2)"""
        return torch.zeros(self.num_envs, count, 2, device=self.device, dtype=self.dtype)

    def others(self, values: torch.Tensor) -> torch.Tensor:
        """For every agent the values of all but itself, in order: (E, J, 2) with J >= N -> (E, N, J - 1, 2)"""
        J = values.shape[1]
        if self.others_index is None:  # the same at every call
            index = [[j for j in range(J) if j != i] for i in range(self.num_agents)]
            self.others_index = torch.tensor(index, dtype=torch.int64, device=self.device).view(self.num_agents, J - 1)
        return values[:, self.others_index]


class SimpleSpread(ParticleEnv):
    """Cooperative navigation: N agents cover N landmarks and avoid each other; mpe2's simple_spread_v3.

    Team reward of a step: half of minus the sum over landmarks of the distance to the nearest agent, minus 1 / N for
    every pair of agents that touch (mpe2's local_ratio is 0.5).
    Observation: own velocity, own position, offsets to the landmarks, offsets to the other agents, two zeros for every
    other agent (mpe2's communication, unused here).
    """

    local_ratio = 0.5
    size = 0.15
    legend = "o: touches another agent"
    far = 2 * math.sqrt(2)  # distance of every landmark when no agent counts: the diagonal of the arena

    def build(self) -> None:
        N = self.num_agents
        self.physics = Physics([self.size] * N, [1.0] * N, [math.inf] * N, self.device, self.dtype)

    def reset_state(self) -> None:
        self.landmark_pos = self.uniform(self.num_agents, 1.0)

    def advance(self, force: torch.Tensor) -> None:
        self.agent_pos, self.agent_vel = self.physics.step(self.agent_pos, self.agent_vel, force)

    def observe(self) -> torch.Tensor:
        pos = self.agent_pos.unsqueeze(2)
        landmarks, _ = nearest(self.landmark_pos.unsqueeze(1) - pos, self.num_landmark_neighbors)
        others, _ = nearest(self.others(self.agent_pos) - pos, self.num_agent_neighbors)
        landmarks, others = landmarks.flatten(2), others.flatten(2)
        return torch.cat((self.agent_vel, self.agent_pos, landmarks, others, torch.zeros_like(others)), dim=2)

    def touching(self) -> torch.Tensor:
        """How many other agents every agent touches, (E, N)."""
        return (distances(self.agent_pos, self.agent_pos) < 2 * self.size).sum(dim=2).to(self.dtype) - 1  # not itself

    def team_reward(self) -> torch.Tensor:
        coverage = -distances(self.agent_pos, self.landmark_pos).amin(dim=1).sum(dim=1)
        return (1 - self.local_ratio) * coverage - self.local_ratio * self.touching().mean(dim=1)

    def oracles(self) -> dict[str, torch.Tensor]:
        """Also the credits shapley and difference, (E, N)."""
        return super().oracles() | {"shapley": self.shapley_reward(), "difference": self.difference_reward()}

    def shapley_reward(self) -> torch.Tensor:
        """Exact Shapley value of the team reward in the current state, (E, N); sums to v(all) - v(none).

        v(C) is the team reward if only the agents of C counted: (1 - local_ratio) times minus the sum over landmarks
        of the distance to the nearest agent of C (the arena's diagonal if C is empty), minus 2 local_ratio / N for
        every touching pair inside C. For one landmark, the diagonal minus the distances make an airport game: the k-th
        smallest increment is shared equally by the N - k + 1 agents that reach it (Littlechild and Owen, 1973). A
        touching pair shares its cost equally.
        """
        N = self.num_agents
        gain, order = (self.far - distances(self.landmark_pos, self.agent_pos)).sort(dim=2)  # (E, L, N), farthest first
        increment = torch.diff(gain, dim=2, prepend=torch.zeros_like(gain[:, :, :1]))
        sharers = torch.arange(N, 0, -1, device=self.device)
        up_to = torch.ones(N, N, device=self.device, dtype=self.dtype).triu()  # a cumulative sum, deterministic on CUDA
        share = torch.zeros_like(gain).scatter_(2, order, increment / sharers @ up_to)
        return (1 - self.local_ratio) * share.sum(dim=1) - self.local_ratio / N * self.touching()

    def difference_reward(self) -> torch.Tensor:
        """v(all) - v(all but i) in the current state, (E, N); v as in `shapley_reward`."""
        if self.num_agents == 1:
            return self.shapley_reward()  # both are v(all) - v(none)
        distance = distances(self.landmark_pos, self.agent_pos)  # (E, L, N)
        two, who = distance.topk(2, largest=False)
        loss = (two[:, :, 1] - two[:, :, 0]).unsqueeze(2) * F.one_hot(who[:, :, 0], self.num_agents)  # (E, L, N)
        touching_cost = 2 * self.local_ratio / self.num_agents * self.touching()
        return (1 - self.local_ratio) * loss.sum(dim=1) - touching_cost


class SimpleTag(ParticleEnv):
    """Predator-prey: N slow predators learn to touch faster prey among obstacles; mpe2's simple_tag_v3.

    Team reward of a step: 10 for every predator and prey that touch.
    Observation: own velocity, own position, offsets to the obstacles, offsets to the other predators and the prey, the
    prey's velocities (with num_agent_neighbors: one velocity for each body seen, zeros for predators).

    Args:
        num_prey: P, default N // 3 and at least 1. The prey follow `prey_policy`.
        num_obstacles: L, default 2 up to 3 agents, 3 up to 6, then 5.
    State: also prey_pos, prey_vel (E, P, 2). The obstacles are the landmarks.
    """

    accel, max_speed, size = 3.0, 1.0, 0.075
    legend = "o: touches prey"
    prey_accel, prey_max_speed, prey_size = 4.0, 1.3, 0.05
    obstacle_size = 0.2

    def __init__(self, num_envs: int, num_agents: int, *args, num_prey=None, num_obstacles=None, **options):
        self.num_prey, self.num_obstacles = num_prey or max(1, num_agents // 3), num_obstacles
        if num_obstacles is None:
            self.num_obstacles = 2 if num_agents <= 3 else 3 if num_agents <= 6 else 5
        super().__init__(num_envs, num_agents, *args, **options)

    def build(self) -> None:
        N, P, L = self.num_agents, self.num_prey, self.num_obstacles
        size = [self.size] * N + [self.prey_size] * P + [self.obstacle_size] * L
        max_speed = [self.max_speed] * N + [self.prey_max_speed] * P
        self.physics = Physics(size, [1.0] * (N + P), max_speed, self.device, self.dtype)

    def reset_state(self) -> None:
        self.prey_pos, self.prey_vel = self.uniform(self.num_prey, 1.0), self.still(self.num_prey)
        self.landmark_pos = self.uniform(self.num_obstacles, 0.9)

    def advance(self, force: torch.Tensor) -> None:
        force = torch.cat((force, self.prey_accel * self.moves[self.prey_policy()]), dim=1)
        pos = torch.cat((self.agent_pos, self.prey_pos, self.landmark_pos), dim=1)
        vel = torch.cat((self.agent_vel, self.prey_vel), dim=1)
        split = [self.num_agents, self.num_prey]
        pos, vel = self.physics.step(pos, vel, force)
        (self.agent_pos, self.prey_pos), (self.agent_vel, self.prey_vel) = pos.split(split, 1), vel.split(split, 1)

    def prey_policy(self) -> torch.Tensor:
        """The prey's moves in the current state, (E, P) int64: a fixed script that sees the true state.

        Each prey imagines holding one of the five moves for two steps and takes the one after which it is in the least
        danger: the sum, over the predators within 0.2 of that place, of 1 / (distance^2 + 0.01) less its value at 0.2;
        plus 100 times the depth inside obstacles, plus 1000 times the depth beyond 0.9 from the centre along an axis.
        Where nothing threatens, it does nothing.
        """
        pos, vel = self.prey_pos.unsqueeze(2), self.prey_vel.unsqueeze(2)  # (E, P, 1, 2)
        for _ in range(2):  # (E, P, 5, 2)
            pos = pos + DT * vel
            vel = (1 - DAMPING) * vel + DT * self.prey_accel * self.moves
        E, P = self.num_envs, self.num_prey
        pos = pos.reshape(E, P * len(MOVES), 2)
        danger = (1 / (distances(pos, self.agent_pos).square() + 0.01) - 1 / (0.2**2 + 0.01)).clamp(min=0).sum(dim=2)
        inside = (self.obstacle_size + self.prey_size - distances(pos, self.landmark_pos)).clamp(min=0).sum(dim=2)
        outside = (pos.abs() - 0.9).clamp(min=0).sum(dim=2)
        return (danger + 100 * inside + 1000 * outside).view(E, P, len(MOVES)).argmin(dim=2)

    def observe(self) -> torch.Tensor:
        E, N, P = self.num_envs, self.num_agents, self.num_prey
        pos = self.agent_pos.unsqueeze(2)
        landmarks, _ = nearest(self.landmark_pos.unsqueeze(1) - pos, self.num_landmark_neighbors)
        others = self.others(torch.cat((self.agent_pos, self.prey_pos), dim=1)) - pos
        others, order = nearest(others, self.num_agent_neighbors)
        if order is None:
            vel = self.prey_vel.unsqueeze(1).expand(E, N, P, 2)
        else:
            vel = torch.cat((self.still(N - 1), self.prey_vel), dim=1).unsqueeze(1).expand(E, N, -1, 2)
            vel = vel.gather(2, order.unsqueeze(3).expand(-1, -1, -1, 2))
            vel = F.pad(vel, (0, 0, 0, others.shape[2] - order.shape[2]))
        parts = (self.agent_vel, self.agent_pos, landmarks.flatten(2), others.flatten(2), vel.flatten(2))
        return torch.cat(parts, dim=2)

    def touching(self) -> torch.Tensor:
        """How many prey every predator touches, (E, N)."""
        return self.contacts().sum(dim=2).to(self.dtype)

    def contacts(self) -> torch.Tensor:
        """Which predator touches which prey, (E, N, P) bool."""
        return distances(self.agent_pos, self.prey_pos) < self.size + self.prey_size

    def team_reward(self) -> torch.Tensor:
        return 10 * self.touching().sum(dim=1)


class CooperativePush(ParticleEnv):
    """Cooperative push: N agents push a heavy ball onto a target. Not in mpe2; `PushScenario` is the same game on it.

    Team reward of a step: -2 |ball - target| - min_i |agent_i - ball|.
    Observation: own velocity, own position, offsets to the ball and the target, offsets to the other agents.
    State: also ball_pos, ball_vel (E, 1, 2). The target is the landmark.
    """

    size, ball_size, target_size, ball_mass = 0.06, 0.1, 0.05, 2.0
    legend = "o: touches the ball"
    usual_horizon = 50  # in 25 steps there is hardly time to walk around the ball and bring it home
    reach, least_distance = 0.8, 0.8  # ball and target start in [-reach, reach]^2, at least this far apart

    def build(self) -> None:
        N = self.num_agents
        size, mass = [self.size] * N + [self.ball_size], [1.0] * N + [self.ball_mass]
        self.physics = Physics(size, mass, [math.inf] * (N + 1), self.device, self.dtype)

    def reset_state(self) -> None:
        points = self.uniform(2, self.reach)
        while (close := (points[:, 0] - points[:, 1]).square().sum(dim=1).sqrt() < self.least_distance).any():
            points = torch.where(close.view(-1, 1, 1), self.uniform(2, self.reach), points)
        self.ball_pos, self.landmark_pos = points[:, :1], points[:, 1:]
        self.ball_vel = self.still(1)

    def advance(self, force: torch.Tensor) -> None:
        pos = torch.cat((self.agent_pos, self.ball_pos), dim=1)
        vel = torch.cat((self.agent_vel, self.ball_vel), dim=1)
        pos, vel = self.physics.step(pos, vel, F.pad(force, (0, 0, 0, 1)))  # nothing drives the ball
        split = [self.num_agents, 1]
        (self.agent_pos, self.ball_pos), (self.agent_vel, self.ball_vel) = pos.split(split, 1), vel.split(split, 1)

    def observe(self) -> torch.Tensor:
        pos = self.agent_pos.unsqueeze(2)
        others, _ = nearest(self.others(self.agent_pos) - pos, self.num_agent_neighbors)
        parts = (self.agent_vel, self.agent_pos, self.ball_pos - self.agent_pos, self.landmark_pos - self.agent_pos)
        return torch.cat((*parts, others.flatten(2)), dim=2)

    def touching(self) -> torch.Tensor:
        """Whether every agent touches the ball, 1 or 0, (E, N)."""
        contact = distances(self.agent_pos, self.ball_pos)[:, :, 0] < self.size + self.ball_size
        return contact.to(self.dtype)

    def team_reward(self) -> torch.Tensor:
        to_ball = distances(self.agent_pos, self.ball_pos)[:, :, 0].amin(dim=1)
        to_target = distances(self.ball_pos, self.landmark_pos)[:, 0, 0]
        return -2 * to_target - to_ball


SCENARIOS = {"spread": SimpleSpread, "tag": SimpleTag, "push": CooperativePush}


def make(
    scenario: str,
    num_envs: int,
    num_agents: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    continuous_actions: bool = False,
    num_agent_neighbors: int | None = None,
    num_landmark_neighbors: int | None = None,
    num_prey: int | None = None,
    num_obstacles: int | None = None,
    max_cycles: int | None = None,
    nearest_first: bool = False,
) -> ParticleEnv:
    """A batched environment by name: "spread", "tag" or "push". Only tag has num_prey and num_obstacles.

    None means the default: agents see everything, by name, but for the 5 nearest agents and 6 nearest landmarks in
    spread with 15 agents, the paper's setting; prey and obstacles as `SimpleTag` says. `max_cycles` is the horizon
    (25; 50 in push). With `nearest_first` agents see everything by distance in spread.
    Raises:
        ValueError: for an unknown scenario, or an option the scenario does not have or cannot take.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario {scenario}: must be one of {', '.join(SCENARIOS)}")
    if nearest_first and scenario == "spread" and num_agents != 15:
        num_agent_neighbors = max(1, num_agents - 1) if num_agent_neighbors is None else num_agent_neighbors
        num_landmark_neighbors = num_agents if num_landmark_neighbors is None else num_landmark_neighbors
    if (scenario, num_agents) == ("spread", 15):
        num_agent_neighbors = 5 if num_agent_neighbors is None else num_agent_neighbors
        num_landmark_neighbors = 6 if num_landmark_neighbors is None else num_landmark_neighbors
    sizes = {"num_envs": num_envs, "num_agents": num_agents}
    options = {"num_agent_neighbors": num_agent_neighbors, "num_landmark_neighbors": num_landmark_neighbors}
    options |= {"num_prey": num_prey, "num_obstacles": num_obstacles, "max_cycles": max_cycles}
    options = {name: value for name, value in options.items() if value is not None}
    absent = {"spread": ("num_prey", "num_obstacles"), "push": ("num_prey", "num_obstacles", "num_landmark_neighbors")}
    for name, value in (sizes | options).items():
        flag = "--" + name.replace("_", "-")
        if name in absent.get(scenario, ()):
            raise ValueError(f"{flag} {value}: must be left out with scenario {scenario}")
        if value < (name != "num_obstacles"):
            raise ValueError(f"{flag} {value}: must be at least {int(name != 'num_obstacles')}")
    options["horizon"] = options.pop("max_cycles", None)
    return SCENARIOS[scenario](num_envs, num_agents, device, dtype, continuous_actions, **options)


def make_pettingzoo(*args, **options):
    """The game of `make` on mpe2 itself, a PettingZoo ParallelEnv; see `envs.mpe_pettingzoo.make_pettingzoo`."""
    from envs.mpe_pettingzoo import make_pettingzoo  # only here, as learning needs no mpe2

    return make_pettingzoo(*args, **options)
