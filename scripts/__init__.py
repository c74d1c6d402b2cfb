"""Tools for people who work on slipstream: run them as ``python -m scripts.NAME`` from the repository root."""
