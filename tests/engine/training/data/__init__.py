"""Tests of engine/training/data."""
