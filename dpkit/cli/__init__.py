"""The command line: `dpkit --help` teaches, every error is one line, Ctrl-C stops cleanly."""
from __future__ import annotations

import sys
from typing import Annotated

import typer

from dpkit import __version__
from dpkit.cli import distil, factorial, look, make, tickets, timing
from dpkit.cli.shared import open_store, out, plan_of, settings_of

__all__ = ["app", "joined", "main", "open_store", "plan_of", "settings_of"]

HELP = """Distilled pruning, reproduced: distillation, iterative magnitude pruning, linear mode connectivity, Hessians.

A study is a list of parameters. A profile sets them (smoke: seconds, quick: minutes, cifar10-small: two to three hours); --set
changes any of them. Every network, ticket, path and spectrum is an artifact in a store under a key that says what made it,
so a command that is stopped continues, and what exists is never computed again.

\b
  dpkit predict --profile quick                             time, memory and disk, before anything starts
  dpkit study --profile quick                               all notebooks, as `make book` does
  dpkit run 03-tickets -p width 24 -p rounds 3              one notebook with other parameters
  dpkit compute --profile cifar10-small --device cuda       the same artifacts without notebooks
  dpkit distill make idc --profile quick                    one small set and its accuracy; also import, export, list
  dpkit arms                                                the ways to find a mask
  dpkit ticket export imp --out tickets/imp.safetensors     one ticket for other code; also make, list, show, compare
  dpkit numbers --profile quick                             every number with n and interval
  dpkit lineage tickets.imp.accuracy@67 --profile quick     where a number comes from
"""

#: base of all usage errors, whichever of its versions' homes typer keeps it in
UsageProblem = typer.BadParameter.__mro__[2]

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  add_completion=False)
app.add_typer(make.app)
app.add_typer(look.app)
app.add_typer(factorial.app)
app.add_typer(timing.app)
app.add_typer(distil.app, name="distill", help="One small set at a time: make, import, export, list.")
app.add_typer(tickets.app, name="ticket", help="One ticket at a time: make, list, export, show, compare.")


def _version(value: bool) -> None:
    if value:
        out.print(f"dpkit {__version__}")
        raise typer.Exit()


@app.callback()
def top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Options of all commands."""


top.__doc__ = HELP


def joined(arguments: list[str]) -> list[str]:
    """``-p NAME VALUE``, as papermill has it, as one word ``NAME=VALUE``; ``-p NAME=VALUE`` stays."""
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        if word in ("-p", "--parameter") and rest:
            name = rest.pop(0)
            if "=" not in name:
                if not rest:
                    raise ValueError(f"-p takes a name and a value; {name} has no value")
                name = f"{name}={rest.pop(0)}"
            words += ["-p", name]
        else:
            words.append(word)
    return words


def main() -> None:
    """Entry point: errors that a person can mend are one line on standard error and a status that is not 0."""
    from dpkit.store import Missing

    try:
        code = app(args=joined(sys.argv[1:]), prog_name="dpkit", standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("dpkit: stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except UsageProblem as error:
        text = error.format_message().strip().rstrip(".")
        where = error.ctx.command_path if error.ctx else "dpkit"
        # a command that needs a subcommand and gets none says its whole help
        print(text if "\n" in text else f"dpkit: {text}; see `{where} --help`", file=sys.stderr)
        sys.exit(error.exit_code)
    except (ValueError, RuntimeError, Missing, OSError, ImportError) as error:
        if not str(error).strip():
            raise
        print(f"dpkit: {str(error).strip()}", file=sys.stderr)
        sys.exit(2)
