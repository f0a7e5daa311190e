"""Damaged ONNX files: each is read or refused with one of our errors, within 5 seconds and in less than 1 GiB (specs/trust.md, section 5).

`ours` are files that ended so; the first others are printed with the seed that makes them again. `slowest` is the longest that one took,
and `peak_bytes` the most that a hundred read by one process took, beside the 0.4 GiB of the packages.
"""

import tempfile
from collections import Counter
from pathlib import Path

from harness import Bench

from graphwright.tests.onnx_cases import cases, model_of
from graphwright.tests.onnx_mutations import mutated, outcomes

SECONDS, BYTES = 5.0, 2**30
ERRORS = {"read", "ArtifactError", "CaptureError", "InputError"}


def main() -> None:
    bench = Bench("fuzz_onnx", peers={})
    sources = [model_of(case).SerializeToString() for case in cases()[::9]]
    counts: Counter[str] = Counter()
    slowest, most = 0.0, 0
    count = 200 if bench.quick else 10_000
    with tempfile.TemporaryDirectory() as name:
        for start in range(0, count, 100):
            files = []
            for seed in range(start, start + 100):
                files.append(Path(name) / f"{seed}.onnx")
                files[-1].write_bytes(mutated(sources[seed % len(sources)], sources, seed))
            for seed, (said, seconds, taken) in enumerate(outcomes(files, SECONDS), start):
                slowest, most = max(slowest, seconds), max(most, taken)
                good = said in ERRORS and seconds <= SECONDS and taken < BYTES
                counts[said if good else "bad"] += 1
                if not good and counts["bad"] <= 20:
                    bench.note(f"seed {seed}: {said} after {seconds:.1f} s, {taken / 2**20:.0f} MiB")
            for file in files:
                file.unlink()
    for kind in sorted({*ERRORS, "bad"}):
        bench.row(f"{count} damaged files", kind, "1", counts[kind], {})
    bench.row(f"{count} damaged files", "slowest", "s", slowest, {})
    bench.row(f"{count} damaged files", "peak_bytes", "B", most, {})
    bench.finish()


if __name__ == "__main__":
    main()
