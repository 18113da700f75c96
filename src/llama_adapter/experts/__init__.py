"""Experts: systems that turn a picture into text which the model reads (V2 §4.4)."""

from llama_adapter.experts.base import Expert, Finding, Report, Traits
from llama_adapter.experts.caption import CaptionExpert
from llama_adapter.experts.panel import Consultation, Panel
from llama_adapter.experts.registry import ExpertKind, Surroundings, make_experts

__all__ = [
    "CaptionExpert",
    "Consultation",
    "Expert",
    "ExpertKind",
    "Finding",
    "Panel",
    "Report",
    "Surroundings",
    "Traits",
    "make_experts",
]
