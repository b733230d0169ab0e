"""A YAML file -> a frozen Spec, or one SpecError that lists every problem with its line.

The models below are the contract: `loraexport schema` prints them as JSON Schema.
"""

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraexport_runtime.contract.manifest import DType
from loraexport_runtime.contract.strict_yaml import to_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Text = Annotated[str, Field(max_length=4096)]
"""A path or the name of a module or tensor: no file system takes a longer path."""
Size = Annotated[int, Field(gt=0, le=2**24)]
"""Of a tensor: 16 times the largest vocabularies. What it all takes in memory, a plan adds up."""
Tokens = Annotated[int, Field(gt=0, le=2**31 - 1)]
Count = Annotated[int, Field(gt=0, le=2**16)]
"""Of slots, and the rank of one: slots that no batch fills, and more than a layer's width."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As torch takes it."""
GraphFormat = Literal["torchscript", "onnx"]
Task = Literal[
    "feature-extraction",
    "sentence-embedding",
    "sequence-classification",
    "token-classification",
    "causal-lm",
    "image-classification",
    "image-embedding",
    "text-embedding",
    "audio-embedding",
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SliceSpec(_Model):
    """One output part of a fused layer, with its own A and B."""

    name: Name
    site: Text | None = Field(
        None, description="module name that adapters use; default: from weight"
    )
    weight: Text | None = Field(None, description="tensor name; default: <site>.weight")
    bias: Text | bool | None = Field(
        None,
        description="tensor name, or true/false with init; default: <site>.bias where it exists",
    )
    out_features: Size | None = Field(None, description="checked against the tensor; init needs it")


class LinearSpec(_Model):
    """y = W x + b + LoRA. Either one weight here, or several slices that share x."""

    type: Literal["linear"]
    name: Name
    in_features: Size | None = None
    out_features: Size | None = None
    site: Text | None = None
    weight: Text | None = None
    bias: Text | bool | None = None
    fan_in_fan_out: bool = Field(False, description="the weight is stored [in, out] (Conv1D)")
    slices: tuple[SliceSpec, ...] = ()


class EmbeddingSpec(_Model):
    """y[t] = E[ids[t]] + LoRA."""

    type: Literal["embedding"]
    name: Name
    num_embeddings: Size | None = None
    embedding_dim: Size | None = None
    site: Text | None = None
    weight: Text | None = None


LayerSpec = Annotated[LinearSpec | EmbeddingSpec, Field(discriminator="type")]


class InitSpec(_Model):
    """Synthetic weights: normal with variance 1 / in_features."""

    seed: Seed


class LayersSpec(_Model):
    """Single layers, one graph each."""

    kind: Literal["layers"]
    path: Text | None = Field(
        None,
        description="HF directory relative to the spec, hub id, or package:<module>/<folder>",
    )
    init: InitSpec | None = Field(None, description="synthetic weights instead of a path")
    layers: Annotated[tuple[LayerSpec, ...], Field(min_length=1)]


class TransformersSpec(_Model):
    """A whole Hugging Face model, one graph."""

    kind: Literal["transformers"]
    path: Text = Field(
        description="HF directory relative to the spec, hub id, or package:<module>/<folder>"
    )
    task: Task


class CausalLmSpec(_Model):
    """A whole decoder that generates, for onnxruntime-genai."""

    kind: Literal["causal_lm"]
    path: Text = Field(
        description="HF directory relative to the spec, hub id, or package:<module>/<folder>"
    )
    weights: Literal["float", "int4"] = Field(
        "float", description="of the base: as export.dtype, or blocks of 32 with 4 bits each"
    )


class SiteRule(_Model):
    """Which module a product of an ONNX graph is.

    `*` in `node` stands for any text without `/` and `.`, and in `site` for the same text.
    """

    node: Text = Field(description="name of a MatMul, Gemm or MatMulNBits: /layer.*/q/MatMul")
    site: Text | Annotated[tuple[Text, ...], Field(min_length=2)] = Field(
        description="module name that adapters use; several, if the product packs them"
    )
    widths: tuple[Size, ...] | None = Field(
        None, description="outputs of each of several sites, side by side"
    )


class OnnxSpec(_Model):
    """An ONNX model that exists: one graph, or a folder of onnxruntime-genai."""

    kind: Literal["onnx"]
    path: Text = Field(
        description="its directory relative to the spec, hub id, or package:<module>/<folder>"
    )
    file: Text = Field("model.onnx", description="the graph, inside the directory")
    sites: tuple[SiteRule, ...] = Field(
        (), description="names of products that the graph itself does not tell"
    )


BaseSpec = Annotated[
    LayersSpec | TransformersSpec | CausalLmSpec | OnnxSpec, Field(discriminator="kind")
]


class AdapterSpec(_Model):
    """A PEFT LoRA directory or hub id."""

    name: Name
    path: Text
    scale: Annotated[float, Field(allow_inf_nan=False)] = Field(
        1.0, description="multiplies the adapter's own scaling"
    )


Cost = Annotated[float, Field(allow_inf_nan=False)]


class CostTerms(_Model):
    """Microseconds of one launch, of a GB moved, and of a GFLOP."""

    launch: Cost
    gbyte: Cost
    gflop: Cost
    device: Text | None = Field(None, description="default: that of stock operators' terms")


class Costs(CostTerms):
    """Microseconds of a launch, a GB moved and a GFLOP, of stock operators and of kernels."""

    device: Text
    kernels: CostTerms | None = Field(None, description="default: stock operators' stand for them")


class TuneSpec(_Model):
    """What strategy `auto` optimises for."""

    device: Literal["cpu", "cuda"] = "cuda"
    tokens: Tokens | None = Field(
        None,
        description="tokens of a typical batch, all rows together; default 512, or for a decoder"
        " 32: one for each row of a step",
    )
    costs: Costs | None = Field(
        None, description="of your GPU, from loraexport bench --calibrate; default: an H200's"
    )


class ExportSpec(_Model):
    formats: Annotated[tuple[GraphFormat, ...], Field(min_length=1)] | None = Field(
        None, description="default: both for layers, else onnx; TorchScript holds the weights again"
    )
    dtype: DType = "float32"
    strategy: Literal["auto", "segmented", "masked", "augmented", "chunked"] = "auto"
    tune: TuneSpec = TuneSpec()
    blend: bool = Field(
        False, description="all but layers: a row may use several adapters, each with its weight"
    )
    kernels: bool = Field(
        False,
        description="the LoRA part of linear sites as calls of ONNX functions with stock operators"
        " for bodies, which the kernels of loraexport-kernels take where a host has them",
    )
    packed: bool = Field(
        False,
        description="whole models of texts: compute them without their padding, which no CUDA graph"
        " can hold; in float16, unless tune.device is cpu, by an operator of CUDA alone",
    )


class ParitySpec(_Model):
    """How the graphs are held to the float64 oracle."""

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="largest relative error; default: the dtype's own"
    )
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="largest |gain - 1| of what an adapter adds; default: the dtype's own, or of a"
        " graph that rounds activations to 8 bits its own",
    )
    tokens: Annotated[int, Field(ge=8, le=4096)] = Field(
        24, description="layers: tokens of the mixed cases"
    )
    seed: Seed = 0
    onnx: Literal["required", "deferred"] = Field(
        "required",
        description="deferred: publish what runs on CUDA alone (bfloat16, export.packed) without a"
        " CUDA device, unverified",
    )


class Spec(_Model):
    """What to build."""

    # The rules between keys are `_cross_problems`: a validator here would hide behind other errors.

    version: Literal[1]
    name: Name
    base: BaseSpec
    adapters: Annotated[tuple[AdapterSpec, ...], Field(min_length=1)]
    slots: Count | None = Field(None, description="slot 0 not counted; default: one per adapter")
    max_rank: Count | None = Field(
        None,
        description="default: the largest rank of these adapters; a decoder, whose slots stay as"
        " built, takes each adapter's own rank unless slots, sites or max_rank is given",
    )
    sites: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        None,
        description="where adapters loaded later may apply, by module name or its end; default:"
        " where these do",
    )
    features: tuple[Literal["dora", "bias", "heads"], ...] | None = Field(
        None,
        description="whole models and decoders: what adapters loaded later may bring beside A and"
        " B; what these bring is always there",
    )
    export: ExportSpec = ExportSpec()
    parity: ParitySpec = ParitySpec()

    @property
    def typical_tokens(self) -> int:
        """Of a batch, all rows together; a decoder's is a step."""
        return self.export.tune.tokens or (32 if self.base.kind == "causal_lm" else 512)

    @model_validator(mode="after")
    def _write_out_formats(self) -> "Spec":
        """The default that depends on the base's kind; an artifact's copy keeps it."""
        if self.export.formats is not None:
            return self
        formats = ("torchscript", "onnx") if self.base.kind == "layers" else ("onnx",)
        export = self.export.model_copy(update={"formats": formats})
        return self.model_copy(update={"export": export})

    @property
    def formats(self) -> tuple[GraphFormat, ...]:
        """What the graphs are written as."""
        assert self.export.formats is not None, "the default is written out"
        return self.export.formats

    def to_yaml(self) -> str:
        """The resolved spec: every default written out."""
        return to_yaml(self.model_dump(mode="json"))

    def digest(self) -> str:
        """sha256 of the resolved spec, as hexadecimal text."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()
