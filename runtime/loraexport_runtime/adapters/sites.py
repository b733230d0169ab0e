"""Module names of an adapter -> the sites of a base."""

from collections.abc import Collection, Iterable, Mapping

from ..contract.naming import Naming
from ..errors import AdapterWeightsError
from .header import AdapterHeader
from .tensor_files import digests_of
from .tensors import AdapterContent

_LIBRARY = "transformers.models."


def match_sites(header: AdapterHeader, sites: Collection[str], naming: Naming) -> dict[str, str]:
    """Site -> module of the adapter that applies there.

    Names are equal as they are, or after one of the base's prefixes is dropped on one side, the
    same for every module: a module trained on `…ForCausalLM` is called `model.layers…`, that of the
    bare model `layers…`. No other leading name is dropped: it is of another model, or of another
    part of this one.

    Raises:
        AdapterWeightsError: a module has no site in this base, or the adapter says that it was
            trained on another architecture or part.
    """
    _check_class(header, naming)
    modules = (*header.modules, *header.saved)
    matched = max((_match(modules, sites, *rule) for rule in _rules(naming)), key=len)
    missing = sorted(set(header.modules) - set(matched.values()))
    if missing:
        raise AdapterWeightsError(
            f"{header.path}: {len(missing)} of {len(header.modules)} modules have no site in this"
            f" base, first {missing[0]!r}. Sites here: {_some(sorted(sites))}."
            f" {_advice(missing, sites, naming)}"
        )
    homeless = sorted(set(header.saved) - set(matched.values()))
    if homeless:
        raise AdapterWeightsError(
            f"{header.path}: it brings {homeless[0]!r}, trained whole (modules_to_save), for which"
            " there is no place here. Choose a task whose model has this layer, and where adapters"
            " with heads come later, add features: [heads] to the spec; then build again"
        )
    return matched


def trained_architecture(header: AdapterHeader) -> str | None:
    """`bert` of an adapter that says that it was trained on transformers.models.bert…"""
    library = (header.trained_class or "").rpartition(".")[0]
    is_known = library.startswith(_LIBRARY)
    return library.removeprefix(_LIBRARY).partition(".")[0] if is_known else None


def seen_naming(adapters: Iterable[tuple[AdapterHeader, Collection[str]]]) -> Naming:
    """The prefixes that stand between adapters' names and those of the sites that they fit.

    For artifacts of a format that does not say them: what the adapters in it had, and no more.
    """
    prefixes = set()
    for header, sites in adapters:
        for site in sites:
            for module in (*header.modules, *header.saved):
                for longer, shorter in ((module, site), (site, module)):
                    if longer.endswith(f".{shorter}"):
                        prefixes.add(longer.removesuffix(f".{shorter}"))
    return Naming(None, tuple(sorted(prefixes)), ())


def check_base_copies(
    header: AdapterHeader,
    matched: Mapping[str, str],
    base_weights: Mapping[str, str],
    naming: Naming,
    content: AdapterContent | None = None,
) -> None:
    """PEFT saves embeddings' own weights beside the LoRA, of one that has LoRA or was resized, and
    puts them into the base: hold each to the base's digest.

    Raises:
        AdapterWeightsError: it differs, so the adapter was trained on another embedding; or the
            base has none of this name.
    """
    if not header.base_copies:
        return
    content = content or AdapterContent(header)
    site_of = {module: site for site, module in matched.items()}
    for module, (name, info) in header.base_copies.items():
        site = site_of.get(module) or base_name(module, base_weights, naming)
        if site is None:
            raise AdapterWeightsError(
                f"{header.path}: it carries the base weight {name!r}, and of this base no weight of"
                " that name is known to hold it to. If it was not trained, save the adapter again"
                " with peft: model.save_pretrained(folder, save_embedding_layers=False); if it was,"
                " name it in modules_to_save"
            )
        copy = content.arrays([(name, info)])[name]
        if base_weights[site] not in digests_of(copy):
            raise AdapterWeightsError(
                f"{header.path}: it carries the base weight {name!r}, which differs from the weight"
                " of this base: the adapter was trained on another embedding, or in a smaller"
                " dtype. If this is its base, save the adapter again with peft:"
                " model.save_pretrained(folder, save_embedding_layers=False)"
            )


def base_name(module: str, names: Collection[str], naming: Naming) -> str | None:
    """What one of a base's modules is called that an adapter names; None where it has none such."""
    matches = (_match([module], names, *rule) for rule in _rules(naming))
    return next((name for matched in matches for name in matched), None)


def _rules(naming: Naming) -> list[tuple[str, str]]:
    """What may stand before a module's name, and what before a site's."""
    prefixes = [f"{prefix}." for prefix in naming.prefixes]
    return [
        ("", ""),
        *((prefix, "") for prefix in prefixes),
        *(("", prefix) for prefix in prefixes),
    ]


def _match(
    modules: Iterable[str], sites: Collection[str], of_module: str, of_site: str
) -> dict[str, str]:
    """Site -> module, by names without `of_module` in front, or without `of_site`."""
    return {
        site: module
        for module in modules
        if module.startswith(of_module)
        and (site := of_site + module.removeprefix(of_module)) in sites
    }


def _check_class(header: AdapterHeader, naming: Naming) -> None:
    """Hold the class that PEFT notes in auto_mapping to the base's."""
    architecture = trained_architecture(header)
    if naming.architecture is None or architecture is None:
        return
    name = (header.trained_class or "").rpartition(".")[2]
    if architecture == naming.architecture and name not in naming.other_parts:
        return
    what = "another part of the model" if architecture == naming.architecture else "another model"
    raise AdapterWeightsError(
        f"{header.path}: it was trained on {name} of {architecture!r} (auto_mapping in its config),"
        f" which is {what} than this base, of {naming.architecture!r}. Its modules may be called"
        " alike, and its numbers mean nothing here; take the adapter of this base"
    )


def _advice(missing: Collection[str], sites: Collection[str], naming: Naming) -> str:
    """What to do about modules without a site; what they are of, if they say so."""
    first_names = {name.partition(".")[0] for name in missing}
    expected = {site.partition(".")[0] for site in sites} | set(naming.prefixes)
    if len(first_names) == 1 and not first_names & expected:
        (part,) = first_names
        of_base = f" (of {naming.architecture!r})" if naming.architecture else ""
        ways = [f"{prefix!r}" for prefix in naming.prefixes]
        more = "; nothing says what may stand before its modules, as a config.json beside it would"
        if ways:
            more = f"; before its modules stands {' or '.join(ways)}, or nothing"
        return (
            f"All that have none are of {part!r}, which is not a part of this base{of_base}{more}."
            " Take the adapter of this base, or name the spec's sites as the adapter does"
        )
    return "Add the missing sites to the spec, or check that the adapter belongs to this base"


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
