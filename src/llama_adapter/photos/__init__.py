"""The models behind `photos`: a small pretrained LLM and a vision encoder out of two wheels."""
