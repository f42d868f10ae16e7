"""The command line ``mdsens``: its commands, their options, and the tables that they print."""

from mdsens.cli.commands import BAD_INPUT, GOOD, UNTRUSTED, main

__all__ = ["BAD_INPUT", "GOOD", "UNTRUSTED", "main"]
