"""Names of an adapter's modules, matched to the sites of a base."""

from pathlib import Path

import pytest
import torch
from support.adapters import write_adapter
from support.peft_adapters import save_llama

from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.errors import AdapterWeightsError

torch.set_num_threads(1)


def header_of(folder: Path, modules: list[str]) -> AdapterHeader:
    return read_adapter(write_adapter(folder, dict.fromkeys(modules, (8, 8))))


def test_sites_match_as_they_are(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    assert match_sites(header, ["layers.0.q", "layers.0.v"]) == {"layers.0.q": "layers.0.q"}


def test_causal_lm_adapter_on_the_bare_model(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["model.layers.0.q", "model.layers.1.q"])
    sites = ["layers.0.q", "layers.1.q", "layers.1.v"]
    assert match_sites(header, sites) == {
        "layers.0.q": "model.layers.0.q",
        "layers.1.q": "model.layers.1.q",
    }


def test_bare_adapter_on_the_causal_lm(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    assert match_sites(header, ["model.layers.0.q"]) == {"model.layers.0.q": "layers.0.q"}


def test_real_causal_lm_adapter_on_the_bare_names(tmp_path: Path) -> None:
    save_llama(tmp_path, ["q_proj"], save_embedding_layers=False)
    sites = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    assert list(match_sites(read_adapter(tmp_path), sites)) == ["layers.0.self_attn.q_proj"]


def test_a_prefix_is_dropped_for_all_modules_or_none(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "model.layers.1.q"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules have no site.*'model\.layers"):
        match_sites(header, ["layers.0.q", "layers.1.q"])


@pytest.mark.parametrize(
    ("modules", "sites"),
    [
        (["layers.0.q"], ["encoder.layers.0.q", "decoder.layers.0.q"]),
        (["encoder.layers.0.q", "decoder.layers.0.q"], ["layers.0.q"]),
    ],
)
def test_ambiguous_prefix(tmp_path: Path, modules: list[str], sites: list[str]) -> None:
    header = header_of(tmp_path, modules)
    with pytest.raises(AdapterWeightsError, match=r"not clear which belong together.*Name the"):
        match_sites(header, sites)


def test_modules_without_a_site(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "layers.0.o"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules.*'layers.0.o'\. Sites here: "):
        match_sites(header, ["layers.0.q", "layers.0.v"])
