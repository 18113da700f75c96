"""Training data: sources, mixtures of them, and packed batches with an exact position."""

from llama_adapter.data.batch import Batches, TrainBatch
from llama_adapter.data.samples import KINDS, Broken, Kind, Sample, Source, SourceOptions
from llama_adapter.data.sources import SOURCES

__all__ = [
    "KINDS",
    "SOURCES",
    "Batches",
    "Broken",
    "Kind",
    "Sample",
    "Source",
    "SourceOptions",
    "TrainBatch",
]
