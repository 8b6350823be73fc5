"""Fork one `python -m llavakd` for every line of standard input: the command without its seconds of importing.

A line is {"argv": [...], "out": FILE, "err": FILE}; answers are the process id and, at its end, its exit code.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys

import llavakd.pipeline  # noqa: F401 - what takes so long to import


def become_command(request: dict) -> None:
    """Turn this fresh process into the command: its own process group, its own files, nothing on standard input."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background had turned off
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["llavakd", *request["argv"]]


def main() -> None:
    """Serve until standard input ends; in a child, return at once."""
    gc.freeze()  # what is imported stays shared with the children and out of their collections
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            become_command(json.loads(line))
            return
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


if __name__ == "__main__":
    main()
    try:
        runpy.run_module("llavakd", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # or triton's bindings report what the freeze kept alive as leaks, on standard error
