"""Filters that take unlikely (or too likely) tokens away, and the named orders in which programs apply them.

Every filter is decided on the integer masses of ops/sample.py, so a kept set depends on no order of summation, thread
count or batchmate. A removed token has the logit -inf for all that follows. What `ops.sample` does itself
(temperature, top-k, top-p, min-p, in that order) is left to it wherever nothing comes in between; the rest is here.

    typical  (Meister et al. 2022)  H = -sum p log p; tokens by |-log p - H| ascending (ties: larger logit, then lower
             id); the smallest leading set of at least this mass stays.
    epsilon  (Hewitt et al. 2022)   p >= epsilon stays, and the likeliest.
    XTC      (llama.cpp)            with probability q per token: of the tokens with p >= threshold all but the last in
             order of likelihood go, if they are two or more. The coin is Philox(seed, position) in its own domain.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops._row_parameters import ONE
from .ops.sample import check_rows, leading_ids, log2, open_uniform, philox_4x32_10, sample, token_masses

COIN_DOMAIN = 2  # 0 and 1 are the draw's
_ORDERS = {
    "hf": ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon", "xtc"),
    "vllm": ("temperature", "min_p", "top_k", "top_p", "typical_p", "epsilon", "xtc"),
    "llama.cpp": ("top_k", "typical_p", "top_p", "min_p", "epsilon", "xtc", "temperature"),
}
_OF_THE_OP = ("temperature", "top_k", "top_p", "min_p")
_FEW = 1024


@dataclass(frozen=True)
class Truncation:
    """The filters of a GenerationConfig, by the same names."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    order: str = "hf"

    def steps(self) -> list[str]:
        """Names of the steps that do something, in order."""
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon": 0.0}
        on = {name for name, neutral in off.items() if getattr(self, name) != neutral}
        if self.xtc_probability > 0.0:
            on.add("xtc")
        return [name for name in _ORDERS[self.order] if name in on]

    def arguments_of_the_op(self) -> dict[str, Any] | None:
        """All four filters of `ops.sample` if nothing else is on and they come in its order, else None."""
        if self.temperature == 0.0:
            return {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        if not _in_order_of_the_op(self.steps()):
            return None
        return {name: getattr(self, name) for name in _OF_THE_OP}

    def draw(self, logits: Tensor, seed: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Tokens (B,) int64 and their log-probabilities under the processed distribution (B,) float32.

        Args:
            logits: (B, V), any floating dtype; not written to.
            seed: (B,) int64, and position, the index of the new token: the key of each row's randomness.
        Raises:
            ValueError: a row with NaN, +inf or no finite logit.
        """
        x, rest = self.before_the_op(logits, seed, position)
        return sample(x, seed=seed, position=position, return_logprobs=True, **rest)

    def before_the_op(self, logits: Tensor, seed: Tensor, position: int) -> tuple[Tensor, dict[str, Any]]:
        """The logits after the steps that `ops.sample` cannot take over, and its arguments for those it can."""
        if self.temperature == 0.0:  # every filter that is allowed with it keeps the likeliest
            return logits, {"temperature": 0.0}
        steps = self.steps()
        own = next(i for i in range(len(steps) + 1) if _in_order_of_the_op(steps[i:]))
        x, temperature = logits, 1.0
        if own > 0:
            x = logits.float()
            check_rows(x, 0)
        for name in steps[:own]:
            if name == "temperature":
                temperature = self.temperature
            elif name == "xtc":
                x = xtc(x, temperature, self.xtc_probability, self.xtc_threshold, seed, position)
            else:
                x = _FILTERS[name](x, temperature, getattr(self, name))
        arguments = {name: getattr(self, name) for name in steps[own:]}
        return x, {"temperature": temperature, **arguments}


def _in_order_of_the_op(steps: list[str]) -> bool:
    return steps == [name for name in _OF_THE_OP if name in steps]


def top_k(x: Tensor, temperature: float, k: int) -> Tensor:
    """Exactly k tokens stay, ties to the lower id."""
    if k >= x.size(1):
        return x
    ids = leading_ids(x, k)
    return torch.full_like(x, -math.inf).scatter_(1, ids, x.gather(1, ids))


def top_p(x: Tensor, temperature: float, p: float) -> Tensor:
    """The smallest leading set of mass at least p stays."""
    w = _masses(x, temperature)
    need = _share(w.sum(1, keepdim=True), p)
    for count in (min(_FEW, x.size(1)), x.size(1)):  # mostly a few tokens hold the share, and no full sort is needed
        ids = leading_ids(x, count)
        leading = w.gather(1, ids)
        if bool((leading.sum(1, keepdim=True) >= need).all()):
            break
    return _keep_leading(x, ids, leading, need)


def min_p(x: Tensor, temperature: float, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest stay."""
    return x.masked_fill(_masses(x, temperature) < math.ceil(_rounded(p) * ONE), -math.inf)


def epsilon(x: Tensor, temperature: float, p: float) -> Tensor:
    """Tokens of probability at least p stay, and the likeliest."""
    w = _masses(x, temperature)
    likeliest = x == x.amax(1, keepdim=True)
    return x.masked_fill((w < _share(w.sum(1, keepdim=True), p)) & ~likeliest, -math.inf)


def typical_p(x: Tensor, temperature: float, p: float) -> Tensor:
    """The tokens whose surprise -log p is closest to the entropy stay, up to mass p."""
    w = _masses(x, temperature)
    total = w.sum(1, keepdim=True)
    possible = w > 0
    surprise = log2(total.double()) - log2(torch.where(possible, w, 1).double())  # (B, V) bits, float64
    # Summed as integers of 2^-45 bits: exact, so in whatever order. The sum stays below 18 * 2^45.
    terms = torch.where(possible, w.double() / total.double() * surprise * 2.0**45, 0.0).round_().long()
    entropy = terms.sum(1, keepdim=True).double() * 2.0**-45
    distance = torch.where(possible, (surprise - entropy).abs_(), math.inf)
    ids = leading_ids(x, x.size(1))
    ids = ids.gather(1, distance.gather(1, ids).sort(dim=1, stable=True).indices)
    return _keep_leading(x, ids, w.gather(1, ids), _share(total, p))


def xtc(x: Tensor, temperature: float, probability: float, threshold: float, seed: Tensor, position: int) -> Tensor:
    """Where the row's coin says so, all but the last of the tokens of probability at least `threshold` go."""
    w = _masses(x, temperature)
    top = (w >= _share(w.sum(1, keepdim=True), threshold)) & (w > 0)
    least = torch.where(top, x, math.inf).amin(1, keepdim=True)
    ids = torch.arange(x.size(1), device=x.device)
    last = torch.where(top & (x == least), ids, -1).amax(1, keepdim=True)
    goes = top & (ids != last) & (coin(seed, position) < probability)[:, None]
    return x.masked_fill(goes, -math.inf)


def coin(seed: Tensor, position: int) -> Tensor:
    """XTC's uniform number of each row, (B,) float64 in (0, 1): token id 0 in a domain of its own."""
    place = torch.full_like(seed, position)
    counter = (torch.zeros_like(seed), torch.full_like(seed, COIN_DOMAIN), place & 0xFFFFFFFF, place >> 32)
    r0, r1, _, _ = philox_4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return open_uniform(r0, r1)


_FILTERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p, "epsilon": epsilon}


def _masses(x: Tensor, temperature: float) -> Tensor:
    """(B, V) int64. A row without a distribution gets whatever: the draw refuses it."""
    scale = torch.full((x.size(0),), math.log2(math.e) / _rounded(temperature), dtype=torch.float64, device=x.device)
    return token_masses(x, x.amax(1, keepdim=True), scale.clamp_(2.0**-64, 2.0**64).float())


def _rounded(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))  # as the op rounds its parameters


def _share(total: Tensor, p: float) -> Tensor:
    """ceil(p * total), at least 1 and at most the total, as in top-p's specification."""
    return (total.double() * _rounded(p)).ceil_().long().clamp_(min=1).minimum(total)


def _keep_leading(x: Tensor, ids: Tensor, masses: Tensor, need: Tensor) -> Tensor:
    """Of `ids` (B, n) with their masses those stay that have less than `need` before them."""
    before = masses.cumsum(1) - masses
    kept = torch.where((before < need) & (masses > 0), x.gather(1, ids), -math.inf)
    return torch.full_like(x, -math.inf).scatter_(1, ids, kept)
