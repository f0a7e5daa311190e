"""What holds for every test: the checkout root is never imported as a package of another name, and no test has a deadline."""

import gc
import os
import uuid
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton settles when it is first imported whether it compiles or interprets, and some test may import it through torch. What compiles
# for GPUs runs in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# A first call may compile for seconds, so a deadline would be a timing assertion. The blob reproduces a failure.
hypothesis.settings.register_profile("graphwright", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("graphwright")


def pytest_collection_finish():
    """The garbage collector has nothing to look for among what importing made, and little in what tests share: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)


@pytest.fixture
def one_thread():
    """For tensors of a few elements: threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_threads():
    """A test leaves as many threads as it found: one more made every test behind it take up to twenty times as long, on one core each."""
    threads = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == threads, f"{left} threads are left, where {threads} were found"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Each test has a cache of its own: one that patches a pass would otherwise find results of the pass that it patched. Compiled kernels
    alone, which depend on nothing but their source, go from one to the next, in all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    cache, shared = base / f"cache-{uuid.uuid4().hex}", (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(cache))
    monkeypatch.setenv("GRAPHWRIGHT_TEST_KERNELS", str(shared))
    link_kernels(shared, cache / "native")
    yield
    link_kernels(cache / "native", shared)


def link_kernels(source: Path, to: Path) -> None:
    """Entries of `source` that `to` has not."""
    for entry in source.glob("[0-9a-f]*"):
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(entry, to / entry.name)


@pytest.fixture
def cache(tmp_path):
    """A cache of its own."""
    from graphwright.runtime.cache import Cache

    return Cache(tmp_path / "cache")


@pytest.fixture
def ways(monkeypatch):
    """The questions that are asked of the probe, by kind: the ways of each. The last way wins."""
    from graphwright.runtime.probe import Probe

    asked = []
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: asked.append((kind, list(ways))) or list(ways)[-1])
    return asked


@pytest.fixture(scope="session")
def exported_decoder(tmp_path_factory):
    """A decoder of one layer with its functions `prefill` and `decode` as ONNX models."""
    from graphwright.tests.onnx_models import ExportedDecoder

    return ExportedDecoder.made(tmp_path_factory.mktemp("exported_decoder"))


class RootIsAFolder:
    """The root's __init__.py makes pytest import the root as a package named after the clone's folder: all of
    graphwright, and its op registrations, a second time. To pytest the root is a plain folder."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # Registered as a plugin, because a conftest's own hooks are not asked about the folders above it.
    config.pluginmanager.register(RootIsAFolder())
