"""The miniature world: images, texts and small frozen bases made by this package."""

EVAL_OPTIONS = frozenset(("model", "device", "limit", "batch_size"))
"""The options of `llama-adapter eval` that the task `miniature` reads: it draws its own data."""
