"""The `ligerexport` command: one module per verb, and the application in `app`."""

from ligerexport.cli.app import main as main
