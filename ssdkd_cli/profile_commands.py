"""`ssdkd profiles` and `ssdkd profiles show`: what ssdkd knows of a device, and where each number comes from."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ssdkd_cli import console
from ssdkd_cli.boundary import within_boundary
from ssdkd_cli.options import JSON
from ssdkd_cli.outcome import Outcome, printed
from ssdkd_cli.words import milliseconds

NONE = "none"


def profiles(context: typer.Context, json: Annotated[bool, JSON] = False) -> None:
    """List the device profiles: runtime, precision, batches and budget of each device that ssdkd knows.

    `ssdkd profiles show NAME` has every number with its source. A profile of your own is a .toml file.

    Example: [bold]ssdkd profiles[/bold]
    """
    if context.invoked_subcommand is None:
        within_boundary(_list)(json=json)


def _list(json: bool) -> Outcome:
    from profiles import load_profile, profile_names

    found = [load_profile(name) for name in profile_names()]
    rows = [
        (
            profile.name,
            profile.runtime,
            profile.precision,
            "/".join(str(batch) for batch in dataclasses.astuple(profile.batches)),
            milliseconds(profile.latency_budget_ms) if profile.latency_budget_ms else NONE,
            f"{profile.memory_budget_mb} MB" if profile.memory_budget_mb else NONE,
            profile.summary,
        )
        for profile in found
    ]
    head = ("profile", "runtime", "precision", "batches", "latency", "memory", "")
    caption = "batches: smallest/usual/largest; latency: budget of one image; sources: ssdkd profiles show NAME"
    return printed(json, found, functools.partial(console.print_table, head, rows, right=(3, 4, 5), caption=caption))


def list_profiles(json: Annotated[bool, JSON] = False) -> Outcome:
    """List the device profiles, as `ssdkd profiles` does.

    Example: [bold]ssdkd profiles list[/bold]
    """
    return _list(json)


def show(
    context: typer.Context,
    profile: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="A name from `ssdkd profiles`, or a .toml file.", show_default=False),
    ],
    json: Annotated[bool, JSON] = False,
) -> Outcome:
    """Show a device profile: each value, and the source that it comes from.

    Example: [bold]ssdkd profiles show jetson-orin[/bold]
    """
    from profiles import load_profile

    found = load_profile(profile)
    json |= bool(context.parent and context.parent.params["json"])  # `profiles --json show NAME` means the same
    values = dataclasses.asdict(found)
    title, summary, sources = values.pop("name"), values.pop("summary"), values.pop("sources")
    facts = {key: _with_source(value, sources.get(key)) for key, value in _dotted(values).items()}
    return printed(json, found, functools.partial(console.print_facts, f"{title}: {summary}", facts))


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by their keys as [sources] writes them: quantization.activations."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _with_source(value: object, source: str | None) -> str:
    """Return the value in the words of the file, lists aside, and the source behind it."""
    text = NONE if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"{text}  ({source})" if source else text


app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.callback(invoke_without_command=True)(profiles)
app.command("list")(within_boundary(list_profiles))
app.command("show")(within_boundary(show))
