"""Training data: sources, mixtures of them, and packed batches with an exact position."""

from llama_adapter.data.batch import Batches, TrainBatch
from llama_adapter.data.encoding import SampleEncoder
from llama_adapter.data.measuring import Pieces, measure
from llama_adapter.data.samples import KINDS, InvalidRecord, Kind, Sample, Source, SourceOptions
from llama_adapter.data.sources import SOURCES
from llama_adapter.data.stream import BatchStream, Part

__all__ = [
    "KINDS",
    "SOURCES",
    "BatchStream",
    "Batches",
    "InvalidRecord",
    "Kind",
    "Part",
    "Pieces",
    "Sample",
    "SampleEncoder",
    "Source",
    "SourceOptions",
    "TrainBatch",
    "measure",
]
