"""What every test shares. Test processes use PyTorch's own thread count: kernels must not care."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, in C++ too, so a kernel that leaves a value unwritten is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` campaigns run only when asked for with -m; `gpu` tests only where there is a GPU."""
    asked_for_slow = "slow" in str(config.getoption("-m"))
    for item in items:
        if "slow" in item.keywords and not asked_for_slow:
            item.add_marker(pytest.mark.skip(reason="a long campaign: run it with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
