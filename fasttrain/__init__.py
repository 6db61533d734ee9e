"""fasttrain: train and sample language models with PyTorch on fused CPU and GPU kernels.

Names are loaded at first use, so `import fasttrain` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .callbacks import Callback as Callback
    from .config import GenerationConfig as GenerationConfig
    from .config import TrainConfig as TrainConfig
    from .evaluation import EvalResult as EvalResult
    from .evaluation import evaluate as evaluate
    from .generation import generate as generate
    from .ops import backend_info as backend_info
    from .ops.adamw import AdamW as AdamW
    from .result import TrainResult as TrainResult
    from .trainer import Trainer as Trainer
    from .training_loop import fit as fit

__version__ = "0.1.0"

# Where each public name lives: name -> module.
_HOMES = {
    "AdamW": "ops.adamw",
    "Callback": "callbacks",
    "EvalResult": "evaluation",
    "GenerationConfig": "config",
    "TrainConfig": "config",
    "TrainResult": "result",
    "Trainer": "trainer",
    "backend_info": "ops",
    "evaluate": "evaluation",
    "fit": "training_loop",
    "generate": "generation",
    "ops": "",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
    home = _HOMES[name]
    module = importlib.import_module(f".{home or name}", __name__)
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
