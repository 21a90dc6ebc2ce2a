"""What all tests share: the platform, the compilation cache, the material beside the repository, the command line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports jax, and inherited by the subprocesses of `run_cli`. The cache saves most of a second run's
# compile time; entries are keyed on the compiled program, so that a stale one is never used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Workers of pytest-xdist share the cores out, before XLA makes a thread for each: two programs on a core of their own
# compile and compute twice what one does on both.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or cores)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Derandomised: a run of the tests says the same every time. No deadline: the first example may compile.
hypothesis.settings.register_profile(
    "atp_jax", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("atp_jax")


def pytest_collection_modifyitems(items):
    """Slow tests first, so that of two workers neither is left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Lets go of the compiled programs of the modules before, once there are many.

    Each program is a handful of memory mappings, of which Linux allows a process 65,530: at the end of the suite XLA's
    next compilation died of it, with a segmentation fault.
    """
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository, which holds the original's data and golden episodes."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the original's data is not here: no folder `shared` beside the repository")
    return path


@pytest.fixture(scope="session")
def run_cli():
    """`run_cli("--config=configs/quickstart.py", ...)` runs `python -m atp_jax` in the repository root.

    Returns the `CompletedProcess` with `returncode`, and `stdout` and `stderr` as text; `env` adds variables.
    """

    def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "atp_jax", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | (env or {}),
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    return run
