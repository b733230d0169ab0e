"""Which module each product of an ONNX graph is: by a rule of the spec, or by the graph's names."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from loraexport_runtime.errors import quoted

from ..errors import BaseModelError
from ..spec.schema import SiteRule
from .products import Product, packed_parts, packed_whole


@dataclass(frozen=True)
class Place:
    """Sites that one product computes, or one site that several do; their outputs side by side."""

    products: tuple[Product, ...]
    sites: dict[str, int]
    """Site -> its outputs."""


def find_places(
    products: Sequence[Product],
    rules: Sequence[SiteRule],
    config: Mapping[str, Any] | None,
    modules: Collection[str],
    file: Path,
) -> list[Place]:
    """The sites of the products: by a rule, else by the name that the graph has for them."""
    ruled: dict[str, Place] = {}
    for rule in rules:
        hits = [(product, match) for product in products if (match := _fits(rule.node, product))]
        if not hits:
            names = ", ".join(str(product.node.name) for product in products[:3])
            raise BaseModelError(
                f"base.sites: no product of {file} is named {rule.node!r}; it has {len(products)},"
                f" such as {names}"
            )
        for product, match in hits:
            ruled[product.output] = Place((product,), _ruled(rule, product, match.groups()))
    unruled = [product for product in products if product.output not in ruled]
    by_name = _by_name(unruled, modules, file)
    places = list(ruled.values())
    if config is None:
        places += [
            Place((product,), {name: product.out_features}) for name, product in by_name.items()
        ]
    else:
        remaining = {
            name.replace(".attn.", ".self_attn."): product for name, product in by_name.items()
        }
        while remaining:
            places.append(_take_genai_place(remaining, config, modules))
    order = {product.output: index for index, product in enumerate(products)}
    return sorted(places, key=lambda place: order[place.products[0].output])


def _by_name(
    products: Sequence[Product], modules: Collection[str], file: Path
) -> dict[str, Product]:
    """The products that the graph has a name of their own for, by the surest one."""
    names = Counter(product.names[0] for product in products if product.names)
    twice = [name for name, count in names.items() if count > 1 and _is_module(name, modules)]
    if twice:
        raise BaseModelError(
            f"{file}: {names[twice[0]]} products are site {twice[0]!r}; tell them apart with"
            " base.sites"
        )
    return {
        product.names[0]: product
        for product in products
        if product.names and names[product.names[0]] == 1
    }


def _is_module(site: str, modules: Collection[str]) -> bool:
    """Whether an adapter names it, its own prefix or the site's left out."""
    return any(module.endswith(site) or site.endswith(module) for module in modules)


def _take_genai_place(
    remaining: dict[str, Product], config: Mapping[str, Any], modules: Collection[str]
) -> Place:
    """Of onnxruntime-genai, which packs q, k, v and gate, up, or splits them, unlike the adapters.

    What is placed is taken out of `remaining`.
    """
    name, product = next(iter(remaining.items()))
    whole, every = packed_whole(name)
    if _is_module(whole, modules) and all(part in remaining for part in every):
        split = tuple(remaining.pop(part) for part in every)
        return Place(split, {whole: sum(part.out_features for part in split)})
    del remaining[name]
    parts, decoder = packed_parts(name), config["decoder"]
    if len(parts) == 1:
        return Place((product,), {name: product.out_features})
    if len(parts) == 2:
        return Place((product,), dict.fromkeys(parts, product.out_features // 2))
    heads = (decoder["num_attention_heads"], *[decoder["num_key_value_heads"]] * 2)
    sizes = [count * decoder["head_size"] for count in heads]
    return Place((product,), dict(zip(parts, sizes, strict=True)))


def _fits(pattern: str, product: Product) -> "regex.Match[str] | None":
    parts = map(regex.escape, pattern.split("*"))
    whole = regex.compile(r"([^/.]*)".join(parts), regex.VERSION0)
    try:
        return whole.fullmatch(str(product.node.name), timeout=1.0, concurrent=True)
    except TimeoutError as error:  # of some thirty *
        raise BaseModelError(
            f"base.sites: {quoted(pattern)} takes too long to match with a node's name; write it"
            " with fewer *"
        ) from error


def _ruled(rule: SiteRule, product: Product, texts: Sequence[str]) -> dict[str, int]:
    sites = (rule.site,) if isinstance(rule.site, str) else rule.site
    widths = rule.widths or (product.out_features,)
    if len(widths) != len(sites) or sum(widths) != product.out_features:
        raise BaseModelError(
            f"base.sites: {rule.node!r} has {product.out_features} outputs, and its {len(sites)}"
            f" sites {sum(widths)} in {len(widths)} widths; give each site's own"
        )
    names = []
    for site in sites:
        if site.count("*") > len(texts):
            raise BaseModelError(f"base.sites: site {site!r} has more * than node {rule.node!r}")
        for text in texts:
            site = site.replace("*", text, 1)
        names.append(site)
    return dict(zip(names, widths, strict=True))
