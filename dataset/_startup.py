"""Prepare the process of a script before its imports, as gptkit/base/startup.py does for the commands."""

import os
import signal


def prepare_process() -> None:
    """Let Ctrl-C end the imports without a traceback, and open the standard streams that are closed.

    What runs the command gives Ctrl-C its usual meaning back. A file that is opened while a standard stream is closed
    (`>&-`) would get its descriptor, and whatever a library prints there.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell, or nohup, has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free descriptor
