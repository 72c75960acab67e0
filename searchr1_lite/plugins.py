"""Code of yours by name: `retriever=my_module:MySearch` and `reward=my_module:my_reward`.

The module is looked up as `import my_module` would in the current folder. Left out: entry points and registration.
"""

import os
import sys
from importlib import import_module
from inspect import signature
from typing import Any

from searchr1_lite.errors import UserError


class PluginError(UserError):
    """A plug-in that cannot be had; the message says what is wrong with which name."""


def load_plugin(text: str) -> Any:
    """What `module:name` names, which must be callable. Raises PluginError."""
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise PluginError(f"{text}: there is no module {error.name!r} in {os.getcwd()} or installed") from None
        what = f"{type(error).__name__}: {error}"
        raise PluginError(f"{text}: importing {module_name} failed with {what}") from error
    if not hasattr(module, name):
        raise PluginError(f"{text}: {getattr(module, '__file__', module_name)} has no {name!r}")
    if not callable(getattr(module, name)):
        raise PluginError(f"{text}: {name} is not callable but of type {type(getattr(module, name)).__name__}")
    return getattr(module, name)


def make_retriever(text: str, profile: Any) -> Any:
    """The object with `.search(queries, k)` that a class or function makes, of the profile if it takes `profile`."""
    factory = load_plugin(text)
    try:
        takes_profile = "profile" in signature(factory).parameters
        retriever = factory(profile=profile) if takes_profile else factory()
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PluginError(f"{text}: it is called without arguments, or with profile=..., and failed: {what}") from error
    if not callable(getattr(retriever, "search", None)):
        raise PluginError(f"{text}: it made a {type(retriever).__name__}, which has no method search(queries, k)")
    return retriever
