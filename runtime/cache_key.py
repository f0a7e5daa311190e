"""What the keys of kept results are made of: named parts, each a short text or a digest, so that a miss can say which of them differs.

Whatever may change a result is in its key. What is no part of any key: names of FX nodes, which mean nothing, and the time.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..codegen.native.library import compiler
from ..ir import Region, SymbolTable

_LIBRARIES = ("networkx", "numpy", "sympy", "triton")


def digest(*texts: str) -> str:
    """SHA-256 of texts, hex; other texts with the same concatenation have another."""
    whole = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def environment() -> dict[str, str]:
    """The parts that are the same for every result: versions, processor, threads, and torch's settings that change numbers."""
    return {
        "graphwright": _sources(),
        "python": f"{sys.implementation.name} {platform.python_version()}",
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "libraries": _libraries(),
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "settings": _settings(),
    }


def code_environment() -> dict[str, str] | None:
    """The parts for code that Inductor makes here; None where its settings cannot be told."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    try:
        # What torch's own caches have in their keys: every setting but those that say nothing about the code (`ignore_private_configs`).
        settings = [repr(sorted(config.save_config_portable().items())) for config in (inductor, functorch)]
    except AttributeError:
        return None
    return {**environment(), "inductor": digest(*settings), "compiler": _compiler()}


def native_environment(source: str) -> dict[str, str]:
    """The parts for a library that the C++ compiler makes of `source` here."""
    return {"source": digest(source), "compiler": _compiler(), "cpu": _cpu()}


def graph_text(graph: fx.Graph, inputs: Sequence[Any], symbols: SymbolTable) -> str:
    """A graph called with values of the types `inputs`: equal for graphs that do the same in the same order, to inputs of the same
    types, strides of dims of size 1 included."""
    declared = [f"symbol {symbol}" for symbol in symbols]
    return "\n".join([*declared, *(f"input {_type(value, symbols)}" for value in inputs), *_lines(graph, symbols)])


def _lines(graph: fx.Graph, symbols: SymbolTable) -> Iterator[str]:
    index = {node: n for n, node in enumerate(graph.nodes)}

    def shown(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{index[value]}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(shown, value))}]"
        if isinstance(value, Region):
            return "{" + "; ".join(_lines(value.graph, symbols)) + "}"
        return f"{type(value).__name__} {value!r}"

    for node in graph.nodes:
        arguments = [shown(node.args), *(f"{key}={shown(value)}" for key, value in node.kwargs.items())]
        type_ = f" : {_type(node.meta['val'], symbols)}" if node.op in ("placeholder", "get_attr") and "val" in node.meta else ""
        yield f"{index[node]} {node.op} {_target(node)} {' '.join(arguments)}{type_}"


def _type(value: Any, symbols: SymbolTable) -> str:
    if isinstance(value, torch.Tensor):
        shape, stride = ([symbols.text(n) for n in sizes] for sizes in (value.shape, value.stride()))
        return f"{value.dtype} {shape} {stride} {value.device} {value.is_conj()} {value.is_neg()}"
    return f"{type(value).__name__} {symbols.text(value) if isinstance(value, torch.SymInt) else value!r}"


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return "" if node.op == "placeholder" else str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", str(target))
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{module}.{name}"


# --- parts -----------------------------------------------------------------------------------------------------------------


@cache
def _sources() -> str:
    """Digest of graphwright's own code: a checkout changes without a version number that does."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for room in ("codegen", "ir", "passes", "runtime") for path in (root / room).rglob("*.py"))
    return digest(*(text for path in files for text in (str(path.relative_to(root)), path.read_text(encoding="utf-8"))))


@cache
def _libraries() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


@cache
def _cpu() -> str:
    """The processor by what code for it may use: folders are shared between machines, and compiled code is for one kind."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest(*_cpu_lines())[:16]}"


def _cpu_lines() -> Sequence[str]:
    """The lines of the first processor that name its kind and its instructions."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return ()
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    return sorted(line for line in first.splitlines() if line.partition(":")[0].strip() in kinds)


def _settings() -> str:
    """Switches of torch that change the numbers of its kernels, or which kernels there are."""
    mkldnn = torch.backends.mkldnn
    switches = {
        "default dtype": torch.get_default_dtype(),
        "precision of float32": _float32_precisions(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": getattr(mkldnn, "enabled", None),
        "flush denormal": _flushes_denormals(),
        "gpus": _gpus(),
    }
    return ", ".join(f"{name} {value}" for name, value in switches.items())


def _float32_precisions() -> str:
    """What each kind of kernel may round float32 to. (`get_float32_matmul_precision` raises where two of these differ.)"""
    backends: Any = torch.backends
    kinds = [(backends.cuda.matmul,), (backends.cudnn.conv, backends.cudnn), (backends.cudnn.rnn, backends.cudnn)]
    kinds += [(kind, backends.mkldnn) for kind in (backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul)]
    # "none" leaves it to what is above, and in the end to float32 as it is.
    found = [[s for each in (*kind, backends) if (s := each.fp32_precision) != "none"] for kind in kinds]
    return " ".join([*settings, "ieee"][0] for settings in found)


def _gpus() -> str:
    """The GPUs, where this process uses them: asking would start CUDA, and a process with CUDA cannot be forked."""
    return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) if torch.cuda.is_initialized() else "none"


def _flushes_denormals() -> bool:
    """torch has a setter and no getter: the smallest normal number halved is 0 where they are flushed."""
    return bool((torch.tensor(torch.finfo(torch.float32).tiny) / 2 == 0).item())


def _compiler() -> str:
    """The C++ compiler, as a file."""
    path = compiler()
    if path is None:
        return "none"
    found = os.stat(path)
    return f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"
