"""Joint training of image-caption pairs and text instructions over disjoint groups (V2 §4.2)."""
