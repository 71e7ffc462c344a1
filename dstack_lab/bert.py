"""A BERT-base-shaped encoder made of torch.nn parts: sizes that count, random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bert(nn.Module):
    """BERT without a task head: embeddings, layers, pooler; BERT-base by default, 109,482,240 parameters.

    Takes token ids ``(batch, tokens)`` int64, gives the last hidden state ``(batch, tokens, width)``
    and the pooled one ``(batch, width)``.

    Parameters
    ----------
    layers, width, heads : int
        BERT-base: 12, 768, 12; BERT-large: 24, 1024, 16. The feed-forward part is 4 times as wide.
        Vocabulary 30522, 512 positions, 2 token types. Sizes after Devlin et al. (NAACL 2019).
    """

    VOCABULARY = 30522

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.token, self.position, self.kind = (nn.Embedding(n, width) for n in (self.VOCABULARY, 512, 2))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.Sequential(*(Layer(width, heads, 4 * width) for _ in range(layers)))
        self.pooler = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sentences whose tokens are all of the first type and none is padding."""
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(where) + self.kind(torch.zeros_like(tokens))
        x = self.layers(self.norm(x))
        return x, torch.tanh(self.pooler(x[:, 0]))


class Layer(nn.Module):
    """Self-attention and a feed-forward block, each with a skip and a normalisation after it."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm_attention, self.norm_output = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, tokens, width)`` to the same shape."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_attention(x + self.mix(seen))
        result: Tensor = self.norm_output(x + self.narrow(F.gelu(self.widen(x))))
        return result
