"""Programs that run in a process of their own without importing torch anew: each is forked from an interpreter that has
imported torch, or fastlinear, or other modules, and has done nothing else.

For what wants a fresh heap, a crash of its own or a pool that never ran; with `imported="torch"` also for what the
environment tells fastlinear at its import. What it tells torch wants a fresh interpreter instead.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

SECONDS = 120  # that a program may take


def serve(modules: str) -> str:
    """Imports them, forks a process for each line of stdin, and writes its exit code; returns, there, the program that
    it runs."""
    for module in modules.split(","):
        importlib.import_module(module)
    for line in iter(sys.stdin.readline, ""):
        program, arguments, environment, out, error = json.loads(line)
        child = os.fork()
        if child == 0:
            for to, path in enumerate((os.devnull, out, error)):
                os.dup2(os.open(path, os.O_RDWR), to)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["-c", *arguments]
            signal.alarm(SECONDS)
            return str(program)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return ""


@cache
def first() -> "subprocess.Popen[str]":
    """The server that has torch: one for each process of tests; it ends with that, by the end of its input."""
    return subprocess.Popen(
        [sys.executable, __file__, "torch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


_FURTHER = """
import os, sys, zygote
if os.fork():
    os._exit(0)
for to, mode, path in zip((0, 1), (os.O_RDONLY, os.O_WRONLY), sys.argv[1:]):
    pipe = os.open(path, mode)
    os.dup2(pipe, to)
    os.close(pipe)
exec(compile(zygote.serve(sys.argv[3]), "<program>", "exec"), {"__name__": "__main__"})
"""


@cache
def server(imported: str) -> tuple[IO[str], IO[str]]:
    """Where it reads and where it answers. Those with more modules are forked from the first, which spares them the
    seconds that torch takes."""
    if imported == "torch":
        process = first()
        assert process.stdin is not None and process.stdout is not None
        return process.stdin, process.stdout
    with tempfile.TemporaryDirectory() as folder:
        pipes = [os.path.join(folder, name) for name in ("requests", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        checked(_FURTHER, *pipes, imported, imported="torch")
        return open(pipes[0], "w"), open(pipes[1])  # each waits until it is opened there


def run(
    program: str, *arguments: str, imported: str = "fastlinear", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """`python -c program arguments` in today's environment and `environment`, as `subprocess.run` with its output
    captured. imported: the modules that are there already, with commas between."""
    requests, answers = server(imported)
    with tempfile.TemporaryDirectory() as folder:
        out, error = (Path(folder, name) for name in ("out", "error"))
        out.touch()
        error.touch()
        request = [program, arguments, {**os.environ, **environment}, str(out), str(error)]
        print(json.dumps(request), file=requests, flush=True)
        code = int(answers.readline())
        return subprocess.CompletedProcess(program, code, out.read_text(), error.read_text())


def checked(program: str, *arguments: str, imported: str = "torch", **environment: str) -> str:
    """What such a program prints; AssertionError unless it ends well."""
    done = run(program, *arguments, imported=imported, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    exec(compile(serve(sys.argv[1]), "<program>", "exec"), {"__name__": "__main__"})
