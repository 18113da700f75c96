"""Tools that make the photos model."""
