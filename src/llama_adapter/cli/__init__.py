"""The command line: one module a command, each of which parses, calls and prints.

Exit status: 0 done, 2 bad usage or bad input (one clear message), 1 internal failure. Logs and
progress go to stderr; with `--json`, stdout holds exactly one JSON object. Modules of commands
import what is heavy inside their functions, so that `--help` is instant.
"""

from llama_adapter.cli.app import app, main

__all__ = ["app", "main"]
