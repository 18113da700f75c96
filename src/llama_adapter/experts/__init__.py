"""Experts: systems that turn a picture into text which the model reads (V2 §4.4)."""

from llama_adapter.experts.base import Expert, Finding, Report
from llama_adapter.experts.caption import CaptionExpert

__all__ = ["CaptionExpert", "Expert", "Finding", "Report"]
