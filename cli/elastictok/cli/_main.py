"""The shell: parse, run, and say what went wrong in one line."""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro.conf
import tyro.extras

from ._commands import COMMANDS

DESCRIPTION = """\
Images and video as as many tokens as the content needs.

An independent implementation of ElasticTok (arXiv 2410.08368). Start with `elastictok demo`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The `elastictok` command.

    Exits with 2 and one line on bad input; `ELASTICTOK_TRACEBACK=1` shows where it was found.
    """
    command: Any = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="elastictok",
        description=DESCRIPTION,
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
    )
    warnings.showwarning = _show_warning
    try:
        command.run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        # Every error that a user can cause names the value, the limit and the remedy.
        if os.environ.get("ELASTICTOK_TRACEBACK") == "1":
            raise
        print(f"elastictok: error: {error}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"elastictok: warning: {message}", file=sys.stderr)
