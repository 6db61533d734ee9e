"""The example decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head, static KV cache.

Why it exists: the demo needs a model, and a reader needs one whose every line can be followed. It knows nothing of
the training loop; the loop calls it like any other module. Left out on purpose: attention of our own (torch's SDPA is
the kernel), weight formats other than plain dense, and a loss (hidden states are returned on request instead, so that
the loss can be computed without the (B, T, V) logits).

Shapes: B batch, T positions, D hidden size, H query heads, K key/value heads, E head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT. A 0 that means "derive" is replaced by the derived number on construction, so the config
    that a checkpoint stores names every size outright."""

    vocab_size: int
    """Number of token ids."""
    num_layers: int = 6
    """Decoder blocks."""
    num_heads: int = 6
    """Query heads; hidden_size / num_heads is the head size, which must be even."""
    num_kv_heads: int = 0
    """Key/value heads, a divisor of num_heads (0: as many as query heads)."""
    hidden_size: int = 384
    """Width of the residual stream."""
    intermediate_size: int = 0
    """Width inside the MLP (0: 8/3 of hidden_size, rounded up to a multiple of 64)."""
    max_seq_len: int = 1024
    """Longest sequence in tokens; a longer one is a ValueError."""
    rope_theta: float = 10000.0
    """Base of the rotary angles."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    dropout: float = 0.0
    """Probability of dropping an embedding, attention or residual value while training."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""

    def __post_init__(self) -> None:
        derived = ("num_kv_heads", "intermediate_size")
        for name in ("vocab_size", "num_layers", "num_heads", "hidden_size", "max_seq_len", *derived):
            value, smallest = getattr(self, name), 0 if name in derived else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"GPTConfig.{name} is {value!r}; it must be a whole number of at least {smallest}")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"GPTConfig.num_heads is {self.num_heads}; it must divide hidden_size={self.hidden_size} into "
                "heads of even size (rotary positions turn pairs of values)"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GPTConfig.num_kv_heads is {self.num_kv_heads}; "
                f"it must divide num_heads={self.num_heads} (0: equal to it)"
            )
        for name in ("rope_theta", "norm_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"GPTConfig.{name} is {getattr(self, name)!r}; it must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig.dropout is {self.dropout!r}; it must lie in [0, 1)")
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        two_thirds_of_4x = -(-self.hidden_size * 8 // (3 * 64)) * 64  # as many weights as a plain MLP of width 4 D
        object.__setattr__(self, "intermediate_size", self.intermediate_size or two_thirds_of_4x)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


def rotary_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/E), i < E/2, always in float32: bfloat16 cannot tell position 257 from 256.

    positions (B or 1, T) integers -> two float32 tensors (B or 1, 1, T, E/2). Computed afresh in each forward and
    shared by all layers, which keeps tables out of the state dict and out of reach of `model.to(bfloat16)`.
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions[:, None, :, None].float() * torch.pow(theta, -exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i+E/2}) of (B, heads, T, E) by their angles, in float32; Llama's layout of pairs."""
    first, second = x.float().chunk(2, dim=-1)  # (B, heads, T, E/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; each key/value head serves H/K neighbouring query heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.qkv = nn.Linear(config.hidden_size, qkv_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        config = self.config
        B, T, _ = x.shape
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = self.qkv(x).view(B, T, heads + 2 * kv_heads, config.head_size).transpose(1, 2)  # (B, H + 2K, T, E)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, length + T, E)
        dropout = config.dropout if self.training else 0.0
        if T == 1 and k.shape[2] > 1:
            # One query sees every key, so the heads of a group can stand in as positions: no key is copied per head.
            grouped = q.view(B, kv_heads, heads // kv_heads, config.head_size)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout)
            y = y.reshape(B, heads, 1, config.head_size)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=heads != kv_heads
            )
        return self.out(y.transpose(1, 2).reshape(B, T, config.hidden_size))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are one matrix, stacked in that order."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The output depends on the arguments alone: recomputable."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask, cache, layer))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V).

    Left or right padding is declared by `attention_mask` (B, T), 1 for a token and 0 for padding: padded positions are
    attended to by nobody but themselves and do not count as positions, so a padded row computes what it computes alone.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        # A tied head is no entry of its own: the state dict holds every tensor once.
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws fresh weights from torch's global generator.

        Matrices: normal, variance 2 / (5 D) (Nguyen and Salazar 2019, "small init"). Projections back into the residual
        stream: divided by sqrt(2 L) besides, so that its variance does not grow with depth (GPT-2). Embedding and head:
        0.02, which puts the first loss within a few hundredths of ln V.
        """
        config = self.config
        matrix_std = math.sqrt(2.0 / (5.0 * config.hidden_size))
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            elif name.startswith(("token_embedding", "head")):
                parameter.normal_(0.0, 0.02)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                parameter.normal_(0.0, matrix_std / math.sqrt(2.0 * config.num_layers))
            else:
                parameter.normal_(0.0, matrix_std)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or with `return_hidden` the normed hidden states (B, T, D), whose product with
        `get_output_embeddings().weight` (V, D) transposed is the logits.

        Args:
            input_ids: (B, T) integers in [0, V).
            attention_mask: (B, T), nonzero for a token. With a cache: only in its first call, and padding on the left.
            position_ids: (B, T) or (1, T) integers; by default the count of tokens before, padding not counted.
            cache: from `new_cache`; the T positions are appended to it and attend to all that it holds.
        Raises:
            ValueError: a sequence longer than `max_seq_len` or the cache, or a mask of another shape than `input_ids`.
        """
        past = cache.length if cache is not None else 0
        self._check(input_ids, attention_mask, cache, past)
        if cache is not None and attention_mask is not None:
            cache.num_pads = _count_left_pads(attention_mask)
        if position_ids is None:
            position_ids = _default_positions(input_ids, attention_mask, cache)
        cos, sin = rotary_angles(position_ids, self.config.head_size, self.config.rope_theta)
        mask = _attention_mask(input_ids, attention_mask, cache)

        x = self.dropout(self.token_embedding(input_ids))  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache, layer)
        hidden = self.final_norm(x)
        if cache is not None:
            cache.length = past + input_ids.shape[1]
        return hidden if return_hidden else F.linear(hidden, self.get_output_embeddings().weight)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, past: int) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, positions), not empty"
            )
        if past + input_ids.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"input_ids reaches position {past + input_ids.shape[1]}; max_seq_len is {self.config.max_seq_len}: "
                "shorten the sequence or build the model with a larger GPTConfig.max_seq_len"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"it must be {tuple(input_ids.shape)} like input_ids"
            )
        if cache is not None:
            if cache.batch != input_ids.shape[0] or past + input_ids.shape[1] > cache.capacity:
                raise ValueError(
                    f"cache holds {cache.batch} rows of {cache.capacity} positions; the call needs "
                    f"{input_ids.shape[0]} rows of {past + input_ids.shape[1]}: ask new_cache for as many"
                )
            if attention_mask is not None and past:
                raise ValueError(
                    f"attention_mask came with a cache that holds {past} positions; pass it in the first call only"
                )

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions, on this model's device and in its dtype."""
        if batch < 1 or not 1 <= length <= self.config.max_seq_len:
            raise ValueError(
                f"new_cache got batch={batch}, length={length}; batch must be positive and length in "
                f"[1, max_seq_len={self.config.max_seq_len}]"
            )
        weight = self.token_embedding.weight
        config = self.config
        shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_size)
        return KVCache(shape, device=weight.device, dtype=weight.dtype)

    def get_output_embeddings(self) -> nn.Embedding | nn.Linear:
        """The module whose `weight` (V, D) is the output head: the token embedding itself when tied."""
        return self.token_embedding if self.head is None else self.head

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Number of parameters; `non_embedding` leaves out the token embedding (and with it a tied head)."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.token_embedding.weight.numel() if non_embedding else total

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token (forward and backward) in sequences of `seq_len`.

        6 P + 12 L D T: P the parameters that multiply (blocks and head; the norms and the embedding lookup do not), two
        operations each forward and four backward; the second term the two attention products, not halved for causality
        (the convention of Chowdhery et al. 2022, appendix B, so that utilisation compares with published figures).
        """
        config = self.config
        matrices = sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.dim() >= 2)
        matrices += config.vocab_size * config.hidden_size
        return 6 * matrices + 12 * config.num_layers * config.hidden_size * seq_len

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two optimizer groups: tensors of two or more dimensions are decayed, norm weights are not."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]


def _default_positions(input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """(B or 1, T): tokens before each position in its row, padding not counted."""
    if attention_mask is not None:
        return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)
    past = cache.length if cache is not None else 0
    positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    if cache is not None and cache.num_pads is not None:
        positions = positions - cache.num_pads[:, None]
    return positions


def _attention_mask(input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor | None:
    """True where a query may attend to a key, (B or 1, 1, T, past + T); None where causality alone decides."""
    T, device = input_ids.shape[1], input_ids.device
    past = cache.length if cache is not None else 0
    num_pads = cache.num_pads if cache is not None else None
    if attention_mask is None and num_pads is None and (past == 0 or T == 1):
        return None
    query = torch.arange(past, past + T, device=device)[:, None]  # (T, 1)
    key = torch.arange(past + T, device=device)[None, :]  # (1, past + T)
    allowed = (key <= query)[None, None]
    if num_pads is not None:
        allowed = allowed & (key >= num_pads[:, None])[:, None, None]
    elif attention_mask is not None:
        allowed = allowed & (attention_mask != 0)[:, None, None]
    # Padding attends to itself: a row of the softmax with nothing to look at would be 0/0.
    return allowed | (key == query)[None, None]


def _count_left_pads(attention_mask: Tensor) -> Tensor | None:
    """(B,) padding before each row's first token; None if there is none. A cache cannot hold padding anywhere else."""
    real = attention_mask != 0
    if not bool((real[:, 1:] | ~real[:, :-1]).all()) or not bool(real[:, -1].all()):
        raise ValueError("attention_mask pads to the right of a token; with a cache it must pad the left of each row")
    num_pads = (~real).sum(1)
    return num_pads if bool(num_pads.any()) else None
