"""The recipe of a decoder that generates: multi-LoRA is grafted into onnxruntime-genai's graph."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from loraexport_runtime.checking.decoder import load_reference
from loraexport_runtime.checking.decoder_steps import read_model_config
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest

from ..bases.adapters import pack_adapters
from ..bases.decoder import (
    GenaiGraph,
    find_decoder_sites,
    load_decoder_base,
    load_decoder_graph,
    plain_directory,
)
from ..bases.genai_folder import FOLDER, adapt_config, describe, require_tokenizer
from ..bases.weights import Base
from ..export.graft import graft
from ..graphs.files import save_grafted
from ..parity.decoder.check import check_decoder
from ..parity.decoder.reference import make_reference, save_reference
from ..parity.decoder.sources import open_decoder
from ..parity.implementations import NO_BASE
from ..parity.report import Report
from ..plan.decoder import DecoderPlan
from ..plan.plan import Plan
from .manifest import make_manifest
from .progress import Progress
from .subject import Subject


@dataclass(frozen=True)
class LoadedDecoder:
    """The decoder's weights, and its graph once it is asked for: most proofs need none."""

    plan: Plan[DecoderPlan]
    base: Base
    graph: Callable[[], GenaiGraph]


def load(plan: Plan[DecoderPlan]) -> LoadedDecoder:
    """See Recipe."""
    return LoadedDecoder(plan, load_decoder_base(plan), cache(partial(load_decoder_graph, plan)))


def export(loaded: LoadedDecoder, folder: Path, progress: Progress) -> Manifest:
    """See Recipe."""
    plan = loaded.plan
    require_tokenizer(plan.kind.directory, folder / FOLDER)
    progress("build the base's graph")
    base = loaded.graph()
    base.write_files(folder / FOLDER)
    decoder = describe(folder / FOLDER, adapt_config(folder / FOLDER))
    progress("graft multi-LoRA into it")
    graph = base.model.clone()
    sites = find_decoder_sites(plan, graph)
    layers = tuple(site.layer for site in sites)
    stacks = pack_adapters(plan, loaded.base, layers)
    graft(graph, sites, stacks, plan.num_slots, plan.spec.export.dtype)
    save_grafted(graph, folder / decoder.onnx)
    return make_manifest(plan, loaded.base, decoder, layers)


def prove(subject: Subject[Decoder], loaded: LoadedDecoder | None) -> Report:
    """See Recipe."""
    folder, manifest, decoder = subject.folder, subject.manifest, subject.kind
    plain: Path | str
    if loaded is None:
        reference, plain = load_reference(folder, manifest), NO_BASE
    else:
        plan, config = loaded.plan, read_model_config(folder, decoder)
        oracle = open_decoder(plan, folder, manifest, config, lambda: loaded.graph().model.clone())
        reference = make_reference(oracle, manifest, config, subject.spec.parity.seed)
        plain = plain_directory(plan)
    if subject.keep_cases:
        save_reference(reference, folder)
    return check_decoder(
        folder, manifest, decoder, subject.spec, reference, plain, subject.providers
    )
