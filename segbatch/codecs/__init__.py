"""Pixels to bytes and back: label maps as runs (``runlength``), photos as RGB (``photo``)."""
