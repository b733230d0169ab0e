"""Layers inside a torch.nn.MultiheadAttention are no sites, as it never calls them."""

from pathlib import Path

import pytest
import transformers as tf
from support.adapters import write_adapter
from support.builds import Project

from loraexport.hf.skeleton import read_skeleton
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.errors import AdapterWeightsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """SigLIP's vision tower, which pools by such an attention; its config alone."""
    config = tf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config.architectures = ["SiglipVisionModel"]
    config.save_pretrained(tmp_path / "siglip")
    return tmp_path


def test_they_are_no_sites(folder: Path) -> None:
    skeleton = read_skeleton(folder / "siglip", "feature-extraction", "float32")
    (name,) = skeleton.attentions
    assert not [site for site in skeleton.sites if site.startswith(f"{name}.")]
    assert [site for site in skeleton.sites if site.endswith("self_attn.out_proj")]


@pytest.mark.parametrize("end", ["", ".out_proj"])
def test_an_adapter_of_one_is_told_so(folder: Path, end: str) -> None:
    (name,) = read_skeleton(folder / "siglip", "feature-extraction", "float32").attentions
    write_adapter(folder / "sql", {f"{name}{end}": (16, 16)})
    base = {"kind": "transformers", "path": "siglip", "task": "feature-extraction"}
    spec = Project(folder).spec(base=base, adapters=[{"name": "sql", "path": "sql"}])
    with pytest.raises(
        AdapterWeightsError, match=r"a torch\.nn\.MultiheadAttention, .* exclude_mo"
    ):
        make_plan(read_spec(spec), folder)
