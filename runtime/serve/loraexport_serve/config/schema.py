"""The settings of a server: the keys of its file, which are its flags and variables too."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Level = Literal["debug", "info", "warning", "error"]
Kernels = Literal["auto", "required", "never"]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
"""Of an artifact or an adapter; no path, as it begins with no dot and has no slash."""
Path = Annotated[str, Meta(min_length=1, max_length=4096)]


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One artifact in service."""

    path: Annotated[Path, Meta(description="the artifact's folder")]
    device: Annotated[
        Literal["cpu", "cuda"] | None, Meta(description="default: the server's `device`")
    ] = None
    threads: Annotated[
        Count | None,
        Meta(description="onnxruntime's, of an encoder's batch; default: its share of the cores"),
    ] = None
    batch_workers: Annotated[
        Count | None,
        Meta(description="batches of an encoder at the same time; default: 2 on a CPU, else 1"),
    ] = None
    cuda_graphs: Annotated[bool, Meta(description="capture what `warm_up` names, or steps")] = False
    kernels: Annotated[
        Kernels | None, Meta(description="of loraexport-kernels; default: the server's `kernels`")
    ] = None
    allow_unverified: Annotated[
        bool, Meta(description="serve an artifact whose parity failed or is deferred")
    ] = False
    digest: Annotated[
        str | None, Meta(description="sha256 of manifest.json, without which it is not served")
    ] = None
    warm_up: Annotated[
        tuple[tuple[Count, Count], ...],
        Meta(description="of an encoder: pairs of rows and tokens that are run ahead of traffic"),
    ] = ()
    rows: Annotated[Count | None, Meta(description="of a decoder: answers at the same time")] = None
    length: Annotated[
        Count | None, Meta(description="of a decoder: tokens of a prompt and its answer")
    ] = None
    dimensions: Annotated[
        tuple[Count, ...],
        Meta(description="lengths to which its vectors may be cut, as it was trained for"),
    ] = ()
    adapter_folder: Annotated[
        Path | None, Meta(description="is watched: each `NAME/` in it is an adapter")
    ] = None
    base: Annotated[
        Path | None, Meta(description="the base's folder, which adapters with DoRA need")
    ] = None
    pinned: Annotated[tuple[Name, ...], Meta(description="adapters that keep a slot")] = ()


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a server."""

    models: Annotated[
        dict[Name, Path | ModelSettings],
        Meta(min_length=1, description="artifacts by name: a folder, or a mapping of keys"),
    ]
    host: Annotated[str, Meta(description="the address to listen at")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="0 takes a free one")] = 8000
    socket: Annotated[Path | None, Meta(description="a Unix socket of clients beside it")] = None
    admin_port: Annotated[Port | None, Meta(description="of the routes of operators")] = None
    admin_socket: Annotated[Path | None, Meta(description="a Unix socket in its place")] = None
    admin_token_file: Annotated[
        Path | None, Meta(description="holds the operators' token; or LORAEXPORT_ADMIN_TOKEN")
    ] = None
    keys_file: Annotated[
        Path | None, Meta(description="YAML with the clients' keys; or LORAEXPORT_API_KEYS")
    ] = None
    tls_certificate: Annotated[Path | None, Meta(description="PEM file")] = None
    tls_key: Annotated[Path | None, Meta(description="PEM file")] = None
    tls_client_ca: Annotated[
        Path | None, Meta(description="PEM file; clients have to show a certificate of it")
    ] = None
    device: Annotated[Literal["cpu", "cuda"], Meta(description="of every artifact")] = "cpu"
    kernels: Annotated[
        Kernels, Meta(description="of loraexport-kernels; auto: on CUDA, where they can be taken")
    ] = "auto"
    allow_adapter_updates: Annotated[
        bool, Meta(description="serve /v1/load_lora_adapter and /v1/unload_lora_adapter")
    ] = False
    adapter_roots: Annotated[
        tuple[Path, ...], Meta(description="adapters are loaded from below these folders alone")
    ] = ()
    artifact_roots: Annotated[
        tuple[Path, ...],
        Meta(description="artifacts are exchanged for such from below these folders alone"),
    ] = ()
    adapter_refresh: Annotated[
        Annotated[float, Meta(gt=0, le=86_400)],
        Meta(description="seconds between two looks into watched folders"),
    ] = 5.0
    max_adapter_bytes: Annotated[Count, Meta(description="of an adapter's files")] = 2**30
    max_adapter_rank: Annotated[Count, Meta(description="of an adapter")] = 512
    max_adapters: Annotated[Count, Meta(description="in memory, of an artifact")] = 1000
    max_body_bytes: Annotated[Count, Meta(description="of a request")] = 4 * 2**20
    max_inputs: Annotated[Count, Meta(description="texts, documents or pairs of a request")] = 2048
    max_queued: Annotated[Count, Meta(description="texts or prompts that may wait")] = 10_000
    max_queued_tokens: Annotated[Count, Meta(description="tokens of them")] = 10_000_000
    queue_timeout: Annotated[Seconds, Meta(description="a request that waits longer is 408")] = 60.0
    body_timeout: Annotated[
        Seconds, Meta(description="a body that takes longer to come is 408")
    ] = 30.0
    write_timeout: Annotated[
        Seconds, Meta(description="a client that reads nothing of its answer for so long is cut")
    ] = 30.0
    batch_rows: Annotated[Count, Meta(description="of a batch of an encoder")] = 32
    batch_tokens: Annotated[Count, Meta(description="of one, padding counted")] = 16_384
    batch_delay: Annotated[
        Annotated[float, Meta(ge=0, lt=60)],
        Meta(description="seconds that an idle encoder waits for more"),
    ] = 0.0
    shutdown_timeout: Annotated[
        Seconds, Meta(description="for what was accepted, once SIGTERM has come")
    ] = 30.0
    log_format: Annotated[Literal["text", "json"], Meta(description="of a line of the log")] = (
        "text"
    )
    log_level: Annotated[Level, Meta(description="of the log")] = "info"
    metrics_adapters: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(description="adapters that metrics name; the others are `other`"),
    ] = 100
    otlp_traces_endpoint: Annotated[
        Annotated[str, Meta(pattern=r"^https?://")] | None,
        Meta(description="a collector's URL, `http://HOST:4318/v1/traces`; default: as OTEL_* say"),
    ] = None


def models_of(settings: Settings) -> dict[str, ModelSettings]:
    """The artifacts by name, each with all its settings."""
    return {
        name: ModelSettings(path=model) if isinstance(model, str) else model
        for name, model in settings.models.items()
    }
