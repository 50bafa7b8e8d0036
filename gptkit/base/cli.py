"""Make command lines from dataclasses, report a user's mistakes in one line, show progress bars.

A command's settings are the fields of one dataclass; each field becomes one flag, so that help text,
saved config and code cannot drift apart. A user's mistake is a UserError: one line, exit code 2.
"""

import argparse
import contextlib
import dataclasses
import errno
import math
import multiprocessing
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from gptkit.base import streams

EXIT_USER_ERROR = 2
_skips_destructors = False  # see skip_destructors
Config = TypeVar("Config")


class UserError(Exception):
    """A mistake that the user can correct. The message names the value and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def one_line(error: BaseException, max_chars: int | None = None) -> str:
    """Return all lines of an error's message joined into one, or the name of its class where it has no message.

    With `max_chars`, the line is cut to so many characters.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:max_chars]


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
    choices: Collection[str] | None = None,
    group: str | None = None,
    is_text: bool = False,
) -> Any:
    """Declare a dataclass field that is also a flag.

    Without a default the flag is required. `parse` checks the bounds, and that a string is one of `choices`: a registry
    (any mapping by name) is read when a command line is parsed, not when the field is declared. --help lists the flags
    of a group together. A string that is text is read as UTF-8 in any locale; a path must stay as the system gave it.
    """
    bounds = {"at_least": at_least, "more_than": more_than, "at_most": at_most, "less_than": less_than}
    metadata = {"help": help, "choices": choices, "group": group, "is_text": is_text, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += "; a value that begins with - is given as --flag=value"
        raise UserError(f"{message} (--help lists the flags)")


def utf8_text(argument: str) -> str:
    """Return an argument as the UTF-8 that its bytes are, also where the locale (LC_ALL=C) could not read them."""
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeError:  # the bytes are not UTF-8; who uses the text reports that
        return argument


def parse(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Parse `arguments` (default: the command line) into the settings.

    Fields may be bool, int, float, str, a Literal of strings, or one of these `| None`; or tuple[str, ...].
    Raises UserError for an unknown flag, a value of the wrong type or one out of its bounds.
    """
    parser = _OneLineParser(description=config_class.__doc__, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(typing.cast(Any, config_class))
    groups: dict[str | None, Any] = {None: parser}
    for field in fields:
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = _without_none(hints[field.name])
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "required": required}
        if not required:
            options["default"] = field.default
        if field.metadata["choices"] is not None:
            options["choices"] = tuple(field.metadata["choices"])
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": utf8_text if field.metadata["is_text"] else str, "metavar": "TEXT"}
        else:
            options["type"] = utf8_text if field.metadata["is_text"] else kind
            options["metavar"] = kind.__name__.upper()
        if field.default not in (dataclasses.MISSING, None, ()) and kind is not bool:
            options["help"] += f" (default: {str(field.default).replace('%', '%%')})"
        groups[group].add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(arguments)).items()
    if arguments is None:  # a command begins
        _warned_of.clear()
    config = config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})
    check_bounds(config)
    return config


def check_bounds(config: Any) -> None:
    """Raise UserError where a number among the settings is out of its bounds."""
    for field in dataclasses.fields(config):
        _check_bounds(field, getattr(config, field.name))


def as_flag(name: str, value: Any) -> str:
    """Return the argument that gives a setting this value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def replace_setting(config: Config, name: str, value: str) -> Config:
    """Return a copy of the settings with one replaced, from the text that its flag would take.

    "none" stands for None where the flag may be left out. No field may be required. Raises UserError.
    """
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        raise UserError(f"there is no setting {name}; there are {', '.join(hints)}")
    given: Any = None
    if value.lower() != "none" or _without_none(hints[name]) is hints[name]:
        given = getattr(parse(type(config), [f"--{name}={value}"]), name)
    return dataclasses.replace(typing.cast(Any, config), **{name: given})


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _check_bounds(field: dataclasses.Field[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    bounds = field.metadata
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{field.name} {value} is not a finite number")
    if bounds["at_least"] is not None and value < bounds["at_least"]:
        raise UserError(f"--{field.name} {value} is too small; it must be at least {bounds['at_least']}")
    if bounds["more_than"] is not None and value <= bounds["more_than"]:
        raise UserError(f"--{field.name} {value} is too small; it must be more than {bounds['more_than']}")
    if bounds["at_most"] is not None and value > bounds["at_most"]:
        raise UserError(f"--{field.name} {value} is too large; it must be at most {bounds['at_most']}")
    if bounds["less_than"] is not None and value >= bounds["less_than"]:
        raise UserError(f"--{field.name} {value} is too large; it must be less than {bounds['less_than']}")


def run_command(
    config_class: type[Config], main: Callable[[Config], int | None], *, prints_its_work: bool = False
) -> NoReturn:
    """Parse the command line, call main, and exit: with main's code, or with one line and code 2.

    A line that cannot be printed ends a command only where `prints_its_work`: it then has nothing else to do.
    """
    code = _exit_code(config_class, main, prints_its_work)
    if _skips_destructors:
        _flush_or_drop_output()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def skip_destructors() -> None:
    """Let run_command end this process without the destructors of its libraries.

    For a library whose threads outlive its shutdown: what they use while it is destroyed aborts the process.
    """
    global _skips_destructors
    _skips_destructors = True


def _exit_code(config_class: type[Config], main: Callable[[Config], int | None], prints_its_work: bool) -> int:
    streams.replace_streams(standard_output=not prints_its_work)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # prepare_process had taken it away
        code = main(parse(config_class)) or 0
        print(end="", flush=True)  # report a full disk here, since the interpreter could not at its exit
        return code
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        _flush_or_drop_output()
        return 0
    except OSError as error:
        remedy = _os_remedy(error)
        if remedy is None:
            raise
        message = f"{error.filename or 'writing'}: {os.strerror(error.errno or 0).lower()}; {remedy}"
        _flush_or_drop_output()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    return EXIT_USER_ERROR


def _flush_or_drop_output() -> None:
    """Write what standard output still holds; drop what cannot be written, or the interpreter fails on it at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _os_remedy(error: OSError) -> str | None:
    """Return what a user can do about an error of the system, or None where it is not known to be theirs."""
    if error.errno == errno.ENOSPC and os.path.realpath(str(error.filename)).startswith("/dev/shm"):
        return SHARED_MEMORY_REMEDY
    if getattr(error, "winerror", None) == 32:  # ERROR_SHARING_VIOLATION
        return "another program has it open; close that and run the same command again"
    return _OS_REMEDIES.get(error.errno or 0)


# /dev/shm is memory: what processes share lies there, and in a container it has 64 MB.
SHARED_MEMORY_REMEDY = "make room in /dev/shm (df -h /dev/shm; docker run --shm-size=2g gives a container more)"
_OS_REMEDIES = {
    errno.ENOSPC: "make room on the disk and run the same command again",
    errno.EDQUOT: "make room in the quota and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "this is a folder where a file is needed; choose another",
    errno.EEXIST: "another command has just made it; run the same command again when that has ended",
    errno.ENOTEMPTY: "another command has just written there; run the same command again when that has ended",
    errno.ESTALE: "the network drive has lost it; run the same command again",
    errno.EIO: "the disk, the network drive or the terminal fails; run the same command again where it works",
    errno.ENOSYS: "this file system cannot do that; choose a folder on a local disk",
    errno.EOPNOTSUPP: "this file system cannot do that; choose a folder on a local disk",
    errno.EXDEV: "this file system cannot do that; choose a folder on a local disk",
}


QUIET_S = 60  # without a terminal, no silence is longer than this (or than a step)


def format_duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, such as 1:02:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


@contextlib.contextmanager
def progress_bar(total: int, unit: str, what: str) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error: a bar on a terminal, elsewhere a line every QUIET_S seconds and at the end.

    Yields a function to call with each number of units just done.
    """
    from tqdm import tqdm

    start = printed_at = time.monotonic()
    n_done = 0

    def update(n_new: int) -> None:
        nonlocal n_done, printed_at
        n_done += n_new
        bar.update(n_new)
        if n_done == total or time.monotonic() - printed_at > QUIET_S:
            printed_at = time.monotonic()
            rate = n_done / max(printed_at - start, 1e-9)
            eta = format_duration((total - n_done) / rate)
            line = f"{n_done:,} of {total:,} {unit}s, {rate:,.1f} {unit}s/s, ETA {eta}"
            if bar.disable:
                print(line, file=sys.stderr, flush=True)
            else:
                streams.log_line(line)

    with tqdm(total=total, unit=unit, unit_scale=True, desc=what, disable=not sys.stderr.isatty()) as bar:
        yield update


_warned_of: dict[str, str] = {}  # the warnings of this command, by kind


def warn_once(kind: str, message: str) -> None:
    """Print a warning in one line on standard error, clear of a progress bar, unless this command gave one of its kind.

    The worker processes of a command leave it to the command itself.
    """
    if kind not in _warned_of and multiprocessing.parent_process() is None:
        _warned_of[kind] = message
        _write_line(f"warning: {message}", sys.stderr)


def warnings_given() -> list[str]:
    """Return the messages of warn_once that this command printed."""
    return list(_warned_of.values())


def print_line(text: str) -> None:
    """Print a line (or several) on standard output, clear of a progress bar."""
    _write_line(text, sys.stdout)


def _write_line(text: str, stream: Any) -> None:
    """Write a line clear of a progress bar; before tqdm is imported, or installed by quickstart.py, there is none."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, stream)
    else:
        stream.write(f"{text}\n")
    stream.flush()
