"""Formats: how results are handed in, and how other people's are read. ``registry.FORMATS`` names them."""
