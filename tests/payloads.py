"""Names and strings that are code, commands, paths or markup, in files of each kind; and a process that watches while it reads and runs them."""

import json
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

import graphwright as gw
from graphwright.tests.forged import members_of, packed

PAYLOADS = (
    'n"); import os; os.system("touch pwned', "x\nimport os\nos.system('touch pwned')", "__import__('os').system('touch pwned')",
    "lambda: __import__('os').system('touch pwned')", "eval('1')", "exec('import os')", "');__import__('os').abort()#", '"""\nimport os\n"""',
    "'''+open('pwned','w').write('x')+'''", "{__import__('os').system('touch pwned')}", "%s%s%n", "{0.__class__.__mro__}", "{}", "${HOME}",
    "$(touch pwned)", "`touch pwned`", "; touch pwned", "| touch pwned", "&& touch pwned", "../../pwned", "/etc/passwd", "/tmp/pwned",
    "C:\\pwned", "..\\..\\pwned", "file:///etc/passwd", "http://127.0.0.1:9/x", "\\\\host\\share", "a\0b", "\u202eevil", "\u2028x", "\ufeffx",
    "x" * 1000, "lambda", "None", "self", "__class__", "__dict__", "__globals__", "torch.ops.aten.from_file", "aten.from_file.default",
    "torch.load", "os.system", "builtins.exec", "#include </etc/passwd>", '"; system("touch pwned"); "', "*/ system(\"touch pwned\"); /*",
    "</script><script>alert(1)</script>", "' OR 1=1 --", "9**9**9", "__reduce__", "cos\nsystem\n(S'touch pwned'\ntR.", "!!python/object/apply:os.system",
    "\\N{BULLET}", "\ud7ff", "a.b.c", "é\u0301", "-rf", "NUL", "con", "\x1b[2J",
)  # fmt: skip

WATCHED = """
import json, os, sys, tempfile
import torch, onnx, onnxruntime
import graphwright as gw
from graphwright.commands.sources import load

torch.set_num_threads(1)
folder, files = os.getcwd(), sys.argv[1:]
ran = 0

def visit(path):
    global ran
    if path.endswith(".gw"):
        model = gw.load(path, backend="aten", cache=False)
    else:
        model = gw.compile(load(path, trusted=False).model if path.endswith(".txt") else path, backend="aten", cache=False)
    model(*[torch.ones(2) for _ in model.program.main.placeholders])
    str(model.program), str(model.report())
    ran += 1

def attempt(path):
    try:
        visit(path)
    except gw.GraphwrightError:
        pass

attempt(files[0]); attempt(files[1]); attempt(files[2])
ran = 0
events, watching = [], True
NEVER = ("exec", "compile", "import", "marshal.", "pickle.", "ctypes.", "subprocess.", "os.", "socket.", "shutil.", "urllib.", "tempfile.")
READING = ("os.listdir", "os.scandir", "os.fwalk")

def hook(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = os.path.abspath(os.fsdecode(path) if isinstance(path, (str, bytes)) else folder).startswith(folder)
        if written or not inside:
            events.append([event, repr(path)[:200], repr(mode)])
    elif event.startswith(NEVER) and event not in READING:
        events.append([event, repr(arguments)[:300]])

sys.addaudithook(hook)
exec("1")
assert events, "the hook does not see what it should"
events.clear()
for path in files:
    attempt(path)
watching = False
print(json.dumps({"run": ran, "events": events, "left": sorted(set(os.listdir(folder)) - {os.path.basename(f) for f in files})}))
"""


def text_of(payload: str) -> str:
    """A program whose input, weight and module path have that name."""
    name = json.dumps(payload)
    return (
        f'graphwright 1\nweight @{name} : f32[2] parameter "?"\n\nfunction main {{\n  takes ((*), {{}})\n  gives *\n'
        f"  input %{name} : f32[2]\n  %1000 = aten.add.Tensor(%{name}, 1.0)  # [0] {' '.join(payload.split())[:60]}\n  return %1000\n}}\n"
    )


def model_of(payload: str) -> onnx.ModelProto:
    """An ONNX model whose graph, node, values and metadata have that name."""
    written = payload.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in (written, written + "y")]
    node = helper.make_node("Add", [written, written + "w"], [written + "y"], name=written, doc_string=written)
    weight = helper.make_tensor(written + "w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([node], written or "g", infos[:1], infos[1:], [weight], doc_string=written)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name=written, doc_string=written)
    helper.set_model_props(model, {written: written})
    return model


def write_payloads(folder: Path) -> list[Path]:
    """Three files of each payload; the first three have a harmless one."""
    source = folder / "source.gw"
    gw.compile(torch.nn.Identity(), example_inputs=(torch.ones(2),), backend="aten", cache=False).save(source)
    members = members_of(source.read_bytes())
    source.unlink()
    files: list[Path] = []
    for n, payload in enumerate(("plain", *PAYLOADS)):
        files += [folder / f"{n}.txt", folder / f"{n}.gw", folder / f"{n}.onnx"]
        text = text_of(payload)
        files[-3].write_text(text, encoding="utf-8", errors="surrogatepass")
        manifest = json.loads(members["manifest.json"])
        manifest["parameters"] = [{"name": payload, "keyword_only": False}]
        unweighted = text.replace(f'weight @{json.dumps(payload)} : f32[2] parameter "?"\n', "")
        changed = {"program.txt": unweighted.encode("utf-8", "surrogatepass"), "manifest.json": json.dumps(manifest).encode()}
        files[-2].write_bytes(packed(members | changed))
        files[-1].write_bytes(model_of(payload).SerializeToString())
    return files
