"""Candidates are measured in processes that end with the tool, or on a Dask cluster that is there."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.command.resources import cpu_count
from shared.runtime import executors
from shared.runtime.executors import choose_executor, dask_cluster, local_processes
from tests.conftest import ROOT


def test_local_processes_are_as_many_as_cpus_and_end_with_the_block() -> None:
    with local_processes() as executor:
        assert executor._max_workers == cpu_count()  # type: ignore[attr-defined]
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
        workers = list(executor._processes.values())  # type: ignore[attr-defined]
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_workers_do_not_outlive_a_killed_tool(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal
        from shared.runtime.executors import local_processes
        if __name__ == "__main__":
            with local_processes() as executor:
                print(executor.submit(os.getpid).result(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    worker = Path("/proc") / done.stdout.strip()
    assert worker.name.isdigit()
    deadline = time.monotonic() + 10
    while worker.exists() and "(zombie)" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or "(zombie)" in (worker / "status").read_text()


def test_a_dask_cluster_without_workers_is_an_error() -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(ToolError, match="has no workers"),
        dask_cluster(cluster.scheduler_address),
    ):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://127.0.0.1:8786", "no such host:80", "127.0.0.1"])
def test_nobody_at_the_address_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(ToolError, match=re.escape(f"{address}: no Dask scheduler answers")) as caught, dask_cluster(address):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_else_is_printed_where_nobody_answers() -> None:
    script = """
        from shared.runtime import executors
        from shared.command.errors import ToolError
        executors.CONNECT_TIMEOUT_S = 1
        try:
            with executors.dask_cluster("tcp://127.0.0.1:1"):
                pass
        except ToolError:
            print("reported")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("reported\n", "")


def test_memory_limits_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "cpu_count", lambda: 8)
    for available, job_bytes, workers in ((100, 30, 3), (100, 1000, 1), (100, 0, 8), (None, 30, 8)):
        monkeypatch.setattr(executors, "available_memory_bytes", lambda available=available: available)
        with local_processes(job_bytes) as executor:
            assert executor._max_workers == workers  # type: ignore[attr-defined]


def test_without_an_address_this_machine_measures() -> None:
    assert choose_executor(None) is local_processes
    with pytest.raises(ToolError, match="nonsense: no Dask scheduler answers"), choose_executor("nonsense")(1):
        pass
