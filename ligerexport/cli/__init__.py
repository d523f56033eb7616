"""The `ligerexport` command: one module a verb, and the application that gathers them in `app`."""

from ligerexport.cli.app import main as main
