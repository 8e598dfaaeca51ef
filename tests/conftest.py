"""Fixtures of every test: the device at hand, fixed seeds, the two paths of the dropout mask."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import end_workers
from short_digits import examples, shorts, streams  # noqa: F401

from clora_kernels import extension

# Without a GPU the Triton kernels run under Triton's interpreter, which must be known before they are decorated. What
# compiles them does so in a process of its own, without this.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tables that were measured on this machine decide nothing in a test, nor in what it starts.
os.environ["CLORA_TABLES"] = os.path.join(os.path.dirname(__file__), "no-tables")

# Derandomised: a failure belongs to the commit that shows it. `--hypothesis-profile=search` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.register_profile(
    "search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("repeatable")


def pytest_sessionfinish() -> None:
    end_workers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the tests run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _cuda_context() -> None:
    """A CUDA context for the thread of autograd, which the first kernel that torch launches there brings. cuBLAS, if it
    comes first, warns that there is none."""
    if torch.cuda.is_available():
        x = torch.ones(1, device="cuda", requires_grad=True)
        (x * x).backward()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20250217)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small tensors lose more to threads than they win, the more so beside other work. See ``all_threads``."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "all_threads" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_syncs() -> Callable[[], AbstractContextManager[None]]:
    """A block in which it is an error that the host waits for the GPU."""

    @contextmanager
    def block() -> Iterator[None]:
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return block


@pytest.fixture
def all_threads() -> int:
    """Runs a test on all of torch's threads; their number."""
    return torch.get_num_threads()


@pytest.fixture(params=["compiled", "plain"])
def mask_path(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the compiled operators and on plain PyTorch alone, as where nothing is compiled."""
    if request.param == "plain":
        monkeypatch.setattr(extension, "has_op", lambda name, device_type: False)
        monkeypatch.setattr(extension, "_warned", {"dropout_mask", "routed_lora", "gram_schmidt", "rank1_experts"})
    elif not extension.has_op("dropout_mask", device.type):
        pytest.skip(f"the dropout mask is not compiled for {device.type}: {extension.status()}")
    return request.param


@pytest.fixture
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the Triton kernels of routed LoRA run with the given tiles, whatever the call."""
    from clora_kernels.kernels.routed_lora import tiles

    def use(linear: Any = None, shrink: Any = None, reduce: Any = None) -> None:
        chosen, before = {"linear": linear, "shrink": shrink, "reduce": reduce}, tiles.default
        monkeypatch.setattr(tiles, "default", lambda key: chosen[key.op] or before(key))

    return use


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """What was compiled before counts for nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
