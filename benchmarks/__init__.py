"""Commands that measure; each prints JSON or a table and names the device it ran on."""
