"""Search engines and rewards of your own, by name: `retriever=my_module:MySearch`, `reward=my_module:my_reward`.

The module is imported as Python does it, the current folder included; whoever names one runs its code.
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from searchr1_lite.errors import UserError
from searchr1_lite.types import Retriever

RESERVED = ("index", "faiss", "milvus", "online", "http", "https")  # what else may stand before a colon


class PluginError(UserError):
    """A name that leads to nothing that can be used; the message says what is missing."""


def is_plugin(name: str) -> bool:
    """Whether `name` has the form module:Name, and is nothing else that a setting can say."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)) and name.partition(":")[0] not in RESERVED


def load_plugin(name: str) -> Any:
    """What `name` leads to; raises PluginError."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        value = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise PluginError(f"{name}: there is no module {error.name!r}, neither installed nor in {here}") from None
    except Exception as error:  # whatever the module's own code raises
        raise PluginError(f"{name}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    if value is None:
        raise PluginError(f"{name}: the module {module} has no {attribute!r}")
    return value


def load_search(name: str) -> Retriever:
    """An instance of the class that `name` leads to, made without arguments (or what is there, if it is no class)."""
    value = load_plugin(name)
    try:
        retriever = value() if isinstance(value, type) else value
    except Exception as error:
        raise PluginError(f"{name}: {name.partition(':')[2]}() failed ({type(error).__name__}: {error})") from error
    if not callable(getattr(retriever, "search", None)):
        raise PluginError(f"{name}: it has no method search(queries, k)")
    return retriever
