"""The miniature world: pictures, texts and small frozen bases made by this package."""
