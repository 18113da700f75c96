"""Where this package keeps what it has fetched, base and encoder of the photos model, and what
experts have found.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from llama_adapter.errors import ConfigError
from llama_adapter.files import expanded

HOME_VARIABLE = "LLAMA_ADAPTER_HOME"
HOME_SCHEME = "home:"
"""`home:NAME/PATH` means a folder inside `home()`."""


def home() -> Path:
    """The folder named by `LLAMA_ADAPTER_HOME`, or else the platform's cache folder for us.

    It need not exist. ConfigError where it would be the home of a user that there is not.
    """
    named = os.environ.get(HOME_VARIABLE)
    if named and str(expanded(named)).startswith("~"):
        raise ConfigError(f"{HOME_VARIABLE} is {named!r}, but no user has that name")
    return expanded(named) if named else platformdirs.user_cache_path("llama-adapter")
