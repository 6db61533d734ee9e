"""The Triton ops.sample where there is no GPU: its machine code, and its interpreted tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from triton_gate import DEVICES, Compiled, run_interpreted

from bench.gate_sample import NO_FILTER, compile_sample
from fasttrain import ops
from fasttrain.kernels import sample as kernels

TARGETS = list(DEVICES)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
ISSUE_BUDGET = {2: 17.0, 4: 34.0}
"""Instructions per logit that an H100 issues in the time in which it reads the logit from memory, by bytes per logit:
128 lanes * 132 multiprocessors * 1.7 GHz / (3.35 TB/s / bytes)."""


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Machine code is made anew for every test run, and kept nowhere else."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def assert_clean(code: Compiled) -> None:
    assert code.spills == 0 and code.local_bytes == 0
    assert code.num_float_atomics == 0
    assert code.occupancy >= 2


def compile_groups(dtype: str, target: str, groups: int = 16) -> Compiled:
    return compile_sample("_groups_kernel", dtype, target, GROUPS=groups)


def compile_totals(dtype: str, target: str, groups: int = 16, **options: Any) -> Compiled:
    return compile_sample("_totals_kernel", dtype, target, GROUPS=groups, FILTERED=False, cuts=None, **options)


def compile_list(dtype: str, target: str) -> Compiled:
    return compile_sample("_list_kernel", dtype, target, num_warps=kernels.LIST_WARPS)


def compile_draw(dtype: str, target: str, padded: int, filtered: bool, logprobs: bool) -> Compiled:
    absent = {} if filtered else {name: None for name in NO_FILTER if name != "totals" or not logprobs}
    return compile_sample(
        "_draw_kernel", dtype, target, PADDED_G=padded, FILTERED=filtered, LOGPROBS=logprobs, **absent
    )


def assert_passes_are_clean(groups: int, dtype: str, target: str) -> None:
    num_loads = groups * 256 * DTYPES[dtype] / (128 * 16)  # by each of 128 threads, if all move 128 bits
    for code, num_results in ((compile_groups(dtype, target, groups), 2), (compile_totals(dtype, target, groups), 0)):
        assert_clean(code)
        assert code.wide_share >= num_loads / (num_loads + num_results)  # a store of results per group is narrow


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_passes_over_the_logits_have_no_spills_and_only_wide_loads(dtype: str, target: str) -> None:
    assert_passes_are_clean(16, dtype, target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_a_filtered_row_have_no_spills(target: str) -> None:
    assert_clean(compile_list("bf16", target))
    assert_clean(compile_draw("bf16", target, 512, filtered=True, logprobs=True))
    assert_clean(compile_sample("_bounds_kernel", "fp32", target, PADDED_G=512, FILTERED=True))
    cuts = compile_sample("_cuts_kernel", "bf16", target, BLOCK=1024, num_warps=kernels.CUT_WARPS)
    assert cuts.spills == 0 and cuts.local_bytes == 0 and cuts.num_float_atomics == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_of_every_variant_is_clean(dtype: str, target: str) -> None:
    for groups in (4, 16):
        assert_passes_are_clean(groups, dtype, target)
    for padded in (1, 16, 512, 1024):
        for filtered in (False, True):
            for logprobs in (False, True):
                assert_clean(compile_draw(dtype, target, padded, filtered, logprobs))
    assert_clean(compile_list(dtype, target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_all_passes_leave_memory_the_bottleneck(dtype: str) -> None:
    """A draw without filters makes one pass over the logits; of a row cut by count a second one reads the groups that
    can hold the first k (interpreted_sample.py counts both): for 50 of a vocabulary of 128256 a tenth."""
    first, second = (compiled(dtype, "sm_90").instructions_per_element for compiled in (compile_groups, compile_list))
    assert first <= ISSUE_BUDGET[DTYPES[dtype]]
    assert first + second * 50 * 256 / 128256 <= ISSUE_BUDGET[DTYPES[dtype]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_exact_masses_are_a_third_of_one_noise_per_token(dtype: str) -> None:
    """Only log-probabilities need them of all tokens; a Gumbel variable costs 108.5 instructions per logit here."""
    assert compile_totals(dtype, "sm_90").instructions_per_element <= 108.5 / 2.8


def test_products_and_sums_are_rounded_one_by_one() -> None:
    """With fused multiply-adds the polynomials would take fewer instructions, and other bits would come out."""
    fused, code = (compile_totals("fp32", "sm_90", fp_fusion=fusion) for fusion in (True, False))
    assert code.instructions_per_element >= fused.instructions_per_element + 5
    assert kernels.OPTIONS["enable_fp_fusion"] is False


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    row = torch.ones(2)
    with pytest.raises(ValueError, match=r"CPU tensor.*TRITON_INTERPRET=1"):
        kernels.sample(torch.zeros(2, 10), row, row, row, row, row, row)


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_sample.py"))


@pytest.mark.slow
def test_interpreted_campaign_passes() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_sample.py"), "-m", "slow", timeout=900)


@pytest.mark.gpu
def test_a_gpu_draws_the_references_tokens() -> None:
    from sample_problems import assert_equal_to_the_reference

    for V in (7, 1000, 50257, 128256):
        x = torch.randn(16, V, device="cuda") * 3
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for options in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 3000, "top_p": 0.5}):
                assert_equal_to_the_reference("triton", x.to(dtype), seed=torch.arange(16), **options)
            tokens = [ops.sample(x.to(dtype), seed=torch.arange(16), impl=impl) for impl in ("reference", "triton")]
            assert torch.equal(*tokens)
