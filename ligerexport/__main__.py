"""`python -m ligerexport` is the `ligerexport` command."""

from ligerexport.cli import main

if __name__ == "__main__":
    main()
