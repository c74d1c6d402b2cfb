"""Pytest plugins of this suite, and their own tests."""
