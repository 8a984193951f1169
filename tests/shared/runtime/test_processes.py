"""A child that crashes, hangs, or shouts is one error for its parent."""

import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.command.resources import MIB
from shared.runtime.processes import Child, ChildError

HANDLER = """
    import os, time
    import numpy as np
    from shared.command.errors import ToolError

    def handle(message, arrays):
        match message.get("do"):
            case "double":
                print("noise on stdout")
                return {"done": True}, {name: 2 * array for name, array in arrays.items()}
            case "refuse":
                raise ToolError("not this one")
            case "fail":
                raise ValueError("\\nfirst line\\nsecond line")
            case "abort":
                os.write(2, b"the last words\\n")
                os.abort()
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), 9)
            case "hang":
                time.sleep(60)
            case "grow":
                np.ones(100 * 2**20, np.uint8)
                return {}, {}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "pretended_child.py").write_text(textwrap.dedent(HANDLER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ModuleType("pretended_child")


def test_arrays_come_back_with_dtype_and_shape(module: ModuleType) -> None:
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.float32(1.5).reshape(()), "c": np.ones((0, 4))}
    with Child(module, 30) as child:
        for _ in range(2):
            reply, results = child.ask({"do": "double"}, arrays)
            assert reply["done"]
            for name, array in arrays.items():
                np.testing.assert_array_equal(results[name], 2 * array, strict=True)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        ("fail", "^first line second line$"),
        ("abort", "crashed with SIGABRT: the last words"),
        ("exit", "ended with 3"),
        ("kill", "probably out of memory"),
    ],
)
def test_failures_and_crashes_are_one_error(module: ModuleType, do: str, says: str) -> None:
    with Child(module, 30) as child, pytest.raises(ChildError, match=says) as error:
        child.ask({"do": do})
    assert "\n" not in str(error.value)


def test_a_tool_error_of_the_child_is_the_parents(module: ModuleType) -> None:
    with Child(module, 30) as child, pytest.raises(ToolError, match="not this one"):
        child.ask({"do": "refuse"})


def test_a_child_that_hangs_is_ended_in_time(module: ModuleType) -> None:
    start = time.monotonic()
    with Child(module, 1.0) as child, pytest.raises(ChildError, match="no answer within 1 s"):
        child.ask({"do": "hang"})
    assert time.monotonic() - start < 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_a_childs_peak_memory_is_its_own(module: ModuleType) -> None:
    with Child(module, 30) as child:
        child.ask({"do": "double"})
        before = child.peak_rss_bytes
        child.ask({"do": "grow"})
        assert child.peak_rss_bytes - before > 90 * MIB
