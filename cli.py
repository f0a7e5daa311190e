"""The `graphwright` command: reads arguments, calls the compiler, prints text or one JSON object.

A command returns a `Result` and prints nothing itself, so `--json`, pipes and exit codes are handled in one place, `main`.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NoReturn

from .commands.result import MISTAKE, Mistake, Result

EPILOG = """\
MODEL is one of
  unet.gw               an artifact that graphwright wrote
  unet.onnx             an ONNX model
  unet.pt2              a torch.export file; it can run code when it is read, so it needs --trusted
  unet.txt              a program as `graphwright dump` prints it (dump, diff, verify and view only)
  video_unet:tiny       a network of the zoo and its size (small when left out)
  package.module:make   a function of yours, looked for in the current folder too, that returns (module, args) or
                        (module, args, kwargs); it runs

exit codes
  0  done; nothing was found
  1  diff found a difference, verify could not confirm the program or saw an exact pipeline diverge, bisect or reduce found a
     fault, or cache explain found nothing kept
  2  a mistake in what was asked: one line on stderr says which
"""

EXAMPLES = {
    "": """\
  graphwright passes                                                    # what there is
  graphwright compile video_unet:tiny --passes slice-groups -o unet.gw  # the report, and a file to keep
  graphwright view video_unet:tiny --passes slice-groups --open         # the same to look at
  graphwright explain slice-groups video_unet:tiny                      # what was left alone, and why""",
    "compile": """\
  graphwright compile video_unet:tiny --passes 'slice-groups{memory_budget=25%}' -o unet.gw
  graphwright compile decoder:tiny --decoder --passes absorb-outliers --numeric""",
    "export": """\
  graphwright export video_unet:tiny --passes slice-groups -o unet.onnx""",
    "dump": """\
  graphwright dump vit:tiny | less
  graphwright dump vit:tiny --passes fold-constants --ops
  graphwright dump unet.gw --weights --json""",
    "view": """\
  graphwright view video_unet:tiny --passes 'slice-groups{memory_budget=25%}' --profile --open
  graphwright view unet.gw -o unet.html
  graphwright view program.txt --passes share-subexpressions
  graphwright view unet.gw --json | jq '.programs[-1].functions[0].memory.peak_bytes'""",
    "diff": """\
  graphwright dump vit:tiny > before.txt; graphwright dump vit:tiny --passes fold-constants > after.txt
  graphwright diff before.txt after.txt""",
    "verify": """\
  graphwright verify unet.gw
  graphwright verify vit:tiny --passes slice-groups --numeric
  graphwright verify dit:tiny --passes 'quantize{weight=int8-channel}' --per-layer --plot errors.svg""",
    "bisect": """\
  graphwright bisect vit:tiny --passes my_passes:Mine
  graphwright bisect vit:tiny --passes my_passes:Mine -o case.py; python case.py""",
    "reduce": """\
  graphwright reduce vit:tiny --passes my_passes:Mine -o case.py""",
    "explain": """\
  graphwright explain slice-groups video_unet:tiny
  graphwright explain 'absorb-outliers{rank=16}' dit:tiny --json""",
    "passes": """\
  graphwright passes
  graphwright passes slice-groups""",
    "zoo": """\
  graphwright zoo""",
    "cache": """\
  graphwright cache list
  graphwright cache explain vit:tiny --passes slice-groups
  graphwright cache clear probe""",
    "cache list": "  graphwright cache list --json",
    "cache explain": "  graphwright cache explain vit:tiny --passes slice-groups",
    "cache clear": """\
  graphwright cache clear
  graphwright cache clear passes""",
    "completion": """\
  graphwright completion bash > ~/.local/share/bash-completion/completions/graphwright
  graphwright completion zsh > ~/.zfunc/_graphwright      # ~/.zfunc being a folder of $fpath
  graphwright completion fish > ~/.config/fish/completions/graphwright.fish""",
    "demo": """\
  graphwright demo --quick
  graphwright demo --save out""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, writes its own log to stderr
    as_json = "--json" in arguments
    try:
        options = _parser().parse_args(arguments)
        with _quiet_libraries():
            result = _run(options)
    except Mistake as mistake:
        return _complain(mistake, as_json)
    except KeyboardInterrupt:
        return 130
    return _print(json.dumps(result.data) if as_json else result.text, result.code)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """torch logs, warns and prints graphs on stderr while it captures; what matters of that is in our errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _run(options: argparse.Namespace) -> Result:
    from .ir.errors import GraphwrightError

    module, function = options.command
    try:
        return getattr(importlib.import_module(f".commands.{module}", __package__), function)(options)
    except GraphwrightError as error:
        raise Mistake(str(error)) from error
    except OSError as error:
        raise Mistake(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def _complain(mistake: Mistake, as_json: bool) -> int:
    line = " ".join(str(mistake).split())
    print(f"graphwright: {line}", file=sys.stderr)
    if not as_json:
        return MISTAKE
    cause = mistake.__cause__
    notes = list(getattr(cause, "__notes__", ()))
    return _print(json.dumps({"error": {"type": _documented(cause), "message": str(mistake), "notes": notes}}), MISTAKE)


def _documented(error: BaseException | None) -> str:
    """The class of `ir.errors` that `error` is of; their base for a mistake in the command line."""
    from .ir import errors

    return next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), "GraphwrightError")


def _print(text: str, code: int) -> int:
    """Prints `text`; a reader that went away early (`| head`) is no error."""
    try:
        if isinstance(sys.stdout.encoding, str) and sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


# --- arguments -------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        split = message.startswith("unrecognized arguments") and "=" in message
        hint = "the shell may have split a pipeline: put it in quotes" if split else f"see {self.prog} --help"
        raise Mistake(f"{message} ({hint})")


def _version() -> str:
    try:
        return f"graphwright {metadata.version('graphwright')}"
    except metadata.PackageNotFoundError:
        return "graphwright, run from its source"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("model", metavar="MODEL", help="what to read; see below")
    model.add_argument("--trusted", action="store_true", help="read .pt2 files, which can run code")
    passes = argparse.ArgumentParser(add_help=False)
    passes.add_argument(
        "--passes",
        metavar="P",
        help="a pipeline in quotes, such as 'slice-groups{memory_budget=25%%}', after the exact clean-ups; a pass of yours is module:Class",
    )
    passes.add_argument("--no-cleanups", action="store_true", help="run the passes of P alone")

    parser = _Parser(prog="graphwright", description="Compiles PyTorch and ONNX models by passes that say what they do to the numbers.")
    _finish(parser, EXAMPLES[""])
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(name: str, command: tuple[str, str], about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=list(parents), help=about, description=about[0].upper() + about[1:] + ".")
        _finish(added, EXAMPLES[name])
        added.set_defaults(command=command)
        return added

    compiling = add("compile", ("programs", "compile_"), "compile a model, print the report, write an artifact", model, passes)
    compiling.add_argument("-o", "--output", metavar="FILE.gw", help="the artifact to write")
    compiling.add_argument(
        "--backend", default="aten", help="auto, tuned, inductor, triton or aten (default: aten; an artifact holds no code)"
    )
    compiling.add_argument("--numeric", action="store_true", help="hold each pass to its contract on the example inputs")
    _add_decoder(compiling)
    exporting = add("export", ("export", "export"), "write a model, or what passes make of it, as ONNX", model, passes)
    exporting.add_argument("-o", "--output", metavar="FILE.onnx", required=True, help="the file to write")
    exporting.add_argument("--dialect", default="function", help="operators of graphwright as function (default), inline or custom")
    exporting.add_argument("--regions", default="loop", help="sliced regions as loop (default) or unroll")
    exporting.add_argument("--opset", type=int, default=21, help="of the standard's operators (default: 21)")
    exporting.add_argument("--external-data", action="store_true", default=None, help="weights beside the model, also small ones")
    _add_decoder(exporting)
    dumping = add("dump", ("programs", "dump"), "print a program as text, as captured or after passes", model, passes)
    dumping.add_argument("--ops", action="store_true", help="print how often each operator is called instead")
    dumping.add_argument("--weights", action="store_true", help="print the table of its weights instead")
    viewing = add("view", ("view", "view"), "write what the compiler did to a model as one page, to open in a browser", model, passes)
    viewing.add_argument("-o", "--output", metavar="FILE.html", help="the page to write (default: MODEL.report.html in this folder)")
    viewing.add_argument("--open", action="store_true", help="also open it in the browser")
    viewing.add_argument("--profile", action="store_true", help="run the model: time of each kernel, error of each layer against float64")
    viewing.add_argument("--numeric", action="store_true", help="hold each pass to its contract on the example inputs")
    viewing.add_argument("--backend", default="aten", help="auto, tuned, inductor, triton or aten (default: aten)")
    _add_decoder(viewing)
    differing = add("diff", ("programs", "diff"), "print what differs between two programs, paired by where operations came from", common)
    differing.add_argument("a", metavar="A")
    differing.add_argument("b", metavar="B")
    differing.add_argument("--trusted", action="store_true", help="read .pt2 files, which can run code")
    verifying = add("verify", ("programs", "verify"), "check a program, and what passes make of it", model, passes)
    verifying.add_argument("--numeric", action="store_true", help="hold each pass to its contract on inputs")
    verifying.add_argument("--per-layer", action="store_true", help="also print the error of each call against float64")
    verifying.add_argument("--plot", metavar="FILE.svg", help="draw these errors too")
    bisecting = add("bisect", ("debug", "bisect"), "find the rewrite of a pipeline that breaks its contract", model, passes)
    reducing = add("reduce", ("debug", "reduce"), "find the smallest program on which a pipeline breaks its contract", model, passes)
    for each in (bisecting, reducing):
        each.add_argument("-o", "--output", metavar="FILE.py", help="also write the smallest case as a file that runs alone")
    explaining = add("explain", ("debug", "explain"), "say what a pass rewrites in a model, what it leaves alone, and why", common)
    explaining.add_argument("passname", metavar="PASS", help="the pass, with options as in --passes")
    explaining.add_argument("model", metavar="MODEL", help="what to read; see below")
    explaining.add_argument("--trusted", action="store_true", help="read .pt2 files, which can run code")
    explaining.add_argument("--no-cleanups", action="store_true", help="look at the program as captured")
    listing = add("passes", ("lists", "passes"), "list the passes with contracts and options, or say all of one", common)
    listing.add_argument("passname", nargs="?", metavar="PASS", help="the one to describe")
    add("zoo", ("lists", "zoo"), "list the networks of the zoo, which serve as MODEL", common)
    caching = add("cache", ("cache", "list_"), "show, explain or empty what is kept between processes")
    _add_cache_commands(caching, common, model, passes)
    completing = add("completion", ("completion", "completion"), "print a script that lets a shell complete this command", common)
    completing.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "fish"], help="bash, zsh or fish")
    completing.set_defaults(root=parser)
    demo = add("demo", ("demo", "demo"), "lower the memory of a small video network and measure it", common)
    demo.add_argument("--quick", action="store_true", help="the tiny network: seconds instead of minutes")
    demo.add_argument("--save", metavar="DIR", help="also write the program (demo.txt) and the report (report.txt) there")
    return parser


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoder", action="store_true", help="a language model, for any batch and length, with functions that decode")


def _add_cache_commands(parser: argparse.ArgumentParser, common: argparse.ArgumentParser, *explaining: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, function: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=list(parents), help=about, description=about[0].upper() + about[1:] + ".")
        _finish(added, EXAMPLES[f"cache {name}"])
        added.set_defaults(command=("cache", function))
        return added

    add("list", "list_", "list what is kept, the last used first", common)
    add("explain", "explain", "say whether what passes make of MODEL is kept, and if not, in what the nearest entry differs", *explaining)
    clearing = add("clear", "clear", "remove what is kept", common)
    clearing.add_argument(
        "kind", nargs="?", metavar="KIND", help="entries of this kind alone: passes, types, code, pieces, native, probe or tuning"
    )


def _finish(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.epilog = f"examples\n{examples}\n\n{EPILOG}" if examples else EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    sys.exit(main())
