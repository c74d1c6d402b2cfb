"""What a model costs: counting, timing and judging of any ``nn.Module`` and of slipstream's own plans.

Reads the costs that ``ops`` registers beside its kernels; knows nothing of ``engine``.
"""
