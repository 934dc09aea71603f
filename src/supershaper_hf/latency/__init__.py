"""How many seconds a subnet takes on a device: measured from a table of its parts, or whole."""
