"""What progress bars say while jax compiles."""

from __future__ import annotations

import threading
import time

import jax
import pytest

from mdsens._util import progress
from mdsens._util.progress import COMPILED, LOWERED, Decades


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    monkeypatch.setattr(progress, "INTERVAL", 0.02)


def says(bar: Decades, text: str) -> bool:
    """Whether the bar says a text, within some seconds."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        if bar.bar.desc == text:
            return True
        time.sleep(0.01)
    return False


def test_a_bar_says_that_a_program_is_compiled_and_then_its_name():
    with Decades(True) as bar:
        jax.monitoring.record_event_duration_secs(LOWERED, 0.1)
        assert says(bar, "compiling")
        jax.monitoring.record_event_duration_secs(COMPILED, 0.1)
        assert bar.bar.desc == "relaxing"
        # another compilation that never ends, as where the compiler raises
        jax.monitoring.record_event_duration_secs(LOWERED, 0.1)
        assert says(bar, "compiling")
    assert not progress._shown and bar._announcer is None


def test_what_another_thread_compiles_is_no_matter():
    with Decades(True) as bar:
        event = jax.monitoring.record_event_duration_secs
        other = threading.Thread(target=event, args=(LOWERED, 0.1))
        other.start()
        other.join()
        assert bar._announcer is None and bar.bar.desc == "relaxing"


def test_a_real_compilation_is_seen_where_it_lasts():
    said = []

    class Watched(Decades):
        def begin_compiling(self) -> None:
            said.append("begins")
            super().begin_compiling()

        def end_compiling(self) -> None:
            said.append("ends")
            super().end_compiling()

    with Watched(True):
        jax.jit(lambda x: jax.numpy.sin(x) ** 3)(jax.numpy.ones(11))
    assert said.index("begins") < len(said) - 1 - said[::-1].index("ends")
    assert not progress._shown


def test_no_bar_no_thread():
    before = threading.active_count()
    with Decades(False) as bar:
        jax.monitoring.record_event_duration_secs(LOWERED, 0.1)
        assert threading.active_count() == before and bar._announcer is None
