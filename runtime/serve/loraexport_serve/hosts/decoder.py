"""A decoder in service: its generator's engine takes requests of any number of clients."""

from loraexport_runtime import GenerationEngine, TextGenerator, Tokenizer
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.listed import ListedFiles

from ..config.schema import ModelSettings
from .host import Host
from .texts import TextEncoder


class DecoderHost(Host):
    """A decoder and its engine."""

    kind = "decoder"

    def __init__(self, name: str, generator: TextGenerator, settings: ModelSettings) -> None:
        length = generator.engine.length
        texts = None
        match generator.manifest.kind:
            case Decoder(folder=folder):
                files = ListedFiles(generator.folder, generator.manifest.files)
                texts = TextEncoder.read(files, folder, length)
        super().__init__(name, settings, generator.manifest, generator, texts, length)
        self.generator = generator

    @property
    def engine(self) -> GenerationEngine:
        """Takes `GenerationRequest`s."""
        return self.generator.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """Of texts and chats."""
        return self.generator.tokenizer

    def close(self) -> None:
        self.generator.close()
