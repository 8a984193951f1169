"""Make a command of a tool's function: its result to stdout, its errors to one line, its outcome to an exit code.

Exit codes: 0 done; 1 a check ran and failed; 2 could not run, nothing written; 130 interrupted, 129 and 143 hung up and terminated.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shared.errors import ToolError, one_line
from shared.machine import GIB, MIB, peak_rss_bytes

# typer carries its own click and exports only BadParameter of its errors; this is the class of all wrong usage.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

OWN_PACKAGES = ("shared", "tools")
INTERRUPTED = 130
INTERRUPTION = "interrupted; what was finished is kept, and nothing half-written"
PLAIN_WIDTH = 140  # columns when the output is no terminal

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file, whatever it is.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Replace the output file if edgepress wrote it and it is out of date.")]
Threads = Annotated[int | None, typer.Option(min=1, max=256, help="Threads of the runtime; default: all CPUs.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the generated samples.")]
ModelName = Annotated[
    str, typer.Option("--model", help="Model card: videoseal, pixelseal, chunkyseal, or a path to your own .toml.")
]

progress_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def run(tool: Callable[..., Any], *, dependencies: str | None = None) -> NoReturn:
    """Run a tool's function as the command of this process, and exit; its dependency set is named after it unless told."""
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # also where a shell had it ignored
        signal.signal(ending, _terminate)
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command(name=tool.__name__)(_with_json_option(tool))
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        sys.exit(1)
    except Exception as error:
        line = _as_line(error, dependencies or tool.__name__.replace("_", "-"))
        if line is None:
            raise
        _fail(line)
    if code == INTERRUPTED:  # also how typer returns Ctrl-C
        _fail(INTERRUPTION, code=INTERRUPTED)
    sys.exit(code or 0)


def _as_line(error: Exception, dependencies: str) -> str | None:
    """Return what a user can act on as one line, None for a programming error."""
    match error:
        case ToolError():
            return str(error)
        case UsageError():
            return f"{error.format_message().rstrip('.')}; see --help"
        case ModuleNotFoundError() if (error.name or "").partition(".")[0] not in OWN_PACKAGES:
            install = f"pip install --constraint constraints.txt --editable '.[{dependencies}]'"
            return f"package {error.name} is not installed; {install}"
        case MemoryError():
            return "out of memory; close other programs or use a larger machine"
        case OSError():
            return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return None


def _with_json_option(tool: Callable[..., Any]) -> Callable[..., None]:
    """Return the tool with `--json` added, printing its result instead of returning it."""

    @functools.wraps(tool)
    def command(*, json_output: bool, **arguments: Any) -> None:
        result = tool(**arguments)
        if json_output:
            sys.stdout.write(to_json(result) + "\n")
        else:
            console = Console(highlight=False, markup=False, emoji=False)
            if not console.is_terminal:
                console.width = PLAIN_WIDTH
            console.print(result)
        sys.stdout.flush()
        if not getattr(result, "ok", True):
            raise typer.Exit(1)

    option = typer.Option("--json", help="Print one JSON object instead of tables.")
    extra = inspect.Parameter("json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    signature = inspect.signature(tool)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), extra], return_annotation=None
    )
    command.__doc__ = _help(tool)
    command.__annotations__ = {**tool.__annotations__, "json_output": extra.annotation}
    command.__annotations__.pop("return", None)
    return command


def _help(tool: Callable[..., Any]) -> str:
    """Return the tool's docstring without its sections for programmers, and the example of its module."""
    text = inspect.getdoc(tool) or ""
    example = re.search(r"^Example:\n +(.+)", inspect.getmodule(tool).__doc__ or "", re.MULTILINE)
    return text.partition("\n\nRaises:")[0] + (f"\n\nExample: {example[1]}" if example else "")


def to_json(result: Any) -> str:
    """Return a result dataclass as one JSON object; NaN is an error, never written."""
    content = dataclasses.asdict(result)
    if hasattr(result, "ok"):
        content["ok"] = result.ok
    return json.dumps(content, default=_plain, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _fail(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(code)


def _terminate(number: int, _: object) -> NoReturn:
    _fail(INTERRUPTION, code=128 + number)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Show a step while it runs, then its duration and the peak memory so far; silent when stderr is no terminal."""
    start = time.monotonic()
    if not progress_console.is_terminal:
        yield
        return
    with progress_console.status(name):
        yield
    peak = max(peak_rss_bytes(), peak_rss_bytes(children=True))
    progress_console.print(f"{time.monotonic() - start:7.1f} s  peak {peak / GIB:5.2f} GiB  {name}")


@contextlib.contextmanager
def byte_progress(name: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with the bytes of each piece; draws a bar when stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda size: progress.update(task, advance=size)


@contextlib.contextmanager
def step_progress(name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Yield a function to be called after each of `total` steps with what to show; draws a bar when stderr is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=done, shown="")
        yield lambda shown: progress.update(task, advance=1, shown=shown)


def warn(message: str) -> None:
    """Print one line on stderr, terminal or not: for what a user must not miss."""
    sys.stderr.write(f"note: {one_line(message)}\n")


def size_text(size_bytes: float) -> str:
    """Return a size in MiB, or in KiB or bytes where that is too coarse."""
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / 1024:.1f} KiB" if abs(size_bytes) >= 1024 else f"{size_bytes:.0f} B"
