"""The rules of the house that a machine can check: arrows, budgets, stems, names, and what must never be imported."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fasttrain
from fasttrain import ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fasttrain"

# A module imports only from strictly lower levels; files of one package may import each other.
LEVELS = [
    {
        "config",
        "utils",
        "backend",
        "kernels",
        "_C",
        "trees",
        "permutation",
        "prefetch",
        "batches",
        "collectives",
        "dealing",
        "distributed",
        "shards",
        "repeats",
        "sharded_memory",
        "screens",
        "flags",
        "llama_weights",
    },
    {"products"},
    {
        "amp",
        "gradient_buckets",
        "meta_init",
        "ops",
        "tokenization",
        "storage",
        "corpus_statistics",
        "batch_stream",
        "schedules",
        "tensorfile",
        "native_decoding",
        "ngram_index",
        "text_stream",
        "throughput",
        "penalties",
    },
    {"state", "corpus", "manifest", "result", "resume_rules", "truncation", "decoding", "heads", "vocab_shards"},
    {
        "agreement",
        "callbacks",
        "losses",
        "token_store",
        "treefiles",
        "prompts",
        "context_window",
        "sampler",
        "speculation",
        "vocab_parallel",
    },
    {"beam_search", "rank_parts", "replicas", "shard_files", "sharded_head", "update"},
    {"generation_loop"},
    {
        "averaging",
        "checkpointing",
        "control",
        "data",
        "evaluation",
        "generation",
        "loggers",
        "memory_bound",
        "models",
        "optimizations",
        "profiling",
        "progress",
        "rank_pace",
        "scoring",
        "spikes",
    },
    {"training_loop", "assembly", "sharding", "retention", "capsule", "export", "step_memory"},
    {"parallel", "preflight", "saver", "tuning", "planned_model"},
    {"summary", "report", "session", "plan", "verification"},
    {"trainer"},
    {"cli"},
]
ABOVE_ALL = {"__init__", "__main__"}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

PUBLIC = {
    "Trainer",
    "TrainConfig",
    "TrainResult",
    "EvalResult",
    "GenerationConfig",
    "Callback",
    "AdamW",
    "evaluate",
    "fit",
    "generate",
    "ops",
    "backend_info",
}


def package_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)


def kernel_files() -> list[Path]:
    return sorted((ROOT / "kernels").glob("*.py"))


def name_of(path: Path) -> str:
    """The module's name in LEVELS: its file's stem, or its package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions too."""
    package = ["fasttrain", *path.relative_to(PACKAGE).parent.parts] if path.is_relative_to(PACKAGE) else ["kernels"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            if len(module) == 1:  # `from . import x`: each name is a module
                yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)
            else:
                yield node.lineno, ".".join(module)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def test_import_arrows_point_down() -> None:
    wrong = []
    for path in package_files():
        here = name_of(path)
        if here in ABOVE_ALL:
            continue
        assert here in LEVEL, f"{path.name} is in no level of tests/test_house.py; give it one"
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] != "fasttrain" or len(parts) < 2 or parts[1] in (here, "__version__"):
                continue
            if LEVEL.get(parts[1], 99) >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {
        "__future__",
        "torch",
        "triton",
        "math",
        "os",
        "dataclasses",
        "functools",
        "typing",
        "collections",
        "kernels",
    }
    wrong = [
        f"{path.name}:{line} {module}"
        for path in kernel_files()
        for line, module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not wrong


def test_files_and_functions_stay_within_their_budgets() -> None:
    over = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for paths, budget in ((package_files(), 400), (kernel_files(), 450))
        for path in paths
        if (count := path.read_text().count("\n")) > budget
    ]
    for path in [*package_files(), *kernel_files()]:
        for function in functions(path):
            if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                continue
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            budget = 60 if function.name == "train_step" else 80
            if lines > budget:
                over.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name} is {lines} lines long")
    readme = (ROOT / "README.md").read_text().count("\n")
    assert not over and readme <= 200, "\n".join([*over, f"README: {readme} lines"])


def test_every_op_has_its_four_files() -> None:
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    missing = [
        f"{folder}{prefix}{stem}.py"
        for stem in stems
        for folder, prefix in (("tests/ops/", "test_"), ("bench/", "bench_"))
        if not (ROOT / folder / f"{prefix}{stem}.py").exists()
    ]
    from fasttrain.ops._dispatch import IMPLEMENTATIONS

    missing += [
        f"kernels/{op}.py"
        for op, implementations in IMPLEMENTATIONS.items()
        if "triton" in implementations and not (ROOT / "kernels" / f"{op}.py").exists()
    ]
    missing += [
        f"csrc/{op}.cpp"
        for op, implementations in IMPLEMENTATIONS.items()
        if "cpp" in implementations and not (ROOT / "csrc" / f"{op}.cpp").exists()
    ]
    orphans = {path.stem for path in kernel_files() if not any(f"{path.stem}_".startswith(f"{s}_") for s in stems)}
    assert not missing and not orphans and set(IMPLEMENTATIONS) <= stems


def test_public_names_are_the_designs() -> None:
    assert set(fasttrain.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fasttrain, name) is not None
    from fasttrain.trainer import Trainer

    assert fasttrain.Trainer is Trainer
    assert {"cross_entropy", "linear_cross_entropy", "sample"} <= set(ops.__all__)


def test_the_ops_signatures_are_the_designs() -> None:
    assert str(inspect.signature(ops.cross_entropy)).split(" ->")[0] == (
        "(logits: 'Tensor', targets: 'Tensor', *, ignore_index: 'int' = -100, label_smoothing: 'float' = 0.0, "
        "z_loss: 'float' = 0.0, softcap: 'float | None' = None, reduction: 'Reduction' = 'mean', impl: 'Impl' = 'auto')"
    )
    assert str(inspect.signature(ops.linear_cross_entropy)).split(" ->")[0] == (
        "(hidden: 'Tensor', weight: 'Tensor', targets: 'Tensor', *, bias: 'Tensor | None' = None, "
        "ignore_index: 'int' = -100, label_smoothing: 'float' = 0.0, z_loss: 'float' = 0.0, "
        "softcap: 'float | None' = None, reduction: 'Reduction' = 'mean', filter_eps: 'float | None' = None, "
        "return_skipped_mass: 'bool' = False, impl: 'Impl' = 'auto')"
    )
    assert list(inspect.signature(ops.sample).parameters) == [
        "logits",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "position",
        "return_logprobs",
        "impl",
    ]
    assert list(inspect.signature(fasttrain.AdamW).parameters) == [
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "max_grad_norm",
        "ema_decay",
        "state_dtype",
        "master",
        "impl",
    ]


def test_the_train_config_stays_small_and_every_field_says_what_it_is() -> None:
    fields = [field.name for field in dataclasses.fields(fasttrain.TrainConfig)]
    assert len(fields) <= 36
    source = inspect.getsource(inspect.getmodule(fasttrain.TrainConfig))  # type: ignore[arg-type]
    for cls in ("TrainConfig", "GenerationConfig"):
        body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls).body
        for declared, described in zip(body, [*body[1:], None]):
            if isinstance(declared, ast.AnnAssign):
                assert isinstance(described, ast.Expr) and isinstance(described.value, ast.Constant), (
                    f"{cls}.{ast.unparse(declared)} has no docstring"
                )


def test_nothing_pickles_and_nothing_bypasses_the_checkpoint_format() -> None:
    forbidden_modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    forbidden_calls = {"torch.load", "torch.save", "eval", "exec", "yaml.load"}
    wrong = []
    for path in [*package_files(), *kernel_files()]:
        wrong += [
            f"{path.name}:{line} imports {module}"
            for line, module in imports(path)
            if module.split(".")[0] in forbidden_modules
        ]
        wrong += [
            f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden_calls
        ]
    assert not wrong


def test_no_exception_is_swallowed() -> None:
    wrong = []
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            )
            if broad and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body):
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize("path", [*package_files(), *kernel_files()], ids=lambda p: p.name)
def test_every_module_says_what_it_is(path: Path) -> None:
    if path.name == "__main__.py":
        return
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_readme_names_only_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"README names make {target}"
    for file in re.findall(r"`((?:fasttrain|kernels|csrc|bench|tests|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), f"README names {file}"
