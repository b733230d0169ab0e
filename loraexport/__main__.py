"""`python -m loraexport`."""

from .cli.app import main

main()
