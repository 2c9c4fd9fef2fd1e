"""The user's own code, named as `package.module:function`, beside ours: both may have a package called `engine`.

While their code is imported, built or unpickled, `user_modules` puts their packages of our names into sys.modules in
place of ours, and the current directory first on sys.path. Import statements that their functions run later (in
forward, in backward, in a thread) are told from ours by the file they stand in, and run in the same way. Limit: a late
`importlib.import_module("engine.x")` is no import statement and finds ours.
"""

import builtins
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from engine.errors import SSDKDError

OUR_NAMES = ("engine", "exporters", "profiles", "ssdkd_cli")
OUR_FOLDER = Path(__file__).resolve().parents[1]
OUR_FILES = tuple(f"{OUR_FOLDER / name}{os.sep}" for name in OUR_NAMES)
INSTALLED = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))
# What functions call the two facts that a teacher's file or a teacher gives them.
ARGUMENT_NAMES = {
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels"),
}

_lock = threading.RLock()
_active: list[Path] = []  # the roots of the user_modules() that are open, one in another
_loaded: dict[Path, dict[str, ModuleType]] = {}  # root -> the user's modules of our names, while ours are in place
_python_import = builtins.__import__


@contextlib.contextmanager
def user_modules(root: Path | None = None) -> Iterator[None]:
    """Lets imports and unpickling find the user's packages under `root` (default: the current directory) before ours.

    Ours are back on exit, and theirs are kept for the import statements that their code runs later. Packages of our
    names that the user does not have stay ours.
    """
    root = (root or Path.cwd()).resolve()
    with _lock:
        if root in _active[-1:]:
            yield
            return
        theirs = _loaded.setdefault(root, {})
        builtins.__import__ = _import
        path = sys.path[:]
        sys.path[:] = _user_path(root)
        specs = {name: spec for name in OUR_NAMES if (spec := _users_spec(name)) is not None}
        ours = _take_modules(specs)
        sys.modules.update(theirs)
        for name, spec in specs.items():
            # A folder without __init__.py would lose against our package, wherever that lies on sys.path.
            if spec.origin is None:
                sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
        _active.append(root)
        try:
            yield
        finally:
            _active.pop()
            theirs.update(_take_modules(specs))
            sys.modules.update(ours)
            sys.path[:] = path


def call_user_function(reference: str, **kwargs: Any) -> nn.Module:
    """The network that the user's `package.module:function` returns; imported from the current directory first.

    Of `kwargs` (classes, channels) the function is given those that its signature names, also under the usual other
    names (`num_classes`, `in_channels`; see ARGUMENT_NAMES).

    Raises:
        SSDKDError: a malformed reference, no such module or function, an exception in the user's code, arguments that
            we cannot give, or a result that is no nn.Module.
    """
    module_name, _, function_name = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise SSDKDError(
            f"'{reference}' names no function: expected package.module:function",
            "write it as you would import it, for example models.resnet:build_teacher",
        )
    importlib.invalidate_caches()
    with user_modules():
        function = getattr(module := _import_users(module_name), function_name, None)
        if not callable(function):
            near = difflib.get_close_matches(function_name, [name for name in vars(module) if name[0] != "_"])
            raise SSDKDError(
                f"module '{module_name}' ({module.__file__}) has no function '{function_name}'",
                f"did you mean {' or '.join(near)}?" if near else "check the name behind the colon",
            )
        arguments = _accepted_arguments(reference, function, kwargs)
        try:
            network = function(**arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything: it is theirs to correct
            raise _failed(f"{reference} failed", error, f"call {function_name} in Python to see it alone") from error
    if not isinstance(network, nn.Module):
        raise SSDKDError(
            f"{reference} returned a {type(network).__name__}: expected a torch.nn.Module",
            "return the network itself from the function",
        )
    return network


def _import_users(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise SSDKDError(
                f"there is no module '{missing}' in {Path.cwd()}, nor is one installed",
                f"run ssdkd in the folder that holds {missing.replace('.', '/')}, or put that folder on PYTHONPATH",
            ) from error
        hint = f"install {missing} beside ssdkd, or run ssdkd in the folder that holds it"
        raise _failed(f"importing '{module_name}' failed", error, hint) from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything: it is theirs to correct
        hint = f'run `python -c "import {module_name}"` to see it alone'
        raise _failed(f"importing '{module_name}' failed", error, hint) from error


def _accepted_arguments(reference: str, function: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a callable without a signature, as some builtins are
        return {}
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [name for name, parameter in parameters.items() if parameter.kind in by_keyword]
    arguments = {
        alias: value for name, value in offered.items() for alias in ARGUMENT_NAMES.get(name, (name,)) if alias in named
    }
    unknown = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (*by_keyword, inspect.Parameter.POSITIONAL_ONLY)
        and name not in arguments
    ]
    if unknown:
        raise SSDKDError(
            f"{reference} needs the argument(s) {', '.join(unknown)}: ssdkd can give {', '.join(offered) or 'none'}",
            "name a function that needs no others; it can call yours with the values that you want",
        )
    return arguments


def _failed(what: str, error: BaseException, hint: str) -> SSDKDError:
    frame = error.__traceback__
    place = ""
    while frame is not None:
        code = frame.tb_frame.f_code
        if _root_of(code.co_filename) is not None:
            place = f" ({code.co_filename}:{frame.tb_lineno})"
        frame = frame.tb_next
    return SSDKDError(f"{what} with {type(error).__name__}: {error}{place}", hint)


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Python's __import__; inside user_modules() where the statement stands in a file of the user's."""
    root = _root_of((globals or {}).get("__file__"))
    if root is None:
        return _python_import(name, globals, locals, fromlist, level)
    if globals and (module := _already_imported(root, name, globals, fromlist or (), level)):
        return module
    with user_modules(root):
        return _python_import(name, globals, locals, fromlist, level)


def _already_imported(
    root: Path, name: str, globals: Mapping[str, Any], fromlist: Sequence[str], level: int
) -> ModuleType | None:
    """What an import statement gives whose modules are all there: forward may run one for every image batch."""
    full_name = importlib.util.resolve_name("." * level + name, globals.get("__package__"))
    modules = _loaded[root] if full_name.partition(".")[0] in _loaded[root] else sys.modules
    module = modules.get(full_name)
    if fromlist:
        return module if all(hasattr(module, attribute) for attribute in fromlist) else None
    return module and modules.get(full_name.partition(".")[0])


def _root_of(file: object) -> Path | None:
    """The folder of the user's code in which `file` lies; None for installed files, ours, and what is no file."""
    if not isinstance(file, str):
        return None
    root = next((root for root in _loaded if file.startswith(f"{root}{os.sep}")), None)
    return None if file.startswith(OUR_FILES) or any(part in file for part in INSTALLED) else root


def _user_path(root: Path) -> list[str]:
    """sys.path with `root` first and the folder of our packages last."""
    ours = [entry for entry in sys.path if Path(entry).resolve() == OUR_FOLDER]
    others = [entry for entry in sys.path if entry not in ours and Path(entry).resolve() != root]
    return [str(root), *others, *(entry for entry in ours if root != OUR_FOLDER)]


def _users_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where the user's own package or module called `name` is, if they have one."""
    return PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).resolve() != OUR_FOLDER])


def _take_modules(names: Iterable[str]) -> dict[str, ModuleType]:
    """Takes the modules of these top-level names out of sys.modules."""
    tops = frozenset(names)
    found = [module for module in sys.modules if module.partition(".")[0] in tops]
    return {module: sys.modules.pop(module) for module in found}
