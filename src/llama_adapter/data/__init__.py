"""Training data: sources, mixtures of them, and packed batches with an exact position."""

from llama_adapter.data.batch import Batches, TrainBatch
from llama_adapter.data.length_index import Pieces, measure
from llama_adapter.data.samples import (
    KINDS,
    DrawsOnOthers,
    InvalidRecord,
    Kind,
    Sample,
    Source,
    SourceOptions,
)
from llama_adapter.data.sources import SOURCES
from llama_adapter.data.stream import BatchStream, Component
from llama_adapter.data.truncation import SampleEncoder

__all__ = [
    "KINDS",
    "SOURCES",
    "BatchStream",
    "Batches",
    "Component",
    "DrawsOnOthers",
    "InvalidRecord",
    "Kind",
    "Pieces",
    "Sample",
    "SampleEncoder",
    "Source",
    "SourceOptions",
    "TrainBatch",
    "measure",
]
