"""Process environment of both programs: platform, working directory, encoding, file modes, user, threads."""

from __future__ import annotations

import codecs
import gc
import io
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from reward_service.runtime.errors import ConfigError

#: Modules that Python has on Linux and macOS only.
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
NO_POSIX = (
    f"this program needs Linux or macOS, and this is {sys.platform}; run it there or in a container; "
    "the Python client (reward_service.client) works here"
)
#: Error of pathlib for a user without a home folder.
PATHLIB_NO_HOME = "Could not determine home directory."
NO_HOME = "this user has no home folder to keep downloads in; set the environment variable HOME or HF_HOME"
# As getpass looks for the name of the user.
_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def prepare_process() -> None:
    """Prepare a process for a command: call it first, before torch is imported.

    Raises:
        ConfigError: no command can run here; the message is one line
    """
    _require_posix()
    _require_working_directory()
    configure_openmp()
    _name_user()
    _deny_others_writing()
    _print_any_text()
    if not sys.stderr or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def use_utf8() -> None:
    """Start the program again in Python's UTF-8 mode if the locale has another encoding.

    File names, arguments and output are then UTF-8, as images, prompts and configurations are. It does not
    return if it starts the program again; call it only where the process is the program's own.
    """
    arguments = sys.orig_argv[1:]
    if sys.flags.utf8_mode or "utf8" in sys._xoptions or not arguments or arguments[0] == "-":
        return
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *arguments])


def configure_openmp() -> None:
    """Let OpenMP's idle threads spin for microseconds, then sleep; call it before torch is imported.

    Service and trainer often share cores. Threads that keep spinning slow the other program down by up to
    four times; threads that sleep at once make small operations as slow on two cores as on one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def freeze_objects() -> None:
    """Exclude all objects that exist from later garbage collections; call it once the models are loaded.

    Libraries and models are half a million objects. Each full collection would visit them, and stop all
    threads for a third of a second.
    """
    gc.collect()
    gc.freeze()


def _require_posix() -> None:
    try:
        import fcntl  # noqa: F401 - file locks
    except ImportError:
        raise ConfigError(NO_POSIX) from None


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory does not exist any more ({error.strerror}); change to another: cd"
        ) from None


def _name_user() -> None:
    """Give a user without a name one: torch asks for it, to name a folder of its cache.

    Containers often run as a number that no user of the image has.
    """
    import pwd

    if any(os.environ.get(name) for name in _USER_VARIABLES):
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


def _deny_others_writing() -> None:
    """Let other users write none of the files that this process creates, even if its umask allows it.

    A umask that allows only the group to write is left as it is.
    """
    before = os.umask(stat.S_IWGRP | stat.S_IWOTH)
    if before & stat.S_IWOTH:
        os.umask(before)
    else:
        os.umask(before | stat.S_IWGRP | stat.S_IWOTH)


def _print_any_text() -> None:
    """Make every text printable: file names as their own bytes in UTF-8, with escapes in other encodings."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
