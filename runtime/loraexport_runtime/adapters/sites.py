"""Module names of an adapter -> the sites of a base."""

from collections import Counter
from collections.abc import Collection, Mapping

from ..errors import AdapterWeightsError
from .header import AdapterHeader
from .tensor_files import digests_of, read_tensors


def match_sites(header: AdapterHeader, sites: Collection[str]) -> dict[str, str]:
    """Site -> module of the adapter that applies there.

    A module trained on `…ForCausalLM` carries one more leading name than the bare model, and the
    other way round: names are equal as they are, or after one leading name is dropped on one side,
    the same side for every module.

    Raises:
        AdapterWeightsError: a module has no site in this base.
    """
    best: dict[str, str] = {}
    for drop_module, drop_site in ((0, 0), (1, 0), (0, 1)):
        known: dict[str, list[str]] = {}
        for site in sites:
            known.setdefault(_drop(site, drop_site), []).append(site)
        hits = [
            (site, module)
            for module in (*header.modules, *header.saved)
            for site in known.get(_drop(module, drop_module), ())
        ]
        found = dict(hits)
        if len(found) <= len(best):
            continue
        of_site = Counter(site for site, _ in hits)
        of_module = Counter(module for _, module in hits)
        twice = [hit for hit in hits if of_site[hit[0]] > 1 or of_module[hit[1]] > 1]
        if twice:
            (site, module), (other_site, other_module) = twice[:2]
            raise AdapterWeightsError(
                f"{header.path}: module {module!r} fits site {site!r} but for the first name, and"
                f" {other_module!r} fits {other_site!r}: it is not clear which belong together."
                " Name the spec's sites as the adapter names its modules"
            )
        best = found
    homeless = sorted(set(header.saved) - set(best.values()))
    if homeless:
        raise AdapterWeightsError(
            f"{header.path}: it brings {homeless[0]!r}, trained whole (modules_to_save), for which"
            " there is no place here. Choose a task whose model has this layer, and where adapters"
            " with heads come later, add features: [heads] to the spec; then build again"
        )
    missing = sorted(set(header.modules) - set(best.values()))
    if missing:
        raise AdapterWeightsError(
            f"{header.path}: {len(missing)} of {len(header.modules)} modules have no site in this"
            f" base, first {missing[0]!r}. Sites here: {_some(sorted(sites))}."
            " Add the missing sites to the spec, or check that the adapter belongs to this base"
        )
    return best


def check_base_copies(
    header: AdapterHeader, matched: Mapping[str, str], base_weights: Mapping[str, str]
) -> None:
    """PEFT saves an embedding's own weight beside its LoRA: hold it to the base's digest.

    Raises:
        AdapterWeightsError: it differs, so the adapter was trained on another embedding.
    """
    site_of = {module: site for site, module in matched.items()}
    for module, (name, info) in header.base_copies.items():
        site = site_of.get(module)
        if site is None or base_weights[site] not in digests_of(read_tensors([(name, info)])[name]):
            raise AdapterWeightsError(
                f"{header.path}: it carries the base weight {name!r}, which differs from the weight"
                " of this base: the adapter was trained on another embedding, or in a smaller"
                " dtype. If this is its base, save the adapter again with peft:"
                " model.save_pretrained(folder, save_embedding_layers=False)"
            )


def _drop(name: str, count: int) -> str:
    return name.split(".", count)[-1] if count else name


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
