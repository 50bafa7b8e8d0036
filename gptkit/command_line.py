"""Command lines from dataclasses, and mistakes told in one line.

A command's settings are the fields of one dataclass; each field becomes one flag, so that help text,
saved config and code cannot drift apart. A user's mistake is a UserError: one line, exit code 2.
"""

import argparse
import dataclasses
import difflib
import errno
import io
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

EXIT_USER_ERROR = 2
Config = TypeVar("Config")


class UserError(Exception):
    """A mistake the user can mend. The message names the value and the remedy."""


def first_line(error: BaseException) -> str:
    """Of what an error says, for a message of one line."""
    return str(error).strip().partition("\n")[0]


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field that is also a flag. Without a default the flag must be given; bounds are checked by parse."""
    metadata = {"help": help, "at_least": at_least, "more_than": more_than, "at_most": at_most}
    return dataclasses.field(default=default, metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += "; a value that begins with - is given as --flag=value"
        raise UserError(f"{message} (--help lists the flags)")


def parse(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """The settings that `arguments` (default: the command line) ask for.

    Fields may be bool, int, float, str, a Literal of strings, or one of these `| None`; or tuple[str, ...].
    Raises UserError for an unknown flag, a value of the wrong type or one out of its bounds.
    """
    parser = _OneLineParser(description=config_class.__doc__, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(typing.cast(Any, config_class))
    for field in fields:
        kind = _without_none(hints[field.name])
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "required": required}
        if not required:
            options["default"] = field.default
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": str, "metavar": "TEXT"}
        else:
            options["type"] = kind
            options["metavar"] = kind.__name__.upper()
        if field.default not in (dataclasses.MISSING, None, ()) and kind is not bool:
            options["help"] += f" (default: {str(field.default).replace('%', '%%')})"
        parser.add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(arguments)).items()
    config = config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})
    check_bounds(config)
    return config


def check_bounds(config: Any) -> None:
    """Raise UserError where a number among the settings is out of its bounds."""
    for field in dataclasses.fields(config):
        _check_bounds(field, getattr(config, field.name))


def changed(config: Config, name: str, value: str) -> Config:
    """The settings, of which none is required, with one given anew as its flag would be; "none" where it may be left out.

    Raises UserError.
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


def run_command(config_class: type[Config], main: Callable[[Config], int | None]) -> NoReturn:
    """Parse the command line, call main, and leave: with main's code, or with one line and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale cannot show Japanese, a run goes on
    try:
        code = main(parse(config_class)) or 0
        print(end="", flush=True)  # a full disk shows here, where it can be told, and not while the interpreter ends
        sys.exit(code)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        _flush_or_drop_output()
        sys.exit(1)
    except OSError as error:
        remedy = _OS_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        message = f"{error.filename or 'writing'}: {os.strerror(error.errno or 0).lower()}; {remedy}"
        _flush_or_drop_output()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _flush_or_drop_output() -> None:
    """Write what standard output still holds; what cannot be written is dropped, or the interpreter's end trips on it."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_OS_REMEDIES = {
    errno.ENOSPC: "make room on the disk and run the same command again",
    errno.EDQUOT: "make room in the quota and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def existing_path(path: str, flag: str) -> Path:
    """`path`, which must exist. Raises UserError naming the path that was probably meant."""
    found = Path(path)
    if found.exists():
        return found
    likely = likely_path(found)
    hint = f"; did you mean {likely}?" if likely else f" (looked from {Path.cwd()})"
    raise UserError(f"{flag} {path}: no such file or folder{hint}")


def hub_folder(name: str, flag: str, patterns: list[str]) -> Path:
    """The folder that `flag` names, or where huggingface_hub keeps those files of a repository. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{flag} {name} is a file; name the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        near = likely_path(Path(name))
        remedy = f"did you mean {near}?" if near else "give a folder, or a name on the hub"
        raise UserError(f"{flag} {name}: no such folder; {remedy}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{flag} {name} is neither a folder nor a repository of the Hugging Face hub (or it is a private one)"
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{flag} {name}: the Hugging Face hub cannot be reached ({type(error).__name__}); connect to the"
            " network once, or give a folder"
        )


def likely_path(path: Path) -> Path | None:
    """The existing path that differs from `path` only by leading `..`, or by a small slip in its last name."""
    if path.is_absolute():
        candidates = []
    else:
        inner = Path(*[part for part in path.parts if part != ".."])
        candidates = [Path("../" * ups) / inner for ups in range(4) if inner.parts]
    for candidate in candidates:
        if candidate != path and candidate.exists():
            return candidate
    for candidate in [path, *candidates]:
        if candidate.parent.is_dir():
            close = difflib.get_close_matches(candidate.name, os.listdir(candidate.parent), n=1)
            if close:
                return candidate.parent / close[0]
    return None
