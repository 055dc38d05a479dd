"""The version of this package; setup.py reads it from here without importing anything."""

__version__ = "0.1.0"
