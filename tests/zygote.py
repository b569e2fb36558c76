"""Programs that run in a process of their own without importing torch anew: each is forked from an interpreter that has
imported torch and fastlinear and has done nothing else.

For what wants a fresh heap, a crash of its own or a pool that never ran. What the environment decides at the import
wants a fresh interpreter instead.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 120  # that a program may take


def serve() -> str:
    """Forks a process for each line of stdin, and writes its exit code; returns, there, the program that it runs."""
    for line in iter(sys.stdin.readline, ""):
        program, environment, out, error = json.loads(line)
        child = os.fork()
        if child == 0:
            for to, path in enumerate((os.devnull, out, error)):
                os.dup2(os.open(path, os.O_RDWR), to)
            os.environ.clear()
            os.environ.update(environment)
            signal.alarm(SECONDS)
            return str(program)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return ""


@cache
def server() -> "subprocess.Popen[str]":
    """One for each process of tests; it ends with that, by the end of its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python -c program` in today's environment and `environment`, as `subprocess.run` with its output captured."""
    process = server()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, error = (Path(folder, name) for name in ("out", "error"))
        out.touch()
        error.touch()
        request = [program, {**os.environ, **environment}, str(out), str(error)]
        print(json.dumps(request), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(program, code, out.read_text(), error.read_text())


if __name__ == "__main__":
    import fastlinear  # noqa: F401  # what all the programs would begin with; it imports torch

    exec(compile(serve(), "<program>", "exec"), {"__name__": "__main__"})
