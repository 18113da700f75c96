"""The HTTP server: OpenAI's protocol in front of an engine; text and bytes, never tensors."""
