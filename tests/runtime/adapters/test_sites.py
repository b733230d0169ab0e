"""Names of an adapter's modules -> sites; only what the base's naming knows is dropped."""

from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.peft_adapters import save_llama

from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites, seen_naming
from loraexport_runtime.contract.naming import NO_NAMING, Naming
from loraexport_runtime.errors import AdapterWeightsError

LLAMA = Naming("llama", ("model",), ())
BERT = Naming("bert", ("bert",), ())
VISION = Naming("clip", ("vision_model",), ("CLIPTextModel",))


def header_of(folder: Path, modules: list[str], **config: Any) -> AdapterHeader:
    return read_adapter(write_adapter(folder, dict.fromkeys(modules, (8, 8)), config=config))


@pytest.mark.parametrize("naming", [NO_NAMING, LLAMA])
def test_sites_match_as_they_are(tmp_path: Path, naming: Naming) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    sites = ["layers.0.q", "layers.0.v"]
    assert match_sites(header, sites, naming) == {"layers.0.q": "layers.0.q"}


def test_causal_lm_adapter_on_the_bare_model(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["model.layers.0.q", "model.layers.1.q"])
    sites = ["layers.0.q", "layers.1.q", "layers.1.v"]
    assert match_sites(header, sites, LLAMA) == {
        "layers.0.q": "model.layers.0.q",
        "layers.1.q": "model.layers.1.q",
    }


def test_bare_adapter_on_the_causal_lm(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"])
    assert match_sites(header, ["model.layers.0.q"], LLAMA) == {"model.layers.0.q": "layers.0.q"}


def test_real_causal_lm_adapter_on_the_bare_names(tmp_path: Path) -> None:
    save_llama(tmp_path, ["q_proj"], save_embedding_layers=False)
    sites = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    header = read_adapter(tmp_path)
    assert list(match_sites(header, sites, LLAMA)) == ["layers.0.self_attn.q_proj"]


def test_a_prefix_of_several_names(tmp_path: Path) -> None:
    """Whisper's encoder, of an adapter for the whole."""
    naming = Naming("whisper", ("encoder", "model.encoder"), ())
    header = header_of(tmp_path, ["model.encoder.layers.0.q"])
    matched = {"layers.0.q": "model.encoder.layers.0.q"}
    assert match_sites(header, ["layers.0.q"], naming) == matched


def test_a_prefix_is_dropped_for_all_modules_or_none(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "model.layers.1.q"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules have no site.*'model\.layers"):
        match_sites(header, ["layers.0.q", "layers.1.q"], LLAMA)


@pytest.mark.parametrize(
    ("modules", "sites", "naming", "advice"),
    [
        (
            ["text_model.layers.0.q"],
            ["layers.0.q"],
            VISION,
            r"All that have none are of 'text_model', which is not a part of this base"
            r" \(of 'clip'\); before its modules stands 'vision_model', or nothing\. Take the",
        ),
        (
            ["text_model.layers.0.q", "vision_model.layers.0.q"],
            ["layers.0.q"],
            VISION,
            r"1 of 2 modules have no site in this base, .*are of 'text_model', which is not a part",
        ),
        (
            ["text_model.layers.0.q", "vision_model.layers.0.q"],
            ["vision_model.layers.0.q"],
            VISION,
            r"1 of 2 modules have no site in this base, .*are of 'text_model', which is not a part",
        ),
        (["roberta.layers.0.q"], ["layers.0.q"], BERT, "are of 'roberta', which is not a part of"),
        (["roberta.layers.0.q"], ["bert.layers.0.q"], BERT, "are of 'roberta', which is not a"),
        (["bert.bert.layers.0.q"], ["layers.0.q"], BERT, "Add the missing sites to the spec, or"),
        (["model.layers.0.q"], ["layers.0.q"], NO_NAMING, "or name the spec's sites as the adapte"),
        (["layers.0.q"], ["encoder.layers.0.q"], BERT, "1 of 1 modules have no site in this base"),
    ],
)
def test_no_other_leading_name_is_dropped(
    modules: list[str], sites: list[str], naming: Naming, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterWeightsError, match=advice):
        match_sites(header_of(tmp_path, modules), sites, naming)


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        ("transformers.models.clip.modeling_clip", "CLIPVisionModel", None),
        ("transformers.models.clip.modeling_clip", "CLIPModel", None),
        ("somebodys.training", "CLIPTextModel", None),
        (
            "transformers.models.clip.modeling_clip",
            "CLIPTextModel",
            "it was trained on CLIPTextModel of 'clip' .*, which is another part of the model than",
        ),
        (
            "transformers.models.siglip.modeling_siglip",
            "SiglipVisionModel",
            "on SiglipVisionModel of 'siglip' .*, which is another model than this base, of 'clip'",
        ),
    ],
)
def test_the_class_that_an_adapter_was_trained_on(
    library: str, name: str, message: str | None, tmp_path: Path
) -> None:
    """Towers call their modules alike; PEFT notes the class where it was given no task."""
    mapping = {"parent_library": library, "base_model_class": name}
    header = header_of(tmp_path, ["layers.0.q"], auto_mapping=mapping)
    if message is None:
        assert match_sites(header, ["layers.0.q"], VISION) == {"layers.0.q": "layers.0.q"}
    else:
        with pytest.raises(AdapterWeightsError, match=message):
            match_sites(header, ["layers.0.q"], VISION)
    assert match_sites(header, ["layers.0.q"], NO_NAMING) == {"layers.0.q": "layers.0.q"}


@pytest.mark.parametrize("mapping", [None, "x", {}, {"parent_library": 1, "base_model_class": []}])
def test_a_class_that_is_no_class(mapping: object, tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q"], auto_mapping=mapping)
    assert header.trained_class is None
    assert match_sites(header, ["layers.0.q"], VISION) == {"layers.0.q": "layers.0.q"}


def test_modules_without_a_site(tmp_path: Path) -> None:
    header = header_of(tmp_path, ["layers.0.q", "layers.0.o"])
    with pytest.raises(AdapterWeightsError, match=r"1 of 2 modules.*'layers.0.o'\. Sites here: "):
        match_sites(header, ["layers.0.q", "layers.0.v"], LLAMA)


def test_the_prefixes_that_adapters_had(tmp_path: Path) -> None:
    bare = header_of(tmp_path / "bare", ["layers.0.q"])
    headed = header_of(tmp_path / "headed", ["bert.layers.0.q"])
    assert seen_naming([(bare, ["layers.0.q"])]) == NO_NAMING
    assert seen_naming([(bare, ["layers.0.q"]), (headed, ["layers.0.q"])]).prefixes == ("bert",)
    assert seen_naming([(bare, ["model.layers.0.q"])]).prefixes == ("model",)
