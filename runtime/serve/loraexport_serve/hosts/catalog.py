"""The artifacts in service by name, and whom a request means by `model`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from loraexport_runtime.slots.batch import RowAdapters, row_names

from ..auth import Caller
from ..errors import ApiError, invalid, unknown_model, unsupported
from .host import Host

H = TypeVar("H", bound=Host)


@dataclass(frozen=True)
class Target:
    """Whom a request means: an artifact, and the base, an adapter or a blend of it."""

    host: Host
    adapter: RowAdapters
    label: str
    """As an answer and the log name it."""

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return row_names([self.adapter])

    @property
    def tag(self) -> str | None:
        """The adapter in metrics; None of the base."""
        adapter = self.adapter
        return adapter if adapter is None or isinstance(adapter, str) else "+".join(sorted(adapter))


class Catalog:
    """Hosts by name. The loop's thread alone uses it; a host is exchanged between two requests."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    def __iter__(self) -> Iterator[Host]:
        return iter(list(self._hosts.values()))

    def __len__(self) -> int:
        return len(self._hosts)

    def get(self, name: str) -> Host | None:
        return self._hosts.get(name)

    def named(self, name: str | None) -> Host:
        """An artifact by its name, or the only one there is. Raises ApiError (404, 400)."""
        if name is None and len(self._hosts) == 1:
            return next(iter(self._hosts.values()))
        if name is None:
            raise invalid("model is missing, and several artifacts are served", "model")
        if name not in self._hosts:
            raise unknown_model(name)
        return self._hosts[name]

    def put(self, host: Host) -> Host | None:
        """Let a host serve under its name from now on. Returns the one that did so far."""
        old = self._hosts.get(host.name)
        self._hosts[host.name] = host
        return old

    def candidates(self, caller: Caller, name: str) -> Iterator[tuple[Host, str]]:
        """Where an adapter of this name may be that is not loaded: (artifact, its name there)."""
        first, has_name, rest = name.partition(":")
        for host in self:
            adapter = rest if has_name and first == host.name else name
            if not host.has(adapter) and caller.may_use(host.name, adapter):
                yield host, adapter

    def clear(self) -> None:
        """Nobody is served any more."""
        self._hosts.clear()

    def resolve(
        self,
        kind: type[H],
        caller: Caller,
        model: str | None,
        blend: Mapping[str, float] | None = None,
    ) -> Target:
        """Whom a request means.

        `model` is an adapter's name, `artifact:adapter`, or an artifact's name for its base; absent
        it is the base where one artifact is served. With a blend it is an artifact, or absent.

        Args:
            kind: the hosts that the route can use.

        Raises:
            ApiError: 404 for what is not there or not this caller's, never the base in its place;
                400 for what this route cannot use, and for a name that several artifacts have.
        """
        target = self._find(caller, model)
        if blend is not None:
            target = self._blend(caller, target, model, blend)
        if not isinstance(target.host, kind):
            raise invalid(
                f"`{target.label}` is of an artifact of kind {target.host.kind}, which this route"
                f" cannot use; it takes one of kind {kind.kind}",
                "model",
            )
        return target

    def _find(self, caller: Caller, model: str | None) -> Target:
        if model is None:
            only = self.named(None)
            return Target(only, None, only.name)
        if (named := self._hosts.get(model)) is not None:
            return Target(named, None, named.name)
        name, has_name, adapter = model.partition(":")
        if has_name:
            hosts = [self._hosts[name]] if name in self._hosts else []
        else:
            adapter, hosts = model, list(self._hosts.values())
        found = [host for host in hosts if host.has(adapter) and caller.may_use(host.name, adapter)]
        if not found:
            raise unknown_model(model)
        if len(found) > 1:
            names = " or ".join(f"`{host.name}:{adapter}`" for host in found)
            raise invalid(f"several artifacts have an adapter `{adapter}`; name {names}", "model")
        return Target(found[0], adapter, model)

    def _blend(
        self, caller: Caller, target: Target, model: str | None, blend: Mapping[str, float]
    ) -> Target:
        if target.adapter is not None:
            raise unsupported("adapters", "with a blend, model names an artifact, not an adapter")
        if not blend:
            raise invalid("adapters is empty; name one at least, or leave it out", "adapters")
        weights = {}
        for name, weight in blend.items():
            own = name.removeprefix(f"{target.host.name}:")
            if not (target.host.has(own) and caller.may_use(target.host.name, own)):
                raise ApiError(
                    404, unknown_model(name).message, code="model_not_found", param="adapters"
                )
            if own in weights:
                raise invalid(f"adapters names `{own}` twice", "adapters")
            weights[own] = weight
        return Target(target.host, weights, model or target.label)
