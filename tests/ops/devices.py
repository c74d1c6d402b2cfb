"""Where tests of Triton kernels run: in Triton's interpreter on a CPU, and compiled on a GPU where there is one."""

from __future__ import annotations

import os

import pytest

#: For ``@pytest.mark.parametrize("device", DEVICES)``.
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here, not interpreted"
        ),
        id="interpreter",
    ),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
