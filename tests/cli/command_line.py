"""Runs the command as the installed script does, in this process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

from hmi_engine.cli import main, output


def hmi(*arguments, text=""):
    """Runs the command in this process, as the installed script does: exit code and both streams.

    ``text`` is what comes on standard input: a string, or bytes that need be no UTF-8.
    """
    given = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text), "utf-8")
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["hmi", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", given),
        mock.patch.dict("os.environ", {"COLUMNS": "200"}),
        mock.patch.object(output.console, "_width", 200),  # where COLUMNS was set when it was made
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
