"""Metrics for Prometheus, summed over all processes, under our own names and Triton's."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder

import batchnorm
from batchnorm_service import __version__
from batchnorm_service.context import Context
from batchnorm_service.counts import statistics
from batchnorm_service.counts.counters import (
    BOUNDS,
    BYTES_IN_FLIGHT,
    DURATIONS,
    IN_FLIGHT,
    PROCESS_LENGTH,
    SECONDS_NS,
    STATUSES,
)

MODEL: Final = ("model", "version")
_STAGES: Final = {
    "queue": statistics.QUEUE_NS,
    "input": statistics.INPUT_NS,
    "infer": statistics.INFER_NS,
    "output": statistics.OUTPUT_NS,
}
# Triton's names and units. Triton has them as counters; without the ending _total the type must be unknown.
_TRITON: Final = {
    "nv_inference_request_success": (statistics.SUCCESSES, 1, "Successful inference requests"),
    "nv_inference_request_failure": (statistics.FAILURES, 1, "Failed inference requests"),
    "nv_inference_count": (statistics.ROWS, 1, "Inferences: rows of batches"),
    "nv_inference_exec_count": (statistics.SUCCESSES, 1, "Model executions"),
    "nv_inference_request_duration_us": (statistics.SUCCESS_NS, 1000, "Duration of successful requests"),
    "nv_inference_queue_duration_us": (statistics.QUEUE_NS, 1000, "Duration in the queue"),
    "nv_inference_compute_input_duration_us": (statistics.INPUT_NS, 1000, "Duration of reading input"),
    "nv_inference_compute_infer_duration_us": (statistics.INFER_NS, 1000, "Duration of computing"),
    "nv_inference_compute_output_duration_us": (statistics.OUTPUT_NS, 1000, "Duration of writing output"),
}


class Metrics:
    """Collector of the metrics of a service, from the same counters as `/stats`."""

    def __init__(self, context: Context) -> None:
        self._rows = context.rows
        self._repository = context.repository
        self._state = context.state
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """Return nothing, so that registration does not collect."""
        return []

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that an Accept header asks for, and its content type."""
        encoder, kind = choose_encoder(accept)
        return encoder(self._registry), kind

    def collect(self) -> Iterator[Metric]:
        """Yield every family of metrics."""
        build = {
            "version": __version__,
            "core": batchnorm.__version__,
            "python": platform.python_version(),
            "simd": batchnorm.simd_level(),
            "threads": str(batchnorm.get_num_threads()),
        }
        yield InfoMetricFamily("batchnorm_build", "What is running", value=build)
        yield from self._of_processes()
        yield from self._of_models()

    def _of_processes(self) -> Iterator[Metric]:
        live = self._state.live().values()
        yield GaugeMetricFamily("batchnorm_workers", "Live processes", value=len(live))
        text = "Generation of the list of models that every process answers by"
        yield GaugeMetricFamily("batchnorm_generation", text, value=min(live, default=0))

        row = self._rows.total_of_processes()
        text = "Inference requests in flight"
        yield GaugeMetricFamily("batchnorm_requests_in_flight", text, value=row[IN_FLIGHT])
        text = "Bytes of their bodies"
        yield GaugeMetricFamily("batchnorm_request_bytes_in_flight", text, value=row[BYTES_IN_FLIGHT])

        responses = CounterMetricFamily("batchnorm_http_responses", "Answers by status", labels=["code"])
        for status in range(100, PROCESS_LENGTH - STATUSES):
            if count := row[STATUSES + status]:
                responses.add_metric([str(status)], count)
        yield responses

        buckets, count = [], 0
        for bound, more in zip((*map(str, BOUNDS), "+Inf"), row[DURATIONS:STATUSES], strict=True):
            count += more
            buckets.append((bound, count))
        durations = HistogramMetricFamily(
            "batchnorm_request_duration_seconds", "From the headers of an inference request to its answer"
        )
        durations.add_metric([], buckets, row[SECONDS_NS] / 1e9)
        yield durations

    def _of_models(self) -> Iterator[Metric]:
        info = InfoMetricFamily("batchnorm_model", "Loaded models", labels=MODEL)
        requests = CounterMetricFamily(
            "batchnorm_inference_requests", "Inference requests", labels=[*MODEL, "outcome"]
        )
        rows = CounterMetricFamily("batchnorm_inference_rows", "Rows of answered batches", labels=MODEL)
        seconds = CounterMetricFamily(
            "batchnorm_inference_seconds", "Duration of answered requests by stage", labels=[*MODEL, "stage"]
        )
        aliases = {
            name: UnknownMetricFamily(name, text, labels=MODEL) for name, (_, _, text) in _TRITON.items()
        }
        loaded = {
            (name, version): self._repository.get(name, version).layer.fingerprint
            for name in self._repository.names()
            for version in self._repository.versions(name)
        }
        for model in sorted(self._rows.models() | set(loaded)):
            row = self._rows.total(*model)
            if model in loaded:
                info.add_metric(model, {"fingerprint": loaded[model]})
            requests.add_metric([*model, "success"], row[statistics.SUCCESSES])
            requests.add_metric([*model, "failure"], row[statistics.FAILURES])
            rows.add_metric(model, row[statistics.ROWS])
            for stage, at in _STAGES.items():
                seconds.add_metric([*model, stage], row[at] / 1e9)
            for name, (at, unit, _) in _TRITON.items():
                aliases[name].add_metric(model, row[at] / unit)
        yield from (info, requests, rows, seconds, *aliases.values())
