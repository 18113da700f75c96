"""Programs that make what the package brings along; no part of the package."""
