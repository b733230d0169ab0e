"""`python -m loraexport`."""

from .cli import main

main()
