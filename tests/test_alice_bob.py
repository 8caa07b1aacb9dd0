"""The gridworld, rule by rule, against hand-walked episodes and a plain Python version; and its PettingZoo form."""

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test, parallel_seed_test, render_test
from pettingzoo.utils import parallel_to_aec

from envs.alice_bob import HORIZON, AliceBob, parallel_env

RIGHT, LEFT, UP, DOWN = range(4)
LETTERS = {"R": RIGHT, "L": LEFT, "U": UP, "D": DOWN}

# Bob takes key 0 at (3,5) in step 4, in which Alice bumps into her still closed door. She walks through it to key 1 at
# (5,1), in step 7, while Bob returns to the cell above his door; he needs five more steps to the treasure.
SHORTEST = ("DDRDDDLRLRLR", "DDLLRUDDDDDR")


def walk(env: AliceBob, alice: str, bob: str) -> list[tuple]:
    """Reset and step through two strings of moves; (obs, reward, terminated) of episode 0 at every step."""
    env.reset()
    steps = []
    for a, b in zip(alice, bob, strict=True):
        obs, reward, terminated = env.step(torch.tensor([[LETTERS[a], LETTERS[b]]]).repeat(env.num_envs, 1))
        steps.append((obs[0], reward[0].item(), terminated[0].item()))
    return steps


def place(env: AliceBob, alice: tuple, bob: tuple, key_used=(False, False)) -> torch.Tensor:
    env.reset()
    env.agent_pos[:] = torch.tensor([alice, bob])
    env.key_used[:] = torch.tensor(key_used)
    return env.observe()


class PlainAliceBob:
    """The same game, once more, for one episode, written from the rules with nothing but loops and ifs."""

    def __init__(self):
        self.alice, self.bob, self.used, self.events, self.over = (1, 1), (1, 7), [False, False], [0, 0], False

    def wall(self, cell):
        row, col = cell
        if cell == (4, 2):
            return not self.used[0]
        if cell == (4, 6):
            return not self.used[1]
        return row in (0, 8) or col in (0, 8) or (col == 4 and 1 <= row <= 4) or (row == 4 and 1 <= col <= 7)

    def room(self, cell):
        return cell[0] in (1, 2, 3) and cell[1] in (1, 2, 3, 5, 6, 7)

    def step(self, actions):
        if self.over:
            return 0.0
        reward, self.events, moved = 0.0, [0, 0], []
        for i, (cell, action) in enumerate(zip((self.alice, self.bob), actions)):
            row, col = cell
            row, col = [(row, col + 1), (row, col - 1), (row - 1, col), (row + 1, col)][action]
            if self.wall((row, col)):
                reward -= 0.1
                self.events[i] = -1
                row, col = cell
            moved.append((row, col))
        self.alice, self.bob = moved
        for key, cell in enumerate([(3, 5), (5, 1)]):
            if cell in moved and not self.used[key]:
                self.used[key] = True
                for i in range(2):
                    if moved[i] == cell:
                        self.events[i] = 2 + key
        if (7, 7) in moved and not self.room(self.alice) and not self.room(self.bob):
            reward += 100
            self.over = True
            for i in range(2):
                if moved[i] == (7, 7):
                    self.events[i] = 7
        return reward

    def observe(self):
        rows = []
        for i in range(2):
            own, other = (self.alice, self.bob) if i == 0 else (self.bob, self.alice)
            window = []
            for row in range(own[0] - 1, own[0] + 2):
                for col in range(own[1] - 1, own[1] + 2):
                    if (row, col) == own:
                        code = 5 + i
                    elif (row, col) == other:
                        code = 6 - i
                    elif (row, col) == (3, 5) and not self.used[0]:
                        code = 2
                    elif (row, col) == (5, 1) and not self.used[1]:
                        code = 3
                    elif (row, col) == (7, 7):
                        code = 7
                    else:
                        code = 1 if self.wall((row, col)) else 0
                    window.append(code)
            keys = []
            for key, cell in enumerate([(3, 5), (5, 1)]):
                keys += [0, 0] if self.used[key] else [own[0] - cell[0], own[1] - cell[1]]
            rows.append([*window, *own, own[0] - other[0], own[1] - other[1], *keys, self.room(own), self.events[i]])
        return torch.tensor(rows, dtype=torch.float32)


def test_start():
    env = AliceBob(3)
    obs = env.reset(seed=1)
    assert obs.shape == (3, 2, 19) and obs.dtype == torch.float32
    assert (env.num_envs, env.num_agents, env.obs_dim, env.num_actions, env.continuous) == (3, 2, 19, 4, False)
    assert (env.horizon, env.t) == (40, 0)
    assert env.agent_pos.tolist() == [[[1, 1], [1, 7]]] * 3 and env.agent_pos.dtype == torch.int64
    assert not env.key_used.any() and not env.terminated.any()
    assert obs[0, 0].tolist() == [1, 1, 1, 1, 5, 0, 1, 0, 0, 1, 1, 0, -6, -2, -4, -4, 0, 1, 0]
    assert obs[0, 1].tolist() == [1, 1, 1, 0, 6, 1, 0, 0, 1, 1, 7, 0, 6, -2, 2, -4, 6, 1, 0]


def test_actions_move_as_documented():
    env = AliceBob(1)
    for action, offset in enumerate([(0, 1), (0, -1), (-1, 0), (1, 0)]):
        place(env, (6, 3), (2, 6))
        _, reward, _ = env.step(torch.tensor([[action, action]]))
        assert env.agent_pos[0].tolist() == [[6 + offset[0], 3 + offset[1]], [2 + offset[0], 6 + offset[1]]]
        assert reward.item() == 0


@pytest.mark.parametrize(
    "cell, action", [((1, 1), UP), ((1, 1), LEFT), ((1, 3), RIGHT), ((3, 1), DOWN), ((7, 7), DOWN)]
)
def test_a_bump_costs_a_tenth_and_leaves_the_agent_in_place(cell, action):
    env = AliceBob(1)
    place(env, cell, (2, 6))
    obs, reward, _ = env.step(torch.tensor([[action, LEFT]]))
    assert env.agent_pos[0, 0].tolist() == list(cell)
    assert reward.item() == pytest.approx(-0.1)
    assert obs[0, :, 18].tolist() == [-1, 0]


def test_two_bumps_cost_two_tenths():
    env = AliceBob(1)
    obs, reward, _ = env.step(torch.tensor([[UP, UP]]))
    assert reward.item() == pytest.approx(-0.2) and obs[0, :, 18].tolist() == [-1, -1]


@pytest.mark.parametrize("key, key_cell, door, above", [(0, (3, 5), (4, 2), (3, 2)), (1, (5, 1), (4, 6), (3, 6))])
def test_a_key_opens_its_door_from_the_next_step_on(key, key_cell, door, above):
    env = AliceBob(1)
    # One agent picks the key up in the very step in which the other tries the door: still a bump.
    place(env, above, (key_cell[0], key_cell[1] + 1))
    obs, reward, _ = env.step(torch.tensor([[DOWN, LEFT]]))
    assert env.agent_pos[0].tolist() == [list(above), list(key_cell)]
    assert reward.item() == pytest.approx(-0.1)
    assert env.key_used[0].tolist() == [key == 0, key == 1]
    assert obs[0, :, 18].tolist() == [-1, 2 + key]
    assert obs[0, 0, 7] == 0  # the door below now looks free
    assert obs[0, :, 13 + 2 * key : 15 + 2 * key].eq(0).all()  # offsets to a used key are zeros
    _, reward, _ = env.step(torch.tensor([[DOWN, RIGHT]]))
    assert env.agent_pos[0, 0].tolist() == list(door) and reward.item() == 0
    # A key works once: stepping on it again is no event.
    obs, reward, _ = env.step(torch.tensor([[UP, LEFT]]))
    assert env.agent_pos[0, 1].tolist() == list(key_cell) and obs[0, 1, 18] == 0 and reward.item() == 0


def test_the_other_door_stays_shut():
    env = AliceBob(1)
    place(env, (3, 2), (3, 6), (True, False))
    _, reward, _ = env.step(torch.tensor([[DOWN, DOWN]]))
    assert env.agent_pos[0].tolist() == [[4, 2], [3, 6]] and reward.item() == pytest.approx(-0.1)
    place(env, (3, 2), (3, 6), (False, True))
    _, reward, _ = env.step(torch.tensor([[DOWN, DOWN]]))
    assert env.agent_pos[0].tolist() == [[3, 2], [4, 6]] and reward.item() == pytest.approx(-0.1)


def test_both_on_one_key():
    env = AliceBob(1)
    place(env, (5, 2), (6, 1), (True, False))
    obs, _, _ = env.step(torch.tensor([[LEFT, UP]]))
    assert env.key_used[0].tolist() == [True, True] and obs[0, :, 18].tolist() == [3, 3]


@pytest.mark.parametrize("finder", [0, 1])
@pytest.mark.parametrize(
    "where, pays", [((2, 2), False), ((1, 5), False), ((4, 2), True), ((4, 6), True), ((6, 1), True)]
)
def test_the_treasure_pays_whoever_finds_it_unless_someone_is_in_a_room(finder, where, pays):
    env = AliceBob(1)
    cells = [where, where]
    cells[finder] = (7, 6)
    place(env, *cells, (True, True))
    # The other bumps or moves sideways within a room or at a door: never in or out of one.
    act = torch.tensor([[LEFT, LEFT]])
    act[0, finder] = RIGHT
    obs, reward, terminated = env.step(act)
    bump = 0.1 if where in ((1, 5), (4, 2), (4, 6), (6, 1)) else 0
    assert reward.item() == pytest.approx((100 if pays else 0) - bump)
    assert terminated.item() == pays
    assert obs[0, finder, 18] == (7 if pays else 0)


def test_both_on_the_treasure_and_on_one_cell():
    env = AliceBob(1)
    place(env, (7, 6), (6, 7), (True, True))
    obs, reward, terminated = env.step(torch.tensor([[RIGHT, DOWN]]))
    assert reward.item() == 100 and terminated.item()  # once, not once each
    assert obs[0, :, 18].tolist() == [7, 7]
    assert obs[0, :, 4].tolist() == [5, 6]  # on a shared cell each sees itself
    assert obs[0, :, 11:13].eq(0).all()


def test_each_sees_the_other_and_an_agent_hides_an_item():
    env = AliceBob(1)
    obs = place(env, (6, 6), (7, 7), (True, True))
    assert obs[0, 0, 8] == 6 and obs[0, 1, 0] == 5 and obs[0, 1, 4] == 6
    obs = place(env, (6, 6), (5, 5), (True, True))
    assert obs[0, 0, 8] == 7
    obs = place(env, (6, 6), (6, 4), (True, True))  # two columns away: out of the window
    assert not (obs[0, 0, :9] == 6).any() and not (obs[0, 1, :9] == 5).any()


def test_shortest_success_takes_12_steps_with_one_bump():
    steps = walk(AliceBob(1), *SHORTEST)
    assert [terminated for *_, terminated in steps] == [False] * 11 + [True]
    rewards = [reward for _, reward, _ in steps]
    assert sum(rewards) == pytest.approx(99.9, abs=1e-5) and rewards[-1] == 100
    assert sum(reward < 0 for reward in rewards) == 1


def test_no_success_is_shorter_than_12_steps_and_none_without_a_bump_than_14():
    """Breadth-first search over the joint states of the plain version."""
    for bumps_allowed, shortest in ((True, 12), (False, 14)):
        frontier, seen, depth = {((1, 1), (1, 7), False, False)}, set(), 0
        found = False
        while not found:
            depth += 1
            seen |= frontier
            reached = set()
            for alice, bob, *used in frontier:
                for a in range(4):
                    for b in range(4):
                        game = PlainAliceBob()
                        game.alice, game.bob, game.used = alice, bob, list(used)
                        reward = game.step((a, b))
                        if bumps_allowed or reward in (0.0, 100.0):
                            found |= game.over
                            reached.add((game.alice, game.bob, *game.used))
            frontier = reached - seen
        assert depth == shortest


def test_a_finished_episode_is_frozen_and_the_others_go_on():
    env = AliceBob(2)
    env.reset()
    for a, b in zip(*SHORTEST):
        obs, reward, terminated = env.step(torch.tensor([[LETTERS[a], LETTERS[b]], [UP, UP]]))
    assert terminated.tolist() == [True, False]
    position, last = env.agent_pos[0].clone(), obs[0].clone()
    returned = terminated
    obs, reward, terminated = env.step(torch.tensor([[LEFT, UP], [RIGHT, UP]]))
    assert reward[0].item() == 0 and terminated.tolist() == [True, False]
    assert torch.equal(env.agent_pos[0], position) and torch.equal(obs[0], last)
    assert env.agent_pos[1].tolist() == [[1, 2], [1, 7]]
    assert returned.tolist() == [True, False]
    env.reset()
    assert not env.terminated.any() and env.agent_pos[0].tolist() == [[1, 1], [1, 7]]


def test_horizon_and_bad_arguments():
    env = AliceBob(1)
    for _ in range(HORIZON):
        env.step(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(1, 2, dtype=torch.int64))
    env.reset()
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_envs"):
        AliceBob(0)


def guided_actions(num_envs: int, generator: torch.Generator) -> torch.Tensor:
    """(T, E, 2): random joint actions; half of the episodes begin with a random part of the shortest success."""
    act = torch.randint(4, (HORIZON, num_envs, 2), generator=generator)
    script = torch.tensor([[LETTERS[a], LETTERS[b]] for a, b in zip(*SHORTEST)])
    for e in range(num_envs // 2):
        length = torch.randint(13, (1,), generator=generator).item()
        act[:length, e] = script[:length]
    return act


def test_random_play_equals_the_plain_version():
    num_envs = 300
    env, act = AliceBob(num_envs), guided_actions(num_envs, torch.Generator().manual_seed(0))
    games = [PlainAliceBob() for _ in range(num_envs)]
    assert torch.equal(env.reset(), torch.stack([game.observe() for game in games]))
    for t in range(HORIZON):
        obs, reward, terminated = env.step(act[t])
        expected = [game.step(act[t, e].tolist()) for e, game in enumerate(games)]
        assert torch.allclose(reward, torch.tensor(expected), atol=1e-5)
        assert terminated.tolist() == [game.over for game in games]
        assert torch.equal(obs, torch.stack([game.observe() for game in games]))
    assert 10 < sum(game.over for game in games) < num_envs  # both kinds of episode were there


def test_one_hot_observations_say_the_same():
    env, plain = AliceBob(64, one_hot=True), AliceBob(64)
    act = guided_actions(64, torch.Generator().manual_seed(1))
    for t in range(HORIZON):
        obs, expected = env.step(act[t])[0], plain.step(act[t])[0]
        assert obs.shape == (64, 2, env.obs_dim) and obs.abs().max() <= 1
        cells = obs[..., :72].view(64, 2, 9, 8)
        assert torch.equal(cells.argmax(-1), expected[..., :9].long()) and (cells.sum(-1) == 1).all()
        assert torch.equal(8 * obs[..., 72:], expected[..., 9:])


def test_pettingzoo_api_and_seed():
    parallel_seed_test(parallel_env)
    for one_hot in (False, True):
        env = parallel_env(one_hot=one_hot)
        parallel_api_test(env, num_cycles=200)
        seen = [env.reset()[0]]
        while env.agents:  # until the horizon, bumping into walls
            seen.append(env.step({"alice": 0, "bob": 2})[0])
        assert all(env.observation_space(agent).contains(obs) for step in seen for agent, obs in step.items())


def test_pettingzoo_render_in_every_mode():
    render_test(lambda render_mode=None: parallel_to_aec(parallel_env(render_mode)))
    with pytest.raises(ValueError, match="render_mode"):
        parallel_env("ascii")


def test_misuse_of_the_pettingzoo_environment():
    env = parallel_env()
    stay = {"alice": UP, "bob": UP}
    with pytest.raises(RuntimeError, match="reset"):
        env.step(stay)
    for actions in ({"alice": 0}, stay | {"carol": 0}, stay | {"bob": 4}, stay | {"bob": -1}, stay | {"bob": np.nan}):
        env.reset()
        with pytest.raises(ValueError, match="actions must be"):
            env.step(actions)
    env.reset()
    while env.agents:
        env.step(stay)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(stay)
    env.close()
    env.close()


def test_pettingzoo_is_the_batched_game():
    act = guided_actions(20, torch.Generator().manual_seed(2))
    ends = set()
    for e in range(20):
        single, wrapped = AliceBob(1), parallel_env()
        single.reset()
        wrapped.reset(seed=0)
        t = 0
        while wrapped.agents:
            obs, reward, terminated = single.step(act[t, e : e + 1])
            step = wrapped.step({"alice": act[t, e, 0].item(), "bob": act[t, e, 1].item()})
            assert np.array_equal(np.stack([step[0]["alice"], step[0]["bob"]]), obs[0].numpy())
            assert step[1] == {"alice": reward.item(), "bob": reward.item()}
            assert step[2]["alice"] == step[2]["bob"] == terminated.item()
            assert step[3]["alice"] == step[3]["bob"] == (t == HORIZON - 1 and not terminated.item())
            t += 1
        ends.add(terminated.item())
    assert ends == {True, False}


def test_the_picture_shows_the_state():
    env = parallel_env("rgb_array")
    env.reset()
    start = env.render()
    assert start.shape == (459, 459, 3) and start.dtype == np.uint8

    def cell(picture, row, col):
        return picture[51 * row : 51 * (row + 1), 51 * col : 51 * (col + 1)].astype(int)

    env.step({"alice": RIGHT, "bob": UP})
    moved = env.render()
    changed = {(r, c) for r in range(9) for c in range(9) if abs(cell(start, r, c) - cell(moved, r, c)).max() > 20}
    assert changed == {(1, 1), (1, 2)}
    env.env.key_used[:] = True
    opened = env.render()
    changed = {(r, c) for r in range(9) for c in range(9) if abs(cell(opened, r, c) - cell(moved, r, c)).max() > 20}
    assert changed == {(3, 5), (5, 1), (4, 2), (4, 6)}


def test_random_play_seldom_succeeds():
    """500,000 random episodes elsewhere: 0.09% successes, mean return -2.6."""
    env, generator = AliceBob(20_000), torch.Generator().manual_seed(3)
    total = 0
    for _ in range(HORIZON):
        total = total + env.step(torch.randint(4, (20_000, 2), generator=generator))[1]
    assert 0.0003 < env.terminated.float().mean() < 0.0015
    assert total.mean().item() == pytest.approx(-2.6, abs=0.1)
