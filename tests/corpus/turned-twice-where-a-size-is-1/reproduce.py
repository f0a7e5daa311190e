"""Runs this trial again: python reproduce.py"""

from pathlib import Path

from graphwright.testing.cases import load_case

case = load_case(Path(__file__).parent)
print(case.program)
print(case.pipeline)
print(case.run().verdict)
