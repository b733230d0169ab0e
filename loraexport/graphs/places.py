"""Which module each product of an ONNX graph is: by a rule of the spec, or by the graph's names."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        for one, match in hits:
            ruled[one.output] = Place((one,), _ruled(rule, one, match.groups()))
    unruled = [product for product in products if product.output not in ruled]
    named = _by_name(unruled, modules, file)
    places = list(ruled.values())
    if config is None:
        places += [Place((one,), {name: one.out_features}) for name, one in named.items()]
    else:
        left = {name.replace(".attn.", ".self_attn."): one for name, one in named.items()}
        while left:
            places.append(_take_genai_place(left, config, modules))
    order = {one.output: index for index, one in enumerate(products)}
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
    named: dict[str, Product], config: Mapping[str, Any], modules: Collection[str]
) -> Place:
    """Of onnxruntime-genai, which packs q, k, v and gate, up, or splits them, unlike the adapters.

    What is placed is taken out of `named`.
    """
    name, one = next(iter(named.items()))
    whole, every = packed_whole(name)
    if _is_module(whole, modules) and all(part in named for part in every):
        split = tuple(named.pop(part) for part in every)
        return Place(split, {whole: sum(part.out_features for part in split)})
    del named[name]
    parts, decoder = packed_parts(name), config["decoder"]
    if len(parts) == 1:
        return Place((one,), {name: one.out_features})
    if len(parts) == 2:
        return Place((one,), dict.fromkeys(parts, one.out_features // 2))
    heads = (decoder["num_attention_heads"], *[decoder["num_key_value_heads"]] * 2)
    sizes = [count * decoder["head_size"] for count in heads]
    return Place((one,), dict(zip(parts, sizes, strict=True)))


def _fits(pattern: str, product: Product) -> re.Match[str] | None:
    parts = map(re.escape, pattern.split("*"))
    return re.fullmatch(r"([^/.]*)".join(parts), str(product.node.name))


def _ruled(rule: SiteRule, product: Product, texts: Sequence[str]) -> dict[str, int]:
    sites = (rule.site,) if isinstance(rule.site, str) else rule.site
    widths = rule.widths or (product.out_features,)
    if len(widths) != len(sites) or sum(widths) != product.out_features:
        raise BaseModelError(
            f"base.sites: {rule.node!r} has {product.out_features} outputs, and its {len(sites)}"
            f" sites {sum(widths)} in {len(widths)} widths; give each site's own"
        )
    named = []
    for site in sites:
        if site.count("*") > len(texts):
            raise BaseModelError(f"base.sites: site {site!r} has more * than node {rule.node!r}")
        for text in texts:
            site = site.replace("*", text, 1)
        named.append(site)
    return dict(zip(named, widths, strict=True))
