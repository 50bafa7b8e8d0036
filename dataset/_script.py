"""What the scripts in this folder share: mistakes told in one line, with exit code 2. Standard library only.

`python dataset/x.py` sees this folder and not the root, so the scripts here stand on nothing outside it.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake the user can mend. The message names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a UserError and abbreviations are not guessed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


_OS_REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "check its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call main and leave: with code 0, or with one line and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale cannot show Japanese, the work goes on
    try:
        main()
        print(end="", flush=True)
        sys.exit(0)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        message = str(error)
    except OSError as error:
        remedy = _OS_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        message = (
            f"{error.filename or 'writing'}: {os.strerror(error.errno or 0).lower()}; {remedy}, then run this again"
        )
    except KeyboardInterrupt:
        message = "interrupted; nothing was kept, run the same command again"
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    sys.exit(2)
