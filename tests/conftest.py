"""One thread per process, no network, and a cache of the test session's own, which its processes share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hosts import Hosts, NoHostsError, two_hosts

# a slow machine is no fault of what is tested
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# a shell starts jobs in the background deaf to Ctrl-C, and so are their children: tests send it to some
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("TP_PLAN_CACHE")
    own = tmp_path_factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    os.environ["TP_PLAN_CACHE"] = str(session / "cache")
    yield
    if before is None:
        del os.environ["TP_PLAN_CACHE"]
    else:
        os.environ["TP_PLAN_CACHE"] = before


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def slow_hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts joined at the rate of the test's parameter, in Mbit/s; without root the test is skipped."""
    try:
        with two_hosts(request.param) as hosts:
            yield hosts
    except NoHostsError as error:
        pytest.skip(str(error))
