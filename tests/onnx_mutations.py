"""Damaged ONNX files, and what reading files of any kind in a process of limited memory ends in."""

import json
import random
import subprocess
import sys
from pathlib import Path

import onnx

# 4 GiB of addresses: importing torch takes 0.64 of memory, and libraries map more than they use.
_READER = """
import json, re, resource, sys, time
import graphwright as gw
from graphwright.commands.sources import load
import onnx, onnxruntime, torch
from graphwright.commands.result import Mistake
readers = {
    ".onnx": gw.from_onnx,
    ".gw": lambda path: gw.load(path, backend="aten", cache=False),
    ".txt": lambda path: load(path, trusted=False),
}
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
warm = peak()
for line in sys.stdin:
    begin = time.process_time()
    try:
        path = line.strip()
        readers[path[path.rindex("."):]](path)
        said = "read"
    except (gw.GraphwrightError, Mistake) as error:
        said = type(error).__name__
    except BaseException as error:
        said = f"escaped: {type(error).__name__}: {str(error)[:200]}"
    print("\\noutcome", json.dumps([said, time.process_time() - begin, peak() - warm]), flush=True)
"""


def mutated(content: bytes, others: list[bytes], seed: int) -> bytes:
    """One damaged copy. Two of three parse still: their nodes, names, types and numbers are wrong; bytes of the third are."""
    draw = random.Random(seed)
    return with_wrong_bytes(content, others, draw) if seed % 3 == 0 else _with_wrong_fields(content, draw)


def with_wrong_bytes(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Bytes flipped, the end cut off, a part of another file put in, a part doubled, or a number made huge."""
    data = bytearray(content)
    kind, at = draw.randrange(5), draw.randrange(len(data))
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        other = draw.choice(others)
        begin = draw.randrange(len(other))
        data[at : at + draw.randint(1, 200)] = other[begin : begin + draw.randint(1, 200)]
    elif kind == 3:
        data[at:at] = data[at : at + draw.randint(1, 200)]
    else:
        data[at : at + 1] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    return bytes(data)


_NUMBERS = (-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1)


def _with_wrong_fields(content: bytes, draw: random.Random) -> bytes:
    """One to three fields of the graph changed: an operand, a result, an operator, an attribute, a dim, an element type, an order."""
    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    for _ in range(draw.randint(1, 3)):
        node = draw.choice(graph.node) if graph.node else onnx.NodeProto()
        names = [name for each in graph.node for name in (*each.input, *each.output)] or [""]
        kind = draw.randrange(9)
        if kind == 0 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(names)
        elif kind == 1 and node.output:
            node.output[draw.randrange(len(node.output))] = draw.choice(names)
        elif kind == 2:
            node.op_type = draw.choice([*(each.op_type for each in graph.node), "Loop", "If", "Tile", "Expand", "Range", "Pad", "Resize"])
        elif kind == 3 and node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i, attribute.type = draw.choice(_NUMBERS), draw.choice((attribute.type, onnx.AttributeProto.INT, draw.randrange(15)))
            attribute.ints[:] = [draw.choice(_NUMBERS) for _ in attribute.ints]
        elif kind == 4 and graph.input:
            dims = draw.choice(graph.input).type.tensor_type.shape.dim
            for dim in dims:
                dim.dim_value = draw.choice(_NUMBERS)
        elif kind == 5 and graph.input:
            draw.choice(graph.input).type.tensor_type.elem_type = draw.randrange(30)
        elif kind == 6 and graph.initializer:
            draw.choice(graph.initializer).dims[:] = [draw.choice(_NUMBERS) for _ in range(draw.randint(0, 3))]
        elif kind == 7:
            graph.node.add().CopyFrom(node)
        elif graph.node:
            del graph.node[draw.randrange(len(graph.node))]
    return model.SerializeToString()


def outcomes(files: list[Path], timeout: float) -> list[tuple[str, float, int]]:
    """Of each file what reading it ended in, a class of error or `read`, after how many seconds of processors, and how many bytes of memory all so far
    have taken at most, beside what the packages take.

    A process that dies or hangs is an outcome too, and another goes on behind that file.
    """
    found: list[tuple[str, float, int]] = []
    while len(found) < len(files):
        left = files[len(found) :]
        process = subprocess.Popen(
            [sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            output, _ = process.communicate("\n".join(map(str, left)) + "\n", timeout=timeout * len(left))
            ended = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            ended = "hangs"
        lines = [line for line in output.splitlines() if line.startswith("outcome ")]  # the package's C++ writes there too
        said = [tuple(json.loads(line.removeprefix("outcome "))) for line in lines]
        found += said
        if len(said) < len(left):
            found.append((ended, timeout, 0))
    return found
