"""Forms of the JSON answers, but for those of infer: the OpenAPI document takes their schemas."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

Count: TypeAlias = Annotated[int, Field(ge=0)]
Size: TypeAlias = Annotated[int, Field(ge=-1)]


class Error(BaseModel):
    """Every answer but 200."""

    error: str


class Live(BaseModel):
    """Whether the process runs."""

    live: bool


class Ready(BaseModel):
    """Whether a model is served; `live` is the specification's name for it."""

    ready: bool
    live: bool


class Server(BaseModel):
    """Metadata of the service."""

    name: str
    version: str
    extensions: list[str]


class Models(BaseModel):
    """Names of the loaded models."""

    models: list[str]


class ModelReady(BaseModel):
    """Whether a model is loaded."""

    name: str
    ready: bool


class Tensor(BaseModel):
    """An input or an output in the metadata; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[Size]


class ModelParameters(BaseModel):
    """What a fixed datatype and shape do not say of a model."""

    fingerprint: str
    datatypes: str
    channel_axis: int
    eps: float


class Model(BaseModel):
    """Metadata of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: ModelParameters


class ConfiguredTensor(BaseModel):
    """An input or an output in the configuration; -1 stands for any size."""

    name: str
    data_type: str
    dims: list[Size]


class Configuration(BaseModel):
    """Configuration of a model in Triton's form."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: Count
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class Duration(BaseModel):
    """How often something was done, and the nanoseconds that it took in all."""

    count: Count
    ns: Count


class Durations(BaseModel):
    """Durations of inference by outcome and stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchDurations(BaseModel):
    """Durations of the stages for batches of one size."""

    batch_size: Count
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    """Statistics of one version of a model."""

    name: str
    version: str
    last_inference: Count
    inference_count: Count
    execution_count: Count
    inference_stats: Durations
    response_stats: dict[str, Any]
    batch_stats: list[BatchDurations]
    memory_usage: list[Any]


class Statistics(BaseModel):
    """Statistics of models."""

    model_stats: list[ModelStatistics]


class IndexEntry(BaseModel):
    """One version of a model in the index; a folder that holds no version has none."""

    name: str
    version: str = ""
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class IndexRequest(BaseModel):
    """What the index is asked for: all models, or those that are served."""

    ready: bool = False


class ControlRequest(BaseModel):
    """What a load or an unload is asked for; no parameter is supported."""

    parameters: dict[str, Any] = {}
