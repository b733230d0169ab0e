"""The recipe of a decoder that generates: multi-LoRA is grafted into onnxruntime-genai's graph."""

from dataclasses import dataclass
from functools import _lru_cache_wrapper, cache, partial
from pathlib import Path

from loraexport_runtime.checking.decoder_cases import load_reference
from loraexport_runtime.checking.decoder_steps import read_decoder_config
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..bases.adapters import OutputScales, pack_adapters
from ..bases.decoder import (
    GenaiGraph,
    find_decoder_sites,
    load_decoder_base,
    load_decoder_graph,
    plain_directory,
)
from ..bases.decoder_text import write_text
from ..bases.genai_folder import FOLDER, adapt_config, describe, make_tokenizer
from ..bases.weights import Base
from ..export.graft import base_rows, graft
from ..export.steps import write_steps
from ..graphs.files import save_grafted
from ..parity.decoder.check import check_decoder
from ..parity.decoder.reference import make_reference, save_reference
from ..parity.decoder.sources import open_decoder
from ..parity.implementations import NO_BASE
from ..parity.report import Report
from ..plan.decoder import DecoderPlan
from ..plan.plan import Plan
from .files import write_scales
from .manifest import make_manifest, marked
from .progress import Progress
from .subject import Subject


@dataclass(frozen=True)
class LoadedDecoder:
    """The decoder's weights, and its graph once it is asked for: most proofs need none."""

    plan: Plan[DecoderPlan]
    base: Base
    output_scales: OutputScales
    graph: "_lru_cache_wrapper[GenaiGraph]"


def load(plan: Plan[DecoderPlan]) -> LoadedDecoder:
    """See Recipe."""
    return LoadedDecoder(plan, *load_decoder_base(plan), cache(partial(load_decoder_graph, plan)))


def export(loaded: LoadedDecoder, folder: Path, progress: Progress) -> Manifest:
    """See Recipe."""
    plan = loaded.plan
    make_tokenizer(plan.kind.directory, folder / FOLDER)
    progress("build the base's graph")
    base = loaded.graph()
    base.write_files(folder / FOLDER)
    adapt_config(folder / FOLDER)
    progress("compare texts and chats with transformers")
    for chat, why in write_text(plan.kind.directory, folder / FOLDER).items():
        progress(f"the chat template refuses the chat {chat!r}: {why}")
    decoder = describe(folder / FOLDER, base.positions, plan.spec.export.blend)
    progress("graft multi-LoRA into it")
    graph = base.model.clone()
    sites = find_decoder_sites(plan, graph)
    layers = tuple(site.layer for site in sites)
    parameters = base_rows(sites, NUMPY_DTYPES[plan.spec.export.dtype])
    stacks = pack_adapters(plan, loaded.base, layers, parameters, loaded.output_scales)
    export = plan.spec.export
    sizes = plan.num_slots, export.dtype
    found = graft(graph, sites, stacks, *sizes, export.blend, export.kernels)
    save_grafted(graph, folder / decoder.onnx, stacks)
    write_steps(folder / FOLDER)
    write_scales(folder, loaded.output_scales)
    if isinstance(plain_directory(plan), Path):
        loaded.graph.cache_clear()  # the proof takes the Hugging Face model, and memory
    return make_manifest(plan, loaded.base, decoder, marked(plan, layers, found, progress))


def prove(subject: Subject[Decoder], loaded: LoadedDecoder | None) -> Report:
    """See Recipe."""
    folder, manifest, decoder = subject.folder, subject.manifest, subject.kind
    plain: Path | str
    if loaded is None:
        reference, plain = load_reference(folder, manifest), NO_BASE
    else:
        plan, config = loaded.plan, read_decoder_config(folder, decoder)
        oracle = open_decoder(
            plan, folder, manifest, decoder, config, lambda: loaded.graph().model.clone()
        )
        reference = make_reference(oracle, manifest, config, subject.spec.parity.seed)
        del oracle  # a whole model
        plain = plain_directory(plan)
    if subject.keep_cases:
        save_reference(reference, folder)
    return check_decoder(
        folder, manifest, decoder, subject.spec, reference, plain, subject.providers
    )
