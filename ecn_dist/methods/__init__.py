"""The table of methods: what a paper adds to the trainer, a file or folder each. Imports neither torch nor a method."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ecn_dist.errors import UserError
from ecn_dist.methods.camstyle.options import CamStyleOptions
from ecn_dist.methods.cluster.options import ClusterOptions
from ecn_dist.methods.fmcl.options import FMCLOptions
from ecn_dist.methods.hhl.options import HHLOptions

if TYPE_CHECKING:
    from ecn_dist.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """What the table tells of a method without loading it."""

    home: str  # module:class of its `Method`
    domains: tuple[str, ...] = ("source", "target")  # shard folders it needs; the other one is for evaluation only
    options: type | None = None  # dataclass of the section under the method's own name
    reads: tuple[str, ...] = ()  # keys, or beginnings of keys, of `OF_SOME_METHODS`


# Options that not every method reads. One that the chosen method does not read is refused unless it has its default.
OF_SOME_METHODS = ("memory.", "loss.", "model.embedding_dim", "model.dropout", "data.camera_style")

_HEADS = ("model.embedding_dim", "model.dropout")

METHODS: dict[str, Entry] = {
    "ecn": Entry("ecn_dist.methods.ecn.method:ECN", reads=("memory.", "loss.", "data.camera_style", *_HEADS)),
    "cluster": Entry(
        "ecn_dist.methods.cluster.method:Cluster",
        domains=("target",),
        options=ClusterOptions,
        reads=("memory.temperature", "data.camera_style", *_HEADS),
    ),
    "hhl": Entry("ecn_dist.methods.hhl.method:HHL", options=HHLOptions, reads=("data.camera_style", *_HEADS)),
    "fmcl": Entry(
        "ecn_dist.methods.fmcl.method:FMCL",
        options=FMCLOptions,
        reads=("memory.temperature", "memory.dtype", "loss.", "data.camera_style", *_HEADS),
    ),
    "camstyle": Entry(
        "ecn_dist.methods.camstyle.method:CamStyle",
        domains=("source",),
        options=CamStyleOptions,
        reads=("data.camera_style", *_HEADS),
    ),
    "source_only": Entry("ecn_dist.methods.source_only:SourceOnly", domains=("source",), reads=_HEADS),
}


def entry(name: str) -> Entry:
    """The method called `name`. Raises `UserError` for an unknown one, with the nearest known."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(METHODS)}"
    raise UserError(f"method: {name!r} is unknown{hint}")


def load(name: str) -> "type[Method]":
    """The class of the method called `name`. Raises `UserError` for an unknown one."""
    module, _, attribute = entry(name).home.partition(":")
    return getattr(importlib.import_module(module), attribute)


def unread(name: str, key: str) -> bool:
    """Whether the method called `name` has no use for the option `key`."""
    of_others = tuple(f"{other}." for other in METHODS if other != name)
    return key.startswith(of_others) or (key.startswith(OF_SOME_METHODS) and not key.startswith(entry(name).reads))


def describe(options: Mapping[str, Any]) -> str:
    """A run's method in a sentence or two, from its options by dotted key. For report and model card."""
    name = options.get("method", "ecn")
    return load(name).describe(options) if name in METHODS else f"Method: {name}."
