"""Settings that have to stand before JAX starts: eight CPU devices, one BLAS thread, compiled programs."""

import atexit
import os
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Every test makes its own functions, so that programs come back that were compiled before. They are shared
# by the workers of one run, which inherit the variable; what a test starts compiles as a user's script.
PROGRAMS = "MFAC_JAX_TESTS_PROGRAMS"
if PROGRAMS not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="mfac_jax-tests-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ[PROGRAMS] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

MINUTES = 7  # of processor time; what would take more than 8 in all is marked slow


def pytest_report_header(config: pytest.Config) -> str | None:
    """How long a default run takes."""
    if config.option.markexpr == "not slow":
        return f"default suite: about {MINUTES} minutes of processor time; longer checks: make slow"
    return None


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Compiled programs would add up to gigabytes in a worker; what comes again is read from the folder."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Python's floats are float64 on the device."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch):
    """The functions that are chosen for CUDA run on the CPU that is here."""

    def chosen(*operands, default, cuda=None, **of_other_platforms):
        return (cuda or default)(*operands)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    yield
    jax.clear_caches()
