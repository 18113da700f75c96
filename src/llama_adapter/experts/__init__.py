"""Experts: systems that turn an image into text which the model reads (V2 §4.4)."""

from llama_adapter.experts.base import Expert, ExpertInfo, Finding, Report, Request
from llama_adapter.experts.caption import CaptionExpert
from llama_adapter.experts.options import ExpertContext, ExpertOptions
from llama_adapter.experts.pool import ExpertPool
from llama_adapter.experts.registry import make_experts, make_pool
from llama_adapter.experts.wording import report_text, report_to_dict

__all__ = [
    "CaptionExpert",
    "Expert",
    "ExpertContext",
    "ExpertInfo",
    "ExpertOptions",
    "ExpertPool",
    "Finding",
    "Report",
    "Request",
    "make_experts",
    "make_pool",
    "report_text",
    "report_to_dict",
]
