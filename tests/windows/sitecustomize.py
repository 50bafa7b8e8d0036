"""Make a process on Linux behave as on Windows, as far as this repository's code can notice it.

With this folder in PYTHONPATH, Python imports this module first, in the child processes too:

- The repository's own modules find no fcntl, resource and other modules of POSIX, but a msvcrt whose `locking` locks
  bytes against all other handles, and a psutil that has peak_wset.
- Their `os` has the name "nt" and lacks what Windows lacks; so does their `signal`, and `select` takes sockets only.
- A file that a process has open or mapped is neither renamed, replaced nor removed (WinError 32), nor is a folder that
  holds one (WinError 5). Links need a privilege (WinError 1314). Nothing is renamed onto a folder.
- exec starts another process and ends this one.
- A folder cannot be opened, nor a name made that Windows refuses, and a file open for reading alone not synced.
- A text file that they open without naming its encoding is an error; libraries get cp932, Japan's.

Libraries see the real modules: they have their own ways on Windows. What differs where no such library is involved
(paths with drives, the console, real signals) is left to real machines.
"""

import builtins
import contextlib
import errno
import io
import os
import select
import shutil
import signal
import stat
import struct
import sys
import types
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NO_MODULES = """
    crypt fcntl grp nis posix pty pwd readline resource spwd syslog termios tty
"""
NOT_IN_OS = """
    chown chroot confstr ctermid fchdir fchown fork forkpty getegid geteuid getgid getgroups getloadavg
    getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg lchown lockf major mkfifo mknod nice
    openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv
    register_at_fork sched_getaffinity sched_yield sendfile setpgid setpriority setsid setuid statvfs sync
    sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid writev O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK
    O_SYNC WNOHANG WIFEXITED EX_USAGE
"""
NOT_IN_SIGNAL = """
    SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIG_BLOCK
    SIG_SETMASK alarm pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait
"""
MISSING = {"os": NOT_IN_OS.split(), "signal": NOT_IN_SIGNAL.split(), "select": ["poll", "epoll"]}
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
F_OFD_SETLK = 37  # from Linux's fcntl.h: a lock of an open file, as LockFile's, and not of a process
real = {name: getattr(os, name) for name in ("open", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync")}
real_import, real_open = builtins.__import__, io.open


# What Windows refuses


def refusal(number: int, path: object, winerror: int) -> OSError:
    error = OSError(
        number, {1314: "A required privilege is not held by the client"}.get(winerror, os.strerror(number)), str(path)
    )
    error.winerror = winerror
    return error


def in_use() -> set[str]:
    """Return the files that the processes of this user have open or mapped, and this process's working directory."""
    found = {os.getcwd()}
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with real_open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as maps:
                found.update(line[line.index("/") :].rstrip("\n") for line in maps if "/" in line)
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                found.add(os.readlink(f"/proc/{process}/fd/{descriptor}"))
        except OSError:  # it has ended, or is of another user
            continue
    return found


@contextlib.contextmanager
def one_call_at_a_time():
    """Let no simulated process open a file between the look who has it open and its end, as a kernel would."""
    descriptor = real["open"](__file__, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def refuse_if_open(path: object) -> None:
    """Raise PermissionError where a file, or one within a folder, is in use."""
    name = os.path.join(os.path.realpath(os.path.dirname(os.fspath(path)) or "."), os.path.basename(os.fspath(path)))
    used = in_use()
    if name in used:
        raise refusal(errno.EACCES, path, 32)
    if os.path.isdir(name) and any(other.startswith(f"{name}/") and os.path.isfile(other) for other in used):
        raise refusal(errno.EACCES, path, 5)


def refuse_bad_name(path: object) -> None:
    name = os.path.basename(os.fsdecode(path))
    is_reserved = name.partition(".")[0].lower() in RESERVED
    if is_reserved or any(c in '<>:"|?*' or c < " " for c in name) or (name.endswith((".", " ")) and name.strip(".")):
        raise refusal(errno.EINVAL, path, 123)


def open_descriptor(path, flags, mode=0o777, *, dir_fd=None):
    if os.path.isdir(path):
        raise refusal(errno.EACCES, path, 5)
    if flags & os.O_CREAT:
        refuse_bad_name(path)
    if flags & os.O_ACCMODE == os.O_RDONLY and os.fspath(path).endswith((".lock", ".readers")):
        flags |= os.O_RDWR  # LockFile locks a file that is open for reading too, but Linux's fcntl none
    with one_call_at_a_time():
        return real["open"](path, flags, mode, dir_fd=dir_fd)


def open_file(file, mode="r", *arguments, **how):
    if not isinstance(file, int) and set(mode) & set("wax"):
        refuse_bad_name(file)
    if "b" not in mode and len(arguments) < 2 and how.get("encoding") in (None, "locale"):
        frame = sys._getframe(1)
        while "pathlib" in frame.f_code.co_filename:
            frame = frame.f_back
        assert not is_ours(frame.f_code.co_filename), f"{file} is opened without an encoding"
        how["encoding"] = "cp932"
    return real_open(file, mode, *arguments, **how)


def replace(path, target, **how):
    refuse_bad_name(target)
    refuse_if_open(path)
    if os.path.isdir(target):
        raise refusal(errno.EACCES, target, 5)
    if os.path.lexists(target):
        refuse_if_open(target)
    real["replace"](path, target)


def rename(path, target, **how):
    if os.path.lexists(target):
        raise refusal(errno.EEXIST, target, 183)
    replace(path, target)


def unlink(path, *, dir_fd=None):
    is_temporary = sys._getframe(1).f_code.co_filename.endswith("tempfile.py")  # on Windows it has a flag for that
    with one_call_at_a_time():
        if os.path.lexists(path) and not is_temporary:
            refuse_if_open(path)
        real["unlink"](path, dir_fd=dir_fd)


def rmdir(path, *, dir_fd=None):
    refuse_if_open(path)
    real["rmdir"](path, dir_fd=dir_fd)


def mkdir(path, mode=0o777, *, dir_fd=None):
    refuse_bad_name(path)
    real["mkdir"](path, mode, dir_fd=dir_fd)


def fsync(descriptor):
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise refusal(errno.EBADF, "", 6)
    real["fsync"](descriptor)


def symlink(source, target, *arguments, **how):
    raise refusal(errno.EINVAL, target, 1314)


def execv(path, arguments):
    os.posix_spawn(path, arguments, os.environ)  # and who waits for this process waits no longer
    os._exit(0)


# The modules that the repository sees


class View(types.ModuleType):
    """A module without some of its names, and with others."""

    def __init__(self, module: types.ModuleType, **other: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(other, _module=module, _missing=set(MISSING[module.__name__]))

    def __getattr__(self, name: str) -> object:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)


def select_sockets(*files):
    if any(
        not stat.S_ISSOCK(os.fstat(f if isinstance(f, int) else f.fileno()).st_mode) for some in files[:3] for f in some
    ):
        raise refusal(errno.ENOTSOCK, "", 10038)
    return select.select(*files)


LK_UNLCK, LK_LOCK, LK_NBLCK = range(3)
held: dict[int, tuple[int, int, int]] = {}  # by descriptor: inode, first byte, number; no handle locks a byte twice


def locking(descriptor: int, mode: int, n_bytes: int) -> None:
    """Lock bytes from the position of an open file on, or unlock just those that were locked."""
    first, inode = os.lseek(descriptor, 0, os.SEEK_CUR), os.fstat(descriptor).st_ino
    mine = held.get(descriptor)
    is_mine = mine is not None and mine[0] == inode  # else the descriptor is another file's by now
    if (mode == LK_UNLCK) != (is_mine and mine == (inode, first, n_bytes)):
        raise refusal(errno.EACCES, "", 158 if mode == LK_UNLCK else 33)
    kind = fcntl.F_UNLCK if mode == LK_UNLCK else fcntl.F_WRLCK
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, first, n_bytes, 0))
    except BlockingIOError:
        raise refusal(errno.EACCES, "", 33)
    held.pop(descriptor, None)
    if mode != LK_UNLCK:
        held[descriptor] = (inode, first, n_bytes)


def module(name: str, **content: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


def is_ours(file: str) -> bool:
    """Return whether a file is of the repository itself."""
    return file.startswith(f"{ROOT}/") and not file.startswith((f"{ROOT}/.venv/", f"{ROOT}/tests/"))


def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if is_ours((globals or {}).get("__file__") or "") and not level:
        if name in NO_MODULES.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in VIEWS:
            return VIEWS[name]
    return real_import(name, globals, locals, fromlist, level)


import fcntl  # noqa: E402

VIEWS = {
    "os": View(os, name="nt"),
    "signal": View(signal, SIGBREAK=signal.SIGUSR1),
    "select": View(select, select=select_sockets),
    "msvcrt": module("msvcrt", locking=locking, LK_UNLCK=LK_UNLCK, LK_LOCK=LK_LOCK, LK_NBLCK=LK_NBLCK),
    "psutil": module("psutil", Process=lambda: types.SimpleNamespace(
        memory_info=lambda: types.SimpleNamespace(peak_wset=123 << 20))),
}  # fmt: skip

for replacement in (replace, rename, unlink, rmdir, mkdir, fsync, symlink, execv):
    setattr(os, replacement.__name__, replacement)
os.remove, os.open = unlink, open_descriptor
builtins.open = io.open = open_file
shutil._use_fd_functions = False
if hasattr(shutil, "_rmtree_unsafe"):
    shutil.rmtree.avoids_symlink_attacks = False
builtins.__import__ = import_as_on_windows
warnings.filterwarnings("ignore", category=EncodingWarning)  # of libraries
warnings.filterwarnings("error", category=EncodingWarning, module=r"gptkit|gpt_model|__main__|_[a-z]+$")
