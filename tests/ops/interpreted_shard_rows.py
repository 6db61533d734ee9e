"""Rows cut over processes by the Triton kernels, which Triton's interpreter runs on CPU tensors.

Not collected by name: `test_shard_rows.py` runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from shard_problems import TERMS, assert_shards_give_whole_rows

from fasttrain.ops.cross_entropy import Terms

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("dtype", "in_place"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_shards_give_the_losses_and_gradients_of_whole_rows(dtype: torch.dtype, terms: Terms, in_place: bool) -> None:
    for cut in ((1, 1), (3, 0, 4), (70, 33)):
        assert_shards_give_whole_rows("triton", cut, dtype, terms, in_place)
