"""Every way to get a Python package, each in a scratch environment, and what the build says when it can't."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT_ALL = (
    "import fasttrain, fasttrain.kernels.cross_entropy as k, fasttrain.ops; "
    "print(fasttrain.__file__, k.__file__, sep='\\n')"
)
USE = "import torch; from fasttrain import ops"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    base = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FASTTRAIN_BUILD")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**base, **(env or {})}, capture_output=True, text=True
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what git would check out, without any build product."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for name in ("fasttrain", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def new_environment(path: Path) -> Path:
    """A virtual environment that sees this one's packages (torch is large) but not its fasttrain."""
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    site = next(path.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(
        sysconfig.get_paths()["purelib"]
    )  # a plain path: its own .pth files are not read
    return path / "bin/python"


def pip_install(
    python: Path, *arguments: str | Path, env: dict[str, str] | None = None, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    return run(
        python,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--force-reinstall",
        *arguments,
        cwd=python.parent,
        env=env,
        ok=ok,
    )


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        out,
        source,
        cwd=out,
        env={"FASTTRAIN_BUILD": "require", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    return next(out.glob("fasttrain-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = new_environment(tmp_path_factory.mktemp("installed") / "venv")
    pip_install(python, wheel)
    return python


def test_wheel_run_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    package, kernel = run(installed, "-c", IMPORT_ALL, cwd=tmp_path).stdout.split()
    assert (
        "site-packages/fasttrain/__init__.py" in package
        and "site-packages/fasttrain/kernels/cross_entropy.py" in kernel
    )
    code = f"{USE}; print(ops.cross_entropy(torch.zeros(2, 8), torch.tensor([0, 1]), impl='cpp').item())"
    assert float(run(installed, "-c", code, cwd=tmp_path).stdout) == pytest.approx(2.0794415)


def test_installed_package_does_not_take_the_name_kernels(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed,
        "-c",
        "import fasttrain.ops, sys; assert 'kernels' not in sys.modules; import kernels",
        cwd=tmp_path,
        ok=False,
    )
    assert "No module named 'kernels'" in done.stderr


def test_wheel_run_with_the_repository_as_working_directory(installed: Path, source: Path) -> None:
    package, kernel = run(installed, "-c", IMPORT_ALL, cwd=source).stdout.split()
    assert Path(package).parent == Path(kernel).parent.parent  # both from one tree


def test_editable_install(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "editable"
    shutil.copytree(source, copy, symlinks=True)
    python = new_environment(tmp_path / "venv")
    pip_install(python, "-e", copy, env={"FASTTRAIN_BUILD": "off"})
    package, kernel = run(python, "-c", IMPORT_ALL, cwd=tmp_path).stdout.split()
    assert (
        Path(package) == copy / "fasttrain/__init__.py" and Path(kernel).resolve() == copy / "kernels/cross_entropy.py"
    )


def test_uninstalled_checkout(source: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    package, _ = run(python, "-c", IMPORT_ALL, cwd=source).stdout.split()
    assert Path(package) == source / "fasttrain/__init__.py"


def test_without_a_compiler_the_pure_package_installs_and_says_so_once_at_first_use(
    source: Path, tmp_path: Path
) -> None:
    python = new_environment(tmp_path / "venv")
    done = pip_install(python, source, env={"CXX": "no-such-compiler"})
    assert re.search(
        r"WITHOUT the compiled extension: no C\+\+ compiler \('no-such-compiler'", done.stdout + done.stderr
    )
    code = f"{USE}\nfor _ in range(3): ops.cross_entropy(torch.zeros(2, 8), torch.tensor([0, 1]))"
    assert run(python, "-c", code, cwd=tmp_path).stderr.count("RuntimeWarning") == 1
    assert "extension is not installed" in run(python, "-m", "fasttrain", "doctor", cwd=tmp_path).stdout


def test_a_failing_compiler_is_an_error_only_when_the_build_is_required(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *--version*|*-dump*) exec c++ "$@";; esac\n'
        "echo 'broken-c++: out of cheese' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    python = new_environment(tmp_path / "venv")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = pip_install(python, source, env={"CXX": str(broken), "FASTTRAIN_BUILD": "require", "PATH": path}, ok=False)
    assert done.returncode != 0 and "out of cheese" in done.stdout + done.stderr
    done = pip_install(python, source, env={"CXX": str(broken), "PATH": path})
    assert "WITHOUT the compiled extension" in done.stdout + done.stderr


def test_without_torch_the_build_is_pure_or_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    for mode, code in (("auto", 0), ("require", 1)):
        done = run(
            sys.executable,
            "setup.py",
            "--version",
            cwd=source,
            env={"PYTHONPATH": str(tmp_path), "FASTTRAIN_BUILD": mode},
            ok=False,
        )
        assert done.returncode == code and "torch is not importable" in done.stderr
    done = run(sys.executable, "setup.py", "--version", cwd=source, env={"FASTTRAIN_BUILD": "maybe"}, ok=False)
    assert done.returncode != 0 and "must be auto, require or off" in done.stderr


def test_the_version_is_stated_once_more_in_the_package() -> None:
    import fasttrain

    assert f'version = "{fasttrain.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_importing_costs_little_beyond_torch(tmp_path: Path) -> None:
    """As a ratio: `import torch` takes a second or more, fasttrain's own share stays under a tenth of it."""
    code = "import time, torch; a = time.perf_counter(); import fasttrain; print(time.perf_counter() - a)"
    torch_code = "import time; a = time.perf_counter(); import torch; print(time.perf_counter() - a)"
    env = {"PYTHONPATH": str(ROOT)}
    ours = statistics.median(float(run(sys.executable, "-c", code, cwd=tmp_path, env=env).stdout) for _ in range(3))
    torchs = statistics.median(
        float(run(sys.executable, "-c", torch_code, cwd=tmp_path, env=env).stdout) for _ in range(3)
    )
    assert ours < 0.1 * torchs
