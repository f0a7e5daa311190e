"""completion: a script that lets a shell complete commands, options, passes and networks of the zoo."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import models
from ..ir.onnx.export import DIALECTS, REGIONS
from ..passes import all_passes
from ..runtime.backend import BACKENDS
from ..runtime.cache import KINDS
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
    """One command, or one of those below it (`cache clear`): what it does, its options, words that may stand for its arguments, and
    whether files may."""

    name: str
    about: str
    options: tuple[_Option, ...]
    words: tuple[str, ...]
    files: bool


def completion(options: argparse.Namespace) -> Result:
    commands = _commands(options.root)
    text = _SHELLS[options.shell](commands)
    return Result(text, {"shell": options.shell, "script": text})


def _commands(parser: argparse.ArgumentParser, above: str = "") -> list[_Command]:
    """What the parser of the command line knows, with names that only the packages know; commands before those below them."""
    found = list[_Command]()
    for choices in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        about = {each.dest: each.help or "" for each in choices._choices_actions}
        for name, each in choices.choices.items():
            found += [_command(f"{above}{name}", each, about.get(name, "")), *_commands(each, f"{above}{name} ")]
    return found


def _command(name: str, parser: argparse.ArgumentParser, about: str) -> _Command:
    values, networks = _values(), _networks()
    known = {"model": networks, "a": networks, "b": networks, "passname": list(all_passes()), "kind": KINDS}
    options, words, files = list[_Option](), list[str](), False
    for action in parser._actions:
        if action.option_strings:
            offered = next((values[each] for each in action.option_strings if each in values), ())
            options.append(_Option(tuple(action.option_strings), _plain(action.help), None if action.nargs == 0 else offered))
        elif action.choices is not None:
            words += list(action.choices)
        else:
            words += known.get(action.dest, ())
            files = files or action.dest in ("model", "a", "b")
    return _Command(name, about, tuple(options), tuple(dict.fromkeys(words)), files)


def _values() -> Mapping[str, tuple[str, ...]]:
    """What may follow an option."""
    return {"--passes": tuple(all_passes()), "--backend": BACKENDS, "--dialect": DIALECTS, "--regions": REGIONS}


def _networks() -> list[str]:
    return [word for name in models.names() for word in (name, *(f"{name}:{size}" for size in models.sizes(name)))]


def _plain(text: str | None) -> str:
    return (text or "").replace("%%", "%")


def _parents(commands: Sequence[_Command]) -> list[str]:
    """The commands that have others below them."""
    return list(dict.fromkeys(each.name.partition(" ")[0] for each in commands if " " in each.name))


# --- shells ----------------------------------------------------------------------------------------------------------------


def _bash(commands: Sequence[_Command]) -> str:
    """Bash takes `:` and `=` for ends of words, so the word is read off the line; what it has before its last `:` is no part of a reply."""
    top = " ".join(each.name for each in commands if " " not in each.name)
    lines = [
        "# bash completion of graphwright: graphwright completion bash > ~/.local/share/bash-completion/completions/graphwright",
        "_graphwright() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"',
        '  local words="" options="" files="" head=""',
        "  COMPREPLY=()",
        f'  if ((COMP_CWORD == 1)); then COMPREPLY=($(compgen -W "{top}" -- "$cur")); return; fi',
        '  if [[ -n "$COMP_LINE" ]]; then cur="${COMP_LINE:0:COMP_POINT}"; cur="${cur##*[[:space:]]}"; fi',
        '  if [[ "$cur" == --*=* ]]; then prev="${cur%%=*}"; cur="${cur#*=}"; fi',
        '  case "$prev" in',
    ]
    for names, values in _following(commands).items():
        lines.append(f"    {'|'.join(names)}) {_bash_reply(names, values)}; return ;;")
    lines += [
        "  esac",
        f'  case "$command" in {"|".join(_parents(commands))}) ((COMP_CWORD > 2)) && command+=" ${{COMP_WORDS[2]}}" ;; esac',
        '  case "$command" in',
    ]
    for each in commands:
        spelled = " ".join(name for option in each.options for name in option.names)
        lines.append(f'    "{each.name}") words="{" ".join(each.words)}"; options="{spelled}"; files="{"yes" if each.files else ""}" ;;')
    lines += [
        "  esac",
        '  if [[ "$cur" == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$cur")); return; fi',
        '  COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        '  if [[ -n "$files" ]]; then COMPREPLY+=($(compgen -f -- "$cur")); fi',
        '  if [[ "$cur" == *:* && "$COMP_WORDBREAKS" == *:* ]]; then head="${cur%:*}:"; COMPREPLY=("${COMPREPLY[@]#"$head"}"); fi',
        "}",
        "complete -o filenames -F _graphwright graphwright",
    ]
    return "\n".join(lines) + "\n"


def _bash_reply(names: Sequence[str], values: Sequence[str]) -> str:
    if not values:
        return 'COMPREPLY=($(compgen -f -- "$cur"))'
    if "--passes" not in names:
        return f'COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$cur"))'
    start = '[[ "$cur" == *,* ]] && head="${cur%,*},"'  # passes that stand already
    return f'{start}; COMPREPLY=($(compgen -P "$head" -W "{" ".join(values)}" -- "${{cur##*,}}")); compopt -o nospace 2> /dev/null'


def _following(commands: Sequence[_Command]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Options that something follows, each once, with the words that may."""
    return {option.names: option.values for each in commands for option in each.options if option.values is not None}


def _zsh(commands: Sequence[_Command]) -> str:
    parents = _parents(commands)
    lines = [
        "#compdef graphwright",
        "# zsh completion of graphwright: graphwright completion zsh > a folder of $fpath, as _graphwright",
        "_graphwright_words() { compadd -- ${=1} }",
        "_graphwright_any() { compadd -- ${=1}; _files }",
        "_graphwright() {",
        "  local -a commands=(",
        *(f"    {_quoted(each.name + ':' + each.about)}" for each in commands if " " not in each.name),
        "  )",
        "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
        '  local command="${words[2]}"',
        "  shift words; (( CURRENT-- ))",
        f'  case "$command" in {"|".join(parents)})',
        '    if (( CURRENT > 2 )); then command+=" ${words[2]}"; shift words; (( CURRENT-- )); fi ;;',
        "  esac",
        '  case "$command" in',
    ]
    for each in commands:
        arguments = [_zsh_argument(name, option) for option in each.options for name in option.names]
        offered = " ".join(each.words).replace(":", "\\:")  # the end of a part of an argument's description
        anything = _quoted(f'*:argument: _graphwright_{"any" if each.files else "words"} "{offered}"')
        lines.append(f'    "{each.name}") _arguments {" ".join([*arguments, anything])} ;;')
    return "\n".join([*lines, "  esac", "}", '_graphwright "$@"']) + "\n"


def _zsh_argument(name: str, option: _Option) -> str:
    about = option.about.replace("[", "(").replace("]", ")").replace(":", ",")
    if option.values is None:
        return _quoted(f"{name}[{about}]")
    offered = " ".join(option.values)
    following = "_files" if not offered else f"_sequence compadd - {offered}" if name == "--passes" else f"({offered})"
    return _quoted(f"{name}[{about}]:value:{following}")


def _fish(commands: Sequence[_Command]) -> str:
    lines = ["# fish completion of graphwright: graphwright completion fish > ~/.config/fish/completions/graphwright.fish"]
    for each in commands:
        first, _, second = each.name.partition(" ")
        only = f"-n '__fish_seen_subcommand_from {first}{f'; and __fish_seen_subcommand_from {second}' if second else ''}'"
        if not second:
            lines.append(f"complete -c graphwright -n __fish_use_subcommand -f -a {each.name} -d {_quoted(each.about)}")
        if each.words:
            lines.append(f"complete -c graphwright {only} {'' if each.files else '-f '}-a {_quoted(' '.join(each.words))}")
        for option in each.options:
            spelled = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            following = "" if option.values is None else f" -x -a {_quoted(' '.join(option.values))}" if option.values else " -r -F"
            lines.append(f"complete -c graphwright {only} {spelled}{following} -d {_quoted(option.about)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For a shell, in single quotes."""
    return "'" + text.replace("'", "'\\''") + "'"


_SHELLS: dict[str, Callable[[Sequence[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
