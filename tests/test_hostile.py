"""Names and strings in files of each kind are data: what reads and runs the files executes, imports, starts and writes nothing.

`bench/hostile.py` damages thousands of files; the tests of each format have cases by hand."""

import json
import subprocess
import sys

from graphwright.tests.payloads import PAYLOADS, WATCHED, write_payloads


def test_names_and_strings_that_are_code_are_never_run(tmp_path):
    files = write_payloads(tmp_path)
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, files)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["events"] == [] and said["left"] == []
    assert len(PAYLOADS) >= 50 and said["run"] == len(files), "each is a name like any other"
