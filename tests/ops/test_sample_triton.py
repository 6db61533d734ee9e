"""The Triton ops.sample where there is no GPU: its machine code, and its interpreted tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from triton_gate import DEVICES, Compiled, run_interpreted

from bench.gate_sample import compile_sample, cut_options, draw_options, list_options
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


FORMS = [(4, 1), (8, 1), (32, 4)]
"""Groups a program of the first pass and its warps, as `groups_form` chooses them."""


def compile_groups(dtype: str, target: str, form: tuple[int, int] = FORMS[-1], **options: Any) -> Compiled:
    return compile_sample("groups_kernel", dtype, target, GROUPS=form[0], num_warps=form[1], **options)


def compile_list(dtype: str, target: str) -> Compiled:
    return compile_sample("list_kernel", dtype, target, **list_options(dtype, target))


def compile_draw(dtype: str, target: str, padded: int, filtered: bool, logprobs: bool) -> Compiled:
    return compile_sample("draw_kernel", dtype, target, PADDED_G=padded, **draw_options(filtered, logprobs))


def assert_the_pass_is_clean(form: tuple[int, int], dtype: str, target: str) -> None:
    code = compile_groups(dtype, target, form)
    assert_clean(code)
    num_loads = form[0] * 256 * DTYPES[dtype] / (form[1] * 32 * 16)  # by each thread, if all move 128 bits
    assert code.wide_share >= num_loads / (num_loads + 2)  # a store of results per group is narrow


def assert_cuts_are_clean(dtype: str, target: str, padded: int) -> None:
    cuts = compile_sample("cuts_kernel", dtype, target, PADDED_G=padded, **cut_options(dtype))
    assert cuts.spills == 0 and cuts.local_bytes == 0 and cuts.num_float_atomics == 0


def test_the_forms_are_those_that_are_launched() -> None:
    shapes = [(1, 128256), (16, 128256), (2000, 1000)]
    chosen = {kernels.groups_form(*shape, filtered) for shape in shapes for filtered in (False, True)}
    assert chosen == set(FORMS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_pass_over_the_logits_has_no_spills_and_only_wide_loads(dtype: str, target: str) -> None:
    assert_the_pass_is_clean(FORMS[-1], dtype, target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_a_filtered_row_have_no_spills(target: str) -> None:
    assert_clean(compile_list("bf16", target))
    assert_clean(compile_draw("bf16", target, 512, filtered=True, logprobs=True))
    assert_clean(compile_sample("bounds_kernel", "fp32", target, PADDED_G=512))
    assert_cuts_are_clean("bf16", target, 512)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_of_every_variant_is_clean(dtype: str, target: str) -> None:
    for form in FORMS:
        assert_the_pass_is_clean(form, dtype, target)
    for padded in (1, 16, 512, 1024):
        for filtered in (False, True):
            for logprobs in (False, True):
                assert_clean(compile_draw(dtype, target, padded, filtered, logprobs))
        assert_cuts_are_clean(dtype, target, padded)
        if padded > 1:  # one group has no element-wise access to count
            assert_clean(compile_sample("bounds_kernel", "fp32", target, PADDED_G=padded))
    assert_clean(compile_list(dtype, target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_all_passes_leave_memory_the_bottleneck(dtype: str) -> None:
    """A row without filters is read once; one with filters for a second time at most, all of it only if every group
    holds a token that can stay (interpreted_sample.py counts both)."""
    first = {form: compile_groups(dtype, "sm_90", form).instructions_per_element for form in FORMS}
    again = compile_list(dtype, "sm_90").instructions_per_element
    budget = ISSUE_BUDGET[DTYPES[dtype]]
    assert max(first.values()) <= budget / 1.9
    for shape in ((1, 128256), (16, 128256)):
        assert first[kernels.groups_form(*shape, True)] + again <= budget


def test_only_what_is_written_as_one_is_a_fused_multiply_add() -> None:
    """With others the polynomials would take fewer instructions, and other bits would come out."""
    options = {"PADDED_G": 1, **draw_options(False)}
    fused, code = (
        compile_sample("draw_kernel", "fp32", "sm_90", fp_fusion=fusion, **options) for fusion in (True, False)
    )
    assert code.instructions_per_element > fused.instructions_per_element
    assert kernels.options(4)["enable_fp_fusion"] is False


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    row = torch.ones(2)
    with pytest.raises(ValueError, match=r"CPU tensor.*TRITON_INTERPRET=1"):
        kernels.sample(torch.zeros(2, 10), row, row, row, row, row, row)


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_sample.py"), timeout=560)


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
