"""The one number of both distributions; loraexport/version.py is a link to this file."""

__version__ = "0.1.0"
