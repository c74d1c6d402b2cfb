"""Tests about the repository itself: budgets, documentation, layers, packaging, README."""
