"""Make a command of a tool's function: its result to stdout, its errors to one line, its outcome to an exit code.

Exit codes: 0 done; 1 a check ran and failed; 2 could not run, nothing written; 130 interrupted, 129 and 143 hung up and terminated.
With `--json` an error is an object too: `{"ok": false, "error": {"what", "where", "got", "expected", "remedy"}}`.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from shared.command.dry_run import DryRun
from shared.command.errors import ToolError, of_disk, one_line
from shared.command.limits import DEFAULTS, raise_limits
from shared.command.resources import GIB, peak_rss_bytes
from shared.command.watchdog import FORWARDED, supervise

# typer carries its own click and exports only BadParameter of its errors; this is the class of all wrong usage.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

OWN_PACKAGES = ("shared", "tools")
INTERRUPTED = 130
LIMIT_HELP = f"Raise a limit on what is read: {', '.join(f'{name}={value:g}' for name, value in DEFAULTS.items())}; repeatable."
INTERRUPTION = "interrupted; what was finished is kept, and nothing half-written"
PLAIN_WIDTH = 140  # columns when the output is no terminal

progress_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def run(tool: Callable[..., Any], *, dependencies: str | None = None) -> NoReturn:
    """Run a tool's function as the command of this process, watched by a parent, and exit.

    Args:
        tool: The function.
        dependencies: Its dependency set; named after it by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    supervise(functools.partial(_run, tool, dependencies or tool.__name__.replace("_", "-")))


def _run(tool: Callable[..., Any], dependencies: str) -> NoReturn:
    for ending in FORWARDED:  # also where a shell had it ignored
        signal.signal(ending, _terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command(name=tool.__name__)(_with_common_options(tool))
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        sys.exit(1)
    except Exception as error:
        if _Ending.number:  # reported already; raised within native code, an interruption comes out as any error
            sys.exit(128 + _Ending.number)
        reported = _as_tool_error(error, dependencies)
        if reported is None:
            raise
        if "--json" in sys.argv[1:]:
            sys.stdout.write(json.dumps({"ok": False, "error": reported.parts}) + "\n")
            sys.stdout.flush()
        _fail(str(reported), code=reported.exit_code)
    if code == INTERRUPTED:  # also how typer returns Ctrl-C
        _fail(INTERRUPTION, code=INTERRUPTED)
    sys.exit(code or 0)


def _as_tool_error(error: Exception, dependencies: str) -> ToolError | None:
    """Return what a user can act on, None for a programming error."""
    reported: ToolError | None = None
    match error:
        case ToolError():
            reported = error
        case UsageError():
            reported = ToolError(error.format_message().rstrip("."), remedy="see --help")
        case ModuleNotFoundError() if (error.name or "").partition(".")[0] not in OWN_PACKAGES:
            install = f"pip install --constraint constraints.txt --editable '.[{dependencies}]'"
            reported = ToolError(f"package {error.name} is not installed", remedy=install)
        case MemoryError():
            reported = ToolError("out of memory", remedy="close other programs or use a larger machine")
        case OSError():
            remedy = "check the path and its permissions"
            reported = ToolError(error.strerror or str(error), where=error.filename or "input or output", remedy=remedy)
    return of_disk(error) or reported


def _with_common_options(tool: Callable[..., Any]) -> Callable[..., None]:
    """Return the tool with `--json` and `--limit` added, printing its result instead of returning it."""

    @functools.wraps(tool)
    def command(*, json_output: bool, raised: list[str] | None, **arguments: Any) -> None:
        raise_limits(raised or [])
        try:
            result = tool(**arguments)
        except DryRun as dry:
            result = dry.result
        if json_output:
            sys.stdout.write(to_json(result) + "\n")
        else:
            console = Console(highlight=False, markup=False, emoji=False)
            if not console.is_terminal:
                console.width = PLAIN_WIDTH
            console.print(result)
        sys.stdout.flush()
        _ignore_endings()  # all is done and reported
        if not getattr(result, "ok", True):
            raise typer.Exit(1)

    common: dict[str, tuple[object, object]] = {
        "json_output": (False, Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]),
        "raised": (None, Annotated[list[str] | None, typer.Option("--limit", metavar="NAME=VALUE", help=LIMIT_HELP)]),
    }
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in common.items()
    ]
    signature = inspect.signature(tool)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra], return_annotation=None
    )
    command.__doc__ = _help(tool)
    command.__annotations__ = {**tool.__annotations__, **{parameter.name: parameter.annotation for parameter in extra}}
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


class _Ending:
    """The signal that ended this process; 0 as long as none did."""

    number: ClassVar[int] = 0


def _terminate(number: int, _: object) -> NoReturn:
    _Ending.number = number
    _ignore_endings()  # what was begun is cleared away now, and that once
    _fail(INTERRUPTION, code=128 + number)


def _ignore_endings() -> None:
    for ending in FORWARDED:
        signal.signal(ending, signal.SIG_IGN)


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
