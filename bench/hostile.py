"""Hostile files other than ONNX (`bench/fuzz_onnx.py` has those): what reading each ends in (specs/trust.md, section 5).

    texts       programs some of whose tokens, lines or bytes are other ones: a program, or one of our errors
    operators   calls of any operator of the vocabulary with operands that seldom fit: a program, or one of our errors
    forged      artifacts one of whose members is damaged, with digests that fit: a model, or one of our errors
    tampered    artifacts with bits flipped, cut off, or with members left out, added, swapped or doubled: refused, each
    entries     entries of the cache with bits flipped or cut off: a miss, each
    payloads    programs whose names and strings are code, as text, artifact and ONNX: read and run while the interpreter's audit hook
                counts what executes or compiles code, imports, unpickles, starts processes, opens sockets or writes files

`bad` are files that ended otherwise, took over 5 seconds of a processor or over 1 GiB; `events` what the hook saw. Both should be 0.

    python bench/hostile.py [--quick] [--only TEXT] [--json FILE]
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import Bench

import graphwright as gw
from graphwright.ir.calls import operator_names, target_of
from graphwright.runtime.cache import Cache
from graphwright.tests.forged import members_of, packed
from graphwright.tests.onnx_mutations import outcomes, with_wrong_bytes
from graphwright.tests.payloads import PAYLOADS, WATCHED, write_payloads

SECONDS, BYTES, BATCH = 5.0, 2**30, 100
ERRORS = {"read", "ArtifactError", "ParseError", "VerifyError", "InputError", "Mistake"}
CORPUS = Path(__file__).resolve().parent.parent / "tests" / "corpus"
_ODD = ("0", "-1", "7", str(2**63 - 1), "nan", "none", "true", "[]", "[0, 0]", "%x", "@w", '"a"', "f64", "\0", "units=0", "sym.pow", "{")


def main() -> None:
    bench = Bench("hostile", {}, add_arguments=lambda parser: parser.add_argument("--only", default="", help="only such sections"))
    for section in (texts, operators, forged, tampered, entries, payloads):
        if bench.options.only in section.__name__:
            section(bench)
            bench.save()
    bench.finish()


def programs() -> list[str]:
    """Texts of what the IR has: products, regions, states, several functions, low bits, past failures."""
    decoder = gw.models.load("decoder", "tiny")[0]
    unet, unet_args, unet_kwargs = gw.models.load("video_unet", "tiny")
    vit, vit_args, _ = gw.models.load("vit", "tiny")
    made = [
        gw.compile(vit, example_inputs=vit_args, backend="aten").program,
        gw.compile(unet, [gw.SliceGroups()], example_inputs=unet_args, example_kwargs=unet_kwargs, backend="aten").program,
        gw.compile(vit, [gw.AbsorbOutliers(min_numel=256, rank=4)], example_inputs=vit_args, backend="aten").program,
        gw.compile_decoder(decoder).program,
    ]
    return [*map(str, made), *(path.read_text() for path in sorted(CORPUS.glob("*/program.txt")))]


def texts(bench: Bench) -> None:
    sources = [text for text in programs() if len(text) < 60_000]
    _read(bench, "texts", ".txt", 10_000, lambda seed: _damaged_text(sources, random.Random(seed)))


def _damaged_text(sources: Sequence[str], draw: random.Random) -> bytes:
    text = draw.choice(sources)
    if draw.random() < 0.2:
        return with_wrong_bytes(text.encode(), [each.encode() for each in sources], draw)
    for _ in range(draw.randint(1, 3)):
        by_line = draw.random() < 0.3
        pieces = text.splitlines(keepends=True) if by_line else re.findall(r'"[^"\n]*"|[%@]?[\w.]+|\s+|.', text)
        at = draw.randrange(len(pieces))
        pieces[at] = draw.choice(("", draw.choice(pieces), pieces[at] * 2, *_ODD))
        text = "".join(pieces)
    return text.encode()


_INPUTS = {
    "x": "f32[4, 4]",
    "i": "i64[3]",
    "b": "bool[2, 2]",
    "big": "f32[1073741824, 1]",
    "e": "f32[0, 3]",
    "s": "f32[]",
    "y": "f32[1, 2, 8, 8]",
}
_ODD_VALUES = {
    "Tensor": tuple(f"%{name}" for name in _INPUTS),
    "int": ("0", "1", "-1", "2", "3", "1073741824", str(2**62), str(-(2**63))),
    "float": ("0.0", "1.0", "-1.0", "1e308", "nan", "inf", "-inf", "0.5"),
    "number": ("0", "-1", str(2**62), "0.5", "nan"),
    "bool": ("true", "false"),
    "str": ('"mean"', '""', '"i,j->ij"', '"%s"'),
}


def operators(bench: Bench) -> None:
    names = sorted(operator_names())
    _read(bench, "operators", ".txt", 20_000, lambda seed: _call_of(names[seed % len(names)], random.Random(seed)))


def _call_of(name: str, draw: random.Random) -> bytes:
    """A program of one call, whose optional operands are given half of the time."""
    positional, keywords = [], []
    for argument in target_of(name)._schema.arguments:
        if argument.has_default_value() and draw.random() < 0.5:
            if argument.kwarg_only:
                continue
            break
        kind = str(argument.real_type if hasattr(argument, "real_type") else argument.type)
        value = draw.choice(("f32", "i64", "bool")) if "dtype" in argument.name else _value_of(kind, draw)
        (keywords if argument.kwarg_only else positional).append(f"{argument.name}={value}" if argument.kwarg_only else value)
    inputs = "".join(f"  input %{name} : {kind}\n" for name, kind in _INPUTS.items())
    head = f"graphwright 1\n\nfunction main {{\n  takes (({', '.join('*' * len(_INPUTS))}), {{}})\n  gives *\n{inputs}"
    return f"{head}  %0 = {name}({', '.join([*positional, *keywords])})\n  return %0\n}}\n".encode()


def _value_of(kind: str, draw: random.Random) -> str:
    if kind.startswith("Optional["):
        return "none" if draw.random() < 0.5 else _value_of(kind.removeprefix("Optional[").removesuffix("]"), draw)
    if kind.startswith("List["):
        return f"[{', '.join(_value_of(kind.removeprefix('List[').removesuffix(']'), draw) for _ in range(draw.randrange(5)))}]"
    return draw.choice(_ODD_VALUES.get(kind, ("none",)))


def artifacts() -> list[bytes]:
    vit, args, _ = gw.models.load("vit", "tiny")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for passes in ([], [gw.AbsorbOutliers(min_numel=256, rank=4)]):
            path = Path(folder) / "net.gw"
            gw.compile(vit, passes, example_inputs=args, backend="aten").save(path)
            found.append(path.read_bytes())
    return found


def forged(bench: Bench) -> None:
    sources = artifacts()
    members = [members_of(content) for content in sources]

    def damaged(seed: int) -> bytes:
        draw = random.Random(seed)
        chosen = draw.choice(members)
        name = draw.choice(sorted(chosen))
        if name == "program.txt" and draw.random() < 0.7:
            return packed(chosen | {name: _damaged_text([chosen[name].decode()], draw)})
        try:
            return packed(chosen | {name: with_wrong_bytes(chosen[name], list(chosen.values()), draw)})
        except ValueError:  # a manifest that is no JSON has no place for digests
            return with_wrong_bytes(draw.choice(sources), sources, draw)

    _read(bench, "forged", ".gw", 3000, damaged)


def tampered(bench: Bench) -> None:
    source = min(artifacts(), key=len)
    _read(bench, "tampered", ".gw", 5000, lambda seed: _tampered(source, random.Random(seed)), frozenset({"ArtifactError"}))


def _tampered(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(8)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        members = members_of(content)
        name, other = draw.sample(sorted(members), 2)
        changed = draw.choice(({name: members[other], other: members[name]}, {name: members[name] + b"\n"}, {f"{name}x": members[name]}))
        kept = {each: data for each, data in (members | changed).items() if changed.keys() != {name} or each != other}
        body = packed({each: data for each, data in kept.items() if each != "manifest.json"} | {"manifest.json": members["manifest.json"]})
        return body[:-64] + content[-64:]
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def entries(bench: Bench) -> None:
    count, served = 500 if bench.quick else 5000, 0
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        key, value = {"program": "a" * 64, "versions": "1"}, bytes(range(256)) * 8
        for seed in range(count):
            cache.put("tuning", key, value)
            (path,) = (each for each in Path(folder).rglob("*") if each.is_file())
            draw, data = random.Random(seed), bytearray(path.read_bytes())
            if seed % 4:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                del data[draw.randrange(len(data)) :]
            path.write_bytes(data)
            served += cache.get("tuning", key) is not None
    bench.row(f"{count} damaged entries", "bad", "1", served, {})


def payloads(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as name:
        files = write_payloads(Path(name))
        done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, files)], capture_output=True, text=True, cwd=name)
    if done.returncode:
        raise SystemExit(done.stderr)
    said = json.loads(done.stdout.splitlines()[-1])
    case = f"{len(PAYLOADS)} payloads in {len(files)} files"
    bench.row(case, "run", "1", said["run"], {})
    bench.row(case, "events", "1", len(said["events"]), {})
    for event in said["events"][:20]:
        bench.note(str(event))


def _read(
    bench: Bench, what: str, suffix: str, count: int, make: Callable[[int], bytes], expected: frozenset[str] = frozenset(ERRORS)
) -> None:
    count = count // 20 if bench.quick else count
    counts: Counter[str] = Counter()
    slowest, most, case = 0.0, 0, f"{count} {what}"
    with tempfile.TemporaryDirectory() as name:
        for seeds in _batches(count):
            files = [Path(name) / f"{seed}{suffix}" for seed in seeds]
            for seed, file in zip(seeds, files):
                file.write_bytes(make(seed))
            for seed, (said, seconds, taken) in zip(seeds, outcomes(files, SECONDS)):
                slowest, most = max(slowest, seconds), max(most, taken)
                good = said in expected and seconds <= SECONDS and taken < BYTES
                counts[said if good else "bad"] += 1
                if not good and counts["bad"] <= 20:
                    bench.note(f"{what}, seed {seed}: {said} after {seconds:.1f} s, {taken / 2**20:.0f} MiB")
            for file in files:
                file.unlink()
    for kind in sorted({*counts, "bad"}):
        bench.row(case, kind, "1", counts[kind], {})
    bench.row(case, "slowest", "s", slowest, {})
    bench.row(case, "peak_bytes", "B", most, {})


def _batches(count: int) -> Iterator[range]:
    return (range(begin, min(begin + BATCH, count)) for begin in range(0, count, BATCH))


if __name__ == "__main__":
    main()
