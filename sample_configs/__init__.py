"""Ready-made configurations, one per feature: ``slipstream run sample_configs/NAME.json`` from the repository root.

A package, so that the files travel with an installation: ``importlib.resources.files("sample_configs")`` finds them.
"""
