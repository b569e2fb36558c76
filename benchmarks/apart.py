"""An object in a process of its own, so that pools of threads never meet: `serve` makes one there, Apart calls it here.

Commands come by stdin and answers go by stdout, a line of JSON each: [method, *arguments].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def serve(make: Callable[[], object]) -> None:
    """Calls methods of what `make` makes until nobody asks any more. Whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = make()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(served, method)(*arguments)), file=answers, flush=True)


class Apart:
    """The other end of a process that serves."""

    def __init__(self, command: Sequence[str | Path], name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        with self._process:  # closes its stdin, which ends it
            pass

    def ask(self, *command: Any) -> Any:
        """The answer of a method; RuntimeError naming the process that ended instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        print(json.dumps(command), file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended, asked for {command[0]}; its last words are above")
        return json.loads(line)
