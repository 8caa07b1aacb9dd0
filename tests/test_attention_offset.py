"""Shapley attention where an agent's scores share an offset, which a softmax does not see."""

import math

import torch

from stas_ippo_mpe import ShapleyAttention, sample_coalitions

N, D, H, B, M = 4, 6, 2, 50, 4


def attention_by_definition(block, x: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One coalition after another, each with a softmax of its own."""
    x = x + block.identity
    query = torch.stack([x[:, i] @ block.query[i] for i in range(N)], dim=1)  # (B, N, D)
    key, value = block.key_value(x).split(D, dim=-1)
    query, key, value = (y.view(B, N, H, D // H).transpose(1, 2) for y in (query, key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(D // H)  # (B, H, N, N)
    phi = 0
    for mask, weight in zip(masks, weights):
        attended = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1) @ value
        phi = phi + weight * block.proj(attended.transpose(1, 2).reshape(B, N, D))
    return phi


@torch.no_grad()
def test_an_offset_of_all_scores_changes_nothing():
    torch.manual_seed(0)
    block, x = ShapleyAttention(D, H, N).double(), torch.randn(B, N, D, dtype=torch.float64)
    masks, weights = sample_coalitions("bernoulli", M, B, N)
    before = block(x, masks, weights)
    offset = 100 * torch.randn(D, dtype=torch.float64)
    block.key_value.bias[:D] += offset  # which adds query_i times it to all scores of agent i
    query = torch.einsum("bnd,nde->bne", x + block.identity, block.query)
    shift = (query * offset).view(B, N, H, -1).sum(dim=-1) / math.sqrt(D // H)
    assert (shift > 40).float().mean() > 0.3 and (shift < -40).float().mean() > 0.3
    after = block(x, masks, weights)
    torch.testing.assert_close(after, attention_by_definition(block, x, masks, weights), rtol=0, atol=1e-9)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
