"""completion: a script that lets a shell complete commands, options, passes and networks of the zoo."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import models
from ..passes import all_passes
from ..runtime.backend import BACKENDS
from .result import Result


@dataclass(frozen=True)
class _Option:
    """One option of a command: its spellings, what it does, and the words that may follow it; None where it stands alone, empty where a
    file or something of the user's own follows."""

    names: tuple[str, ...]
    about: str
    values: tuple[str, ...] | None


@dataclass(frozen=True)
class _Command:
    """One command: what it does, its options, and words that may stand for its arguments."""

    name: str
    about: str
    options: tuple[_Option, ...]
    words: tuple[str, ...]


def completion(options: argparse.Namespace) -> Result:
    commands = _commands(options.root)
    text = _SHELLS[options.shell](commands)
    return Result(text, {"shell": options.shell, "script": text})


def _commands(root: argparse.ArgumentParser) -> list[_Command]:
    """What the parser of the command line knows, with names that only the packages know."""
    choices = next(action for action in root._actions if isinstance(action, argparse._SubParsersAction))
    about = {each.dest: each.help or "" for each in choices._choices_actions}
    values = {"--passes": tuple(all_passes()), "--backend": BACKENDS}
    return [_command(name, parser, about.get(name, ""), values) for name, parser in choices.choices.items()]


def _command(name: str, parser: argparse.ArgumentParser, about: str, values: Mapping[str, tuple[str, ...]]) -> _Command:
    options, words = list[_Option](), list[str]()
    for action in parser._actions:
        known = next((values[each] for each in action.option_strings if each in values), ())
        if action.option_strings:
            taken = None if action.nargs == 0 else known
            options.append(_Option(tuple(action.option_strings), _plain(action.help), taken))
        elif action.choices is not None:
            words += list(action.choices)
        else:
            words += {"model": models.names(), "a": models.names(), "passname": list(all_passes())}.get(action.dest, [])
    return _Command(name, about, tuple(options), tuple(words))


def _plain(text: str | None) -> str:
    return (text or "").replace("%%", "%")


# --- shells ----------------------------------------------------------------------------------------------------------------


def _bash(commands: Sequence[_Command]) -> str:
    lines = [
        "# bash completion of graphwright: graphwright completion bash > ~/.local/share/bash-completion/completions/graphwright",
        "_graphwright() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" words="" options=""',
        "  COMPREPLY=()",
        f'  if ((COMP_CWORD == 1)); then COMPREPLY=($(compgen -W "{" ".join(each.name for each in commands)}" -- "$cur")); return; fi',
        '  case "$prev" in',
    ]
    for names, values in _following(commands).items():
        reply = f'COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$cur"))' if values else 'COMPREPLY=($(compgen -f -- "$cur"))'
        lines.append(f"    {'|'.join(names)}) {reply}; return ;;")
    lines += ["  esac", '  case "${COMP_WORDS[1]}" in']
    for each in commands:
        spelled = " ".join(name for option in each.options for name in option.names)
        lines.append(f'    {each.name}) words="{" ".join(each.words)}"; options="{spelled}" ;;')
    lines += [
        "  esac",
        '  if [[ "$cur" == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$cur")); return; fi',
        '  COMPREPLY=($(compgen -W "$words" -- "$cur") $(compgen -f -- "$cur"))',
        "}",
        "complete -o filenames -F _graphwright graphwright",
    ]
    return "\n".join(lines) + "\n"


def _following(commands: Sequence[_Command]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Options that something follows, each once, with the words that may."""
    return {option.names: option.values for each in commands for option in each.options if option.values is not None}


def _zsh(commands: Sequence[_Command]) -> str:
    lines = [
        "#compdef graphwright",
        "# zsh completion of graphwright: graphwright completion zsh > a folder of $fpath, as _graphwright",
        """_graphwright_any() { _alternative "words:word:($1)" 'files:file:_files' }""",
        "_graphwright() {",
        "  local -a commands=(",
        *(f"    {_quoted(each.name + ':' + each.about)}" for each in commands),
        "  )",
        "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
        '  local command="${words[2]}"',
        "  shift words; (( CURRENT-- ))",
        '  case "$command" in',
    ]
    for each in commands:
        arguments = [_zsh_argument(name, option) for option in each.options for name in option.names]
        anything = _quoted(f'*:argument: _graphwright_any "{" ".join(each.words)}"')
        lines.append(f"    {each.name}) _arguments {' '.join([*arguments, anything])} ;;")
    return "\n".join([*lines, "  esac", "}", '_graphwright "$@"']) + "\n"


def _zsh_argument(name: str, option: _Option) -> str:
    about = option.about.replace("[", "(").replace("]", ")").replace(":", ",")
    if option.values is None:
        return _quoted(f"{name}[{about}]")
    following = f"({' '.join(option.values)})" if option.values else "_files"
    return _quoted(f"{name}[{about}]:value:{following}")


def _fish(commands: Sequence[_Command]) -> str:
    lines = ["# fish completion of graphwright: graphwright completion fish > ~/.config/fish/completions/graphwright.fish"]
    for each in commands:
        lines.append(f"complete -c graphwright -n __fish_use_subcommand -f -a {each.name} -d {_quoted(each.about)}")
        only = f"-n '__fish_seen_subcommand_from {each.name}'"
        if each.words:
            lines.append(f"complete -c graphwright {only} -a {_quoted(' '.join(each.words))}")
        for option in each.options:
            spelled = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            following = "" if option.values is None else f" -r -a {_quoted(' '.join(option.values))}" if option.values else " -r"
            lines.append(f"complete -c graphwright {only} {spelled}{following} -d {_quoted(option.about)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For a shell, in single quotes."""
    return "'" + text.replace("'", "'\\''") + "'"


_SHELLS: dict[str, Callable[[Sequence[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
