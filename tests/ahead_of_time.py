"""Figures of kernels compiled ahead of time. That needs a process in which triton was imported to compile, so a test file is also the program
that makes its figures."""

import json
import os
import subprocess
import sys


def figures_of(file):
    """What `file`, run as a program without Triton's interpreter, prints as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
