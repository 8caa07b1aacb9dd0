"""Alice & Bob: two agents who can only find the treasure by freeing each other (STAS, arXiv 2304.07520).

Alice (A) starts in the left room, Bob (B) in the right one. Key 0 lies in Bob's room and opens Alice's door (a); key 1
lies outside and opens Bob's door (b). So Bob must free Alice, Alice must free Bob, and only then does the treasure ($)
pay.

`AliceBob` runs many episodes at once in torch; `parallel_env` is the same game as a PettingZoo ParallelEnv.
Positions are (row, column), counted from 0 at the top left.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from envs import check_action
from envs.single import SingleEnv

MAP = [
    "#########",
    "#A..#..B#",
    "#...#...#",
    "#...#0..#",
    "##a###b##",
    "#1......#",
    "#.......#",
    "#......$#",
    "#########",
]
SIZE = len(MAP)
HORIZON = 40
MOVES = [(0, 1), (0, -1), (-1, 0), (1, 0)]  # action 0 right, 1 left, 2 up, 3 down; there is no no-op
BUMP_COST = 0.1
TREASURE_REWARD = 100.0

# Cell codes in the 3 x 3 window of an observation. Code 4 does not occur.
FREE, WALL, KEY_0, KEY_1, ALICE, BOB, TREASURE_CODE = 0, 1, 2, 3, 5, 6, 7
# Codes of an agent's own event; picking up key k is PICK_UP + k.
NO_EVENT, BUMP, PICK_UP, PAID = 0, -1, 2, 7
# Where things stand in the 19 numbers of an observation; the window comes first.
OBS_DIM, CENTRE, OTHER, IN_ROOM, EVENT = 19, 4, slice(11, 13), 17, 18


def locate(symbol: str) -> tuple[int, int]:
    """(row, column) of the one cell of MAP that holds `symbol`."""
    return next((row, line.index(symbol)) for row, line in enumerate(MAP) if symbol in line)


STARTS = [locate("A"), locate("B")]
KEYS = [locate("0"), locate("1")]
DOORS = [locate("a"), locate("b")]  # key k opens DOORS[k]
TREASURE = locate("$")


def in_room(row: int, col: int) -> bool:
    """Whether a cell lies inside one of the two rooms; their door cells do not."""
    return 1 <= row <= 3 and (1 <= col <= 3 or 5 <= col <= 7)


def build_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Everything that depends only on which keys are used and where one agent stands, worked out once.

    Returns:
        next_cell (4, 81, 4) int64: by key state, cell and action, the cell an agent ends up in (its own after a bump).
        features (4, 81, 19) float32: by key state and cell, the observation without the other agent and the event.
    Key state is key_used[0] + 2 * key_used[1]; cell is 9 * row + column.
    """
    next_cell = torch.zeros(4, SIZE * SIZE, len(MOVES), dtype=torch.int64)
    features = torch.zeros(4, SIZE * SIZE, OBS_DIM)
    for key_state in range(4):
        key_used = [bool(key_state & 1), bool(key_state & 2)]
        codes = {(r, c): WALL if MAP[r][c] == "#" else FREE for r in range(SIZE) for c in range(SIZE)}
        codes[TREASURE] = TREASURE_CODE
        for k in range(2):
            codes[DOORS[k]] = FREE if key_used[k] else WALL
            codes[KEYS[k]] = FREE if key_used[k] else (KEY_0, KEY_1)[k]
        for row in range(1, SIZE - 1):
            for col in range(1, SIZE - 1):
                cell = SIZE * row + col
                for action, (d_row, d_col) in enumerate(MOVES):
                    blocked = codes[row + d_row, col + d_col] == WALL
                    next_cell[key_state, cell, action] = cell if blocked else cell + SIZE * d_row + d_col
                window = [codes[row + i, col + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
                offsets = [0 if key_used[k] else at - key for k in range(2) for at, key in zip((row, col), KEYS[k])]
                features[key_state, cell] = torch.tensor([*window, row, col, 0, 0, *offsets, in_room(row, col), 0])
    return next_cell, features


class AliceBob:
    """The gridworld for E episodes at once; see `envs/__init__.py` for the protocol.

    One step: both agents move (a wall or closed door leaves an agent in place and costs the team 0.1; agents do not
    block each other); any agent on an unused key uses it up and opens its door, from the next step on; then, if either
    agent stands on the treasure and neither is in a room, the team earns 100 and the episode ends. Horizon 40.

    Observation of an agent, 19 numbers: the 3 x 3 cells around it, row by row (0 free or open door, 1 wall or closed
    door, 2 key 0, 3 key 1, 5 Alice, 6 Bob, 7 treasure; an agent hides an item, and on a shared cell each sees itself);
    own row and column; own minus other position (2); own minus key position for each key, zeros once used (4); 1 if in
    a room; own event of this step (0 none, -1 bump, 2 or 3 pick-up of key 0 or 1, 7 on the treasure when it pays).
    With `one_hot` they are 82 for a network: each of the nine cells one-hot, and all other numbers divided by 8.

    State: agent_pos (E, 2, 2) int64 (row, column), key_used (E, 2) bool, event (E, 2) float32, terminated (E,) bool.
    """

    num_agents, num_actions, continuous, horizon = 2, len(MOVES), False, HORIZON
    event_names = {BUMP: "bump", PICK_UP: "key", PICK_UP + 1: "key", PAID: "$"}  # marks in pictures of the credits
    legend = "key: picks one up; $: the treasure; bump: runs into something"

    def __init__(self, num_envs: int, device: str | torch.device = "cpu", one_hot: bool = False):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs, self.device, self.one_hot = num_envs, torch.device(device), one_hot
        self.obs_dim = 9 * 8 + 10 if one_hot else OBS_DIM
        self.next_cell, self.features = (table.to(self.device) for table in build_tables())
        self.starts = torch.tensor(STARTS, device=self.device)
        self.keys = torch.tensor([SIZE * row + col for row, col in KEYS], device=self.device)
        self.treasure = SIZE * TREASURE[0] + TREASURE[1]
        self.reset()

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all episodes anew; the game draws nothing. Returns obs (E, 2, obs_dim)."""
        self.t = 0
        self.agent_pos = self.starts.repeat(self.num_envs, 1, 1)
        self.key_used = torch.zeros(self.num_envs, 2, dtype=torch.bool, device=self.device)
        self.event = torch.zeros(self.num_envs, 2, device=self.device)
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self.observe()

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance every running episode by one joint action.

        Args:
            act: (E, 2) int64 in 0..3, Alice's and Bob's move.
        Returns:
            obs (E, 2, obs_dim), team_reward (E,), terminated (E,).
        Raises:
            RuntimeError: at the horizon. ValueError: for actions of another shape.
        """
        check_action(self, act)
        self.t += 1
        running = ~self.terminated.unsqueeze(1)  # (E, 1)
        cell, key_state = self._cell(), self._key_state()
        moved = torch.where(running, self.next_cell[key_state, cell, act], cell)  # (E, 2)
        bump = (moved == cell) & running
        on_key = (moved.unsqueeze(2) == self.keys) & ~self.key_used.unsqueeze(1)  # (E, agent, key)
        on_key &= running.unsqueeze(2)
        self.key_used = self.key_used | on_key.any(dim=1)
        self.agent_pos = torch.stack((moved // SIZE, moved % SIZE), dim=2)
        on_treasure = moved == self.treasure
        outside = self.features[0, moved, IN_ROOM] == 0
        paid = on_treasure.any(dim=1) & outside.all(dim=1) & ~self.terminated  # (E,)

        event = torch.where(bump, float(BUMP), float(NO_EVENT))
        for k in range(2):
            event[on_key[:, :, k]] = float(PICK_UP + k)
        event[on_treasure & paid.unsqueeze(1)] = float(PAID)
        self.event = torch.where(running, event, self.event)
        self.terminated = self.terminated | paid
        return self.observe(), TREASURE_REWARD * paid - BUMP_COST * bump.sum(dim=1), self.terminated.clone()

    def observe(self) -> torch.Tensor:
        """Observation of the current state, (E, 2, obs_dim) float32."""
        obs = self.features[self._key_state(), self._cell()]  # (E, 2, 19), a copy
        own_minus_other = self.agent_pos - self.agent_pos.flip(1)  # (E, 2, 2)
        # Write the other agent into the window where it is near, then the agent itself into the centre.
        row, col = 1 - own_minus_other[..., 0], 1 - own_minus_other[..., 1]
        near = (row >= 0) & (row <= 2) & (col >= 0) & (col <= 2)  # (E, 2)
        episode, agent = near.nonzero(as_tuple=True)
        obs[episode, agent, (3 * row + col)[near]] = torch.where(agent == 0, float(BOB), float(ALICE))
        obs[:, 0, CENTRE], obs[:, 1, CENTRE] = ALICE, BOB
        obs[..., OTHER] = own_minus_other.float()
        obs[..., EVENT] = self.event
        if not self.one_hot:
            return obs
        return torch.cat((F.one_hot(obs[..., :9].long(), num_classes=8).flatten(-2), obs[..., 9:] / 8), dim=-1)

    def oracles(self) -> dict[str, torch.Tensor]:
        """event (E, 2) int64: what each agent did in the last step, by `event_names`."""
        return {"event": self.event.long()}

    def picture(self) -> np.ndarray:
        """The first episode, (459, 459, 3) uint8."""
        return draw(self.agent_pos[0].tolist(), self.key_used[0].tolist(), bool(self.terminated[0]))

    def _cell(self) -> torch.Tensor:
        return SIZE * self.agent_pos[..., 0] + self.agent_pos[..., 1]  # (E, 2)

    def _key_state(self) -> torch.Tensor:
        return (self.key_used[:, :1] + 2 * self.key_used[:, 1:]).expand(-1, 2)  # (E, 2)


def parallel_env(render_mode: str | None = None, one_hot: bool = False) -> SingleEnv:
    """Alice & Bob as a PettingZoo ParallelEnv with the agents "alice" and "bob"; pictures of 459 x 459 pixels."""
    bound = 1.0 if one_hot else float(SIZE - 1)
    return SingleEnv(AliceBob(1, one_hot=one_hot), "alice_bob_v0", render_mode, ("alice", "bob"), bound)


ALICE_COLOUR, BOB_COLOUR, GOLD = (31, 119, 180), (214, 90, 30), (240, 180, 20)


def draw(agent_pos: list[list[int]], key_used: list[bool], treasure_found: bool, cell: int = 51) -> np.ndarray:
    """A picture of the grid, (9 * cell, 9 * cell, 3) uint8. Keys and doors wear the colour of the agent they free."""
    scale = 2 * cell  # drawn at twice the size, then smoothed down
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (245, 243, 238))
    pen = ImageDraw.Draw(image)

    def box(row, col, margin=0.0, dx=0.0, dy=0.0):
        left, top = (col + margin + dx) * scale, (row + margin + dy) * scale
        side = (1 - 2 * margin) * scale
        return left, top, left + side - 1, top + side - 1  # the last pixel is inside

    for row in range(SIZE):
        for col in range(SIZE):
            if MAP[row][col] == "#":
                pen.rectangle(box(row, col), fill=(70, 74, 82))
            else:
                pen.rectangle(box(row, col), outline=(222, 218, 210), width=2)
    for k, colour in enumerate((ALICE_COLOUR, BOB_COLOUR)):
        left, top, right, bottom = box(*DOORS[k])
        if key_used[k]:  # an open door: the leaf stands against the frame
            pen.rectangle((left, top, left + 0.14 * scale, bottom), fill=colour)
            pen.rectangle((right - 0.14 * scale, top, right, bottom), fill=colour)
        else:
            pen.rectangle((left, top, right, bottom), fill=colour)
            pen.ellipse(box(*DOORS[k], margin=0.44, dx=0.3), fill="white")
            left, top, right, bottom = box(*KEYS[k], margin=0.2)
            mid, unit = (top + bottom) / 2, 0.1 * scale
            pen.line((left + 2 * unit, mid, right, mid), fill=colour, width=int(0.9 * unit))
            for tooth in (right - 0.45 * unit, right - 2 * unit):
                pen.line((tooth, mid, tooth, mid + 1.5 * unit), fill=colour, width=int(0.9 * unit))
            pen.ellipse((left, mid - 1.5 * unit, left + 3 * unit, mid + 1.5 * unit), outline=colour, width=int(unit))
    pen.rounded_rectangle(box(*TREASURE, margin=0.12), radius=0.1 * scale, fill=GOLD, outline=(140, 95, 0), width=4)
    pen.text(centre(*TREASURE, scale), "$", fill=(140, 95, 0), font=ImageFont.load_default(0.6 * scale), anchor="mm")
    shared = agent_pos[0] == agent_pos[1]
    for name, colour, (row, col), side in zip("AB", (ALICE_COLOUR, BOB_COLOUR), agent_pos, (-0.17, 0.17)):
        dx = side if shared else 0.0  # side by side on a shared cell
        pen.ellipse(box(row, col, margin=0.2 if shared else 0.12, dx=dx), fill=colour, outline="white", width=5)
        font = ImageFont.load_default((0.36 if shared else 0.48) * scale)
        pen.text(centre(row, col + dx, scale), name, fill="white", font=font, anchor="mm")
    if treasure_found:
        pen.rectangle((0, 0, SIZE * scale - 1, SIZE * scale - 1), outline=GOLD, width=scale // 5)
    return np.asarray(image.resize((SIZE * cell, SIZE * cell), Image.Resampling.LANCZOS))


def centre(row: float, col: float, scale: int) -> tuple[float, float]:
    """Pixel (x, y) of the middle of a cell."""
    return (col + 0.5) * scale, (row + 0.5) * scale
