"""Completion of the command line, in the shells that it is for, and the help that shows how each command is used."""

import argparse
import re
import shutil
import subprocess
import sys

import pytest

from graphwright import models
from graphwright.cli import EXAMPLES, _parser, main
from graphwright.passes import all_passes


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run([sys.executable, "-m", "graphwright", "completion", shell], capture_output=True, text=True, check=True)
        (folder / shell).write_text(done.stdout)
    return folder


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}: apt-get install {shell}")


def bash(scripts, *words):
    """What bash offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"source {scripts / 'bash'}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _graphwright; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=scripts)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def bash_line(scripts, line):
    """The same for a whole line, which bash itself splits: at colons and equal signs too."""
    words = re.split(r"\s+|(?<=[:=])|(?=[:=])", line)
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"source {scripts / 'bash'}; COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        "_graphwright; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=scripts, check=True).stdout.split()


def networks():
    return [*models.names(), *(f"{name}:{size}" for name in models.names() for size in models.sizes(name))]


@needs("bash")
def test_bash_completes_commands_options_passes_and_models(scripts):
    assert {"compile", "view", "dump"} <= set(bash(scripts, "graphwright", ""))
    assert bash(scripts, "graphwright", "ver") == ["verify"]
    assert set(bash(scripts, "graphwright", "view", "--p")) == {"--passes", "--profile"}
    assert bash(scripts, "graphwright", "compile", "vit", "--passes", "slice") == ["slice-groups"]
    assert bash(scripts, "graphwright", "compile", "vit", "--backend", "in") == ["inductor"]
    assert set(bash(scripts, "graphwright", "dump", "")) == {*networks(), "bash", "zsh", "fish"}  # and the files there
    assert bash(scripts, "graphwright", "compile", "vit", "-o", "fi") == ["fish"]
    assert set(bash(scripts, "graphwright", "passes", "remove-")) == {name for name in all_passes() if name.startswith("remove-")}
    assert bash(scripts, "graphwright", "cache", "cl") == ["clear"]
    assert bash(scripts, "graphwright", "export", "vit", "--dialect", "in") == ["inline"]


@needs("bash")
def test_bash_completes_what_follows_a_command_below_another(scripts):
    assert bash(scripts, "graphwright", "cache", "clear", "pr") == ["probe"]
    assert set(bash(scripts, "graphwright", "cache", "explain", "vi")) == {name for name in networks() if name.startswith("vi")}
    assert bash(scripts, "graphwright", "cache", "explain", "vit", "--pas") == ["--passes"]


@needs("bash")
def test_bash_completes_behind_the_marks_that_it_splits_words_at(scripts):
    assert bash_line(scripts, "graphwright view vit:ti") == ["tiny"]  # which stands behind the colon that is there
    assert bash_line(scripts, "graphwright view vit --passes=spl") == ["split-low-rank"]
    assert bash_line(scripts, "graphwright view vit --passes smooth,spl") == ["smooth,split-low-rank"]


@needs("bash")
def test_bash_offers_no_file_where_none_is_taken(scripts):
    assert bash(scripts, "graphwright", "zoo", "") == bash(scripts, "graphwright", "passes", "fi") == []
    assert set(bash(scripts, "graphwright", "completion", "")) == {"bash", "zsh", "fish"}


@needs("zsh")
def test_zsh_reads_its_script(scripts):
    done = subprocess.run(["zsh", "-n", str(scripts / "zsh")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@needs("fish")
def test_fish_completes_commands_options_passes_and_models(scripts):
    def offered(line):
        command = f"source {scripts / 'fish'}; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", command], capture_output=True, text=True, cwd=scripts, check=True)
        return {each.split("\t")[0] for each in done.stdout.splitlines()}

    assert "verify" in offered("graphwright ver")
    assert {"--passes", "--profile"} <= offered("graphwright view --p")
    assert "slice-groups" in offered("graphwright compile vit --passes sli")
    assert set(networks()) <= offered("graphwright dump ")
    assert offered("graphwright cache clear pro") == {"probe"}


def test_a_shell_that_is_none_is_a_mistake(capsys):
    assert main(["completion", "cmd"]) == 2
    assert "bash" in capsys.readouterr().err


def commands(parser, above=()):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield (*above, name), each
                yield from commands(each, (*above, name))


@pytest.mark.parametrize(
    "names, parser", [((), _parser()), *commands(_parser())], ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_help_has_examples_that_the_parser_takes(names, parser):
    text = parser.format_help()
    assert "examples" in text and EXAMPLES[" ".join(names)] in text
    for line in EXAMPLES[" ".join(names)].splitlines():
        for call in re.split(r"[;|]", line.partition("#")[0]):
            words = re.findall(r"'[^']*'|\S+", call.partition(">")[0])
            if words[0] == "graphwright":
                options = _parser().parse_args([word.strip("'") for word in words[1:]])
                assert options.command[1]
