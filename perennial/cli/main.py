"""Finds the command, runs it, and turns errors into one line and an exit code.

A command is a file in this folder: HELP (one line), arguments(parser), run(args) -> exit code. Nothing is registered. A
trailing underscore in the file's name keeps it off Python's keywords; a leading one marks a file that is no command.
Command files import at their top what parsing needs and nothing more, so that `--help` answers at once.

Exit codes: 0 done; 1 training could not go on; 2 bad input; 130 stopped by the user, with everything saved.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import perennial
from perennial.core.errors import TrainingStopped, UserError, nearest

_CHOICES = re.compile(r"invalid choice: '(.*?)'.*\(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """An argument parser that takes whole options only, and whose errors name the nearest spelling."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Prints the error and where to read on, and exits with code 2."""
        choices = _CHOICES.search(message)
        if choices:
            message += nearest(choices[1], re.findall(r"[\w.-]+", choices[2]))
        self.exit(2, f"error: {message}\nSee {self.prog} --help\n")


def commands() -> dict[str, str]:
    """Name of every command, and its module."""
    names = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return {name.rstrip("_"): name for name in sorted(names) if name != "main" and not name.startswith("_")}


def load(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"perennial.cli.{commands()[command]}")


def parser_of(command: str) -> Parser:
    """The argument parser of one command."""
    module = load(command)
    parser = Parser(
        prog=f"perennial {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    try:
        code = _guarded(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _guarded(arguments: list[str]) -> int:
    """Runs a command line; every error that is foreseen becomes a message and an exit code."""
    try:
        return execute(arguments)
    except SystemExit as done:  # argparse: help was printed, or an error
        return done.code if isinstance(done.code, int) else 2
    except BaseException as error:
        found = foreseen(error)
        if found is None:
            raise
        print(found[1], file=sys.stderr)
        return found[0]


def foreseen(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of an error that is foreseen; None for one that is not, which is a bug."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return 2, f"error: {_in_words(error)}"  # a file or the disk, not a bug; where it matters it was made by hand
    if isinstance(error, TrainingStopped):
        return 1, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "stopped"
    return None


def _in_words(error: OSError) -> str:
    from perennial.core.files import explain

    explained = explain(error, Path(os.fsdecode(error.filename)))
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if explained is error else str(explained)


def execute(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code; errors are left to the caller."""
    known = commands()
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"perennial {perennial.__version__}")
        return 0
    if command not in known:
        kind = "option" if command.startswith("-") else "command"
        hint = nearest(command, [*known, "--help", "--version"])
        raise UserError(f"there is no {kind} '{command}'.{hint}\nSee perennial --help")
    parser = parser_of(command)
    parsed = _parse(parser, rest)
    _prepare_threads()
    code: int = load(command).run(parsed)
    return code


def _help() -> str:
    lines = [f"  {name:<10} {load(name).HELP}" for name in commands()]
    return "\n".join(
        [
            "usage: perennial COMMAND ... | perennial COMMAND --help | perennial --version",
            "",
            perennial.__doc__ or "",
            "",
            *lines,
        ]
    )


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """The parsed arguments; options may stand before, between and after the others."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parse = parser.parse_known_args if inner else parser.parse_known_intermixed_args
    parsed, unknown = parse(arguments)
    if unknown:
        parsers = [parser, *(p for action in inner for p in action.choices.values())]
        options = [option for p in parsers for action in p._actions for option in action.option_strings]
        odd = next((u for u in unknown if u.startswith("-")), unknown[0])
        parser.error(f"there is no option or place for '{odd}'.{nearest(odd.partition('=')[0], options)}")
    return parsed


def _prepare_threads() -> None:
    from perennial.core.environment import prepare_threads

    prepare_threads()
