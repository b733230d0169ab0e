"""A decoder that generates: read, grafted, proven."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraexport_runtime.contract.manifest import Generator, Manifest

from ..parity.report import Report
from ..plan.plan import Plan

if TYPE_CHECKING:  # it imports torch
    pass
from .manifest import make_manifest
from .progress import Progress


def _prove_decoder(plan: Plan, folder: Path, progress: Progress) -> tuple[Manifest, Report]:
    """Read, graft and verify a decoder that generates."""
    from ..bases.adapters import pack_adapters
    from ..bases.genai_folder import FOLDER, adapt_config, require_tokenizer
    from ..bases.grafted import find_sites, load_base, load_graph, plain_directory
    from ..export.graft import graft
    from ..graphs.files import save_grafted
    from ..parity import implementations as proof
    from ..parity.decoder import check as verify_decoder
    from ..parity.decoder import reference as decoder_reference
    from ..parity.decoder.sources import open_decoder

    progress("read weights")
    source = plan.graph or plan.generator
    assert source is not None, "the plan is of a decoder"
    require_tokenizer(source.directory, folder / FOLDER)
    base = load_base(plan)
    progress("build the base's graph")
    model = load_graph(plan, folder / FOLDER)
    pad = adapt_config(folder / FOLDER)
    generator = Generator(FOLDER, f"{FOLDER}/model.onnx", pad)
    sites = find_sites(plan, model)
    layers = tuple(one.layer for one in sites)
    manifest = replace(make_manifest(plan, base), layers=layers, generator=generator)
    plain = model.clone()
    progress("graft multi-LoRA into it")
    dtype = plan.spec.export.dtype
    graft(model, sites, pack_adapters(plan, base, layers), plan.num_slots, dtype)
    save_grafted(model, folder / generator.onnx)
    progress("verify")
    decoder = open_decoder(plan, folder, manifest, plain)
    reference = decoder_reference.make_reference(folder, decoder, manifest, plan.spec.parity.seed)
    decoder_reference.save_reference(reference, folder)
    report = verify_decoder.check_decoder(
        folder,
        manifest,
        plan.spec,
        reference,
        plain_directory(plan),
        proof.default_providers(manifest),
    )
    return manifest, report
