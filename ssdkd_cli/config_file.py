"""ssdkd.toml: values for the options that were not typed, read and written.

[compress]            keys are the options' names; a run's config.toml holds them all
[distillation]        keys are the fields of engine.config.DistillationSettings, for ablations
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import typer

from engine.errors import SSDKDError

TABLES = ("compress", "distillation")
FORM = "a run's config.toml shows the form"


def read_config(path: Path) -> dict[str, dict[str, object]]:
    """The tables of a config file, each a dict, empty where the file has none.

    Raises:
        SSDKDError: no such file, not TOML, a table of another name, or a value that no path or name can hold.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SSDKDError(f"--config {path} cannot be read: {error.strerror}", "check the path") from None
    except ValueError as error:  # tomllib's own, a file that is no text, a number of thousands of digits
        raise SSDKDError(f"--config {path} is not TOML: {error}", FORM) from None
    except RecursionError:
        raise SSDKDError(
            f"--config {path}: expected a value for each key; found lists too deeply nested to be read", FORM
        ) from None
    for name, table in tables.items():
        if name not in TABLES or not isinstance(table, dict):
            raise SSDKDError(
                f"--config {path}: expected the tables [compress] and [distillation]; found '{name}'",
                f"move '{name}' under [compress], or delete it",
            )
        for key, value in table.items():
            if isinstance(value, dict):
                raise SSDKDError(f"--config {path}, table [{name}]: expected a value for '{key}', found a table", FORM)
            if any("\0" in str(item) for item in (value if isinstance(value, list) else [value])):
                raise SSDKDError(f"--config {path}, table [{name}]: '{key}' holds a NUL character", "take it out")
    return {name: dict(tables.get(name, {})) for name in TABLES}


def apply_config(context: typer.Context, path: Path | None) -> Path | None:
    """Typer's callback of --config: the file's values become the defaults of this command's options."""
    if path is None:
        return None
    table = read_config(path)["compress"]
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if len(values) < len(table):
        twice = next(key for key in table if "-" in key and key.replace("-", "_") in table)
        raise SSDKDError(
            f"--config {path}: expected each option once, found {twice} and {twice.replace('-', '_')}", "delete one"
        )
    if "teacher" in values and context.info_name == "demo":
        raise SSDKDError(
            f"--config {path} names a teacher; the demo has its own",
            f"ssdkd compress --config {path}, or delete 'teacher' from the file",
        )
    if values.get("trust_pickle"):
        raise SSDKDError(
            f"--config {path} has trust-pickle: a file cannot give leave to run what is in another file",
            "delete it there, and type --trust-pickle if you trust the teacher's file",
        )
    options = {str(option.name): option for option in context.command.params if option.name not in ("config", "help")}
    where = f"--config {path}, table [compress]"
    check_keys(values, options, where)
    for key, value in values.items():
        if isinstance(value, bool) and not getattr(options[key], "is_flag", False):
            name = key.replace("_", "-")
            raise SSDKDError(
                f"{where}: expected words or a number for '{name}', found {str(value).lower()}",
                f"delete '{name}', or write what it takes: `ssdkd {context.info_name} --help` says it",
            )
    defaults = {key: _as_typed(value, is_repeatable=options[key].multiple) for key, value in values.items()}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def check_keys(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises SSDKDError, with the nearest known key, for the first unknown one."""
    known = sorted(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise SSDKDError(f"{where}: unknown key '{key}'", hint)


def _as_typed(value: object, *, is_repeatable: bool) -> object:
    """A TOML value as the same words would stand on the command line: a list is joined, unless they can be repeated."""
    if isinstance(value, bool):
        return value
    words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words if is_repeatable else ",".join(words)


def write_config(
    compress: Mapping[str, object], distillation: Mapping[str, object], settings: Mapping[str, object]
) -> str:
    """The text of a config file that repeats a run.

    Args:
        compress: options, by their names; None is left out.
        distillation: settings that differ from what --effort gives.
        settings: every setting; those that --effort gave are listed as comments, so that --effort keeps its meaning.
    """
    has_own_code = any(":" in str(compress.get(option)) for option in ("student", "arch"))
    where = " in the folder in which it was started, where your own code is" if has_own_code else ""
    lines = [f"# Repeat this run{where}: ssdkd compress --config THIS_FILE --out OTHER", "", "[compress]"]
    lines += [f"{name.replace('_', '-')} = {_toml(value)}" for name, value in compress.items() if value is not None]
    lines += ["", "[distillation]"]
    lines += [f"{name} = {_toml(value)}" for name, value in distillation.items()]
    lines += [f"# {name} = {_toml(value)}" for name, value in settings.items() if name not in distillation]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
