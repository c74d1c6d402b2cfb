"""``ModuleTree`` where a CPU cannot take it: backward passes in threads with numbers of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from profiler.module_tree import ModuleTree


def test_nodes_of_two_threads_may_have_the_same_numbers(monkeypatch):
    """A GPU's backward pass runs in a thread that numbers nodes from 0. Reentrant checkpointing runs modules there, and
    a nested backward pass over what they made; the outer one then goes on with nodes of the main thread."""
    tree, outer, inner = ModuleTree(), nn.Identity(), nn.Linear(2, 2)
    x = torch.ones(1, requires_grad=True)

    def run(module):
        tree.enter(module)
        node = (x * 2).grad_fn
        tree.leave(module)
        return node

    def locate(task, node):
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: task)
        monkeypatch.setattr(torch._C, "_current_autograd_node", lambda: node)
        place, phase = tree.locate(stepping=False)
        return place.name, phase

    first = run(outer)
    assert locate(7, first) == ("Identity", "backward")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: [x * 2 for _ in range(first._sequence_nr() % 1000)]).result()
        second = thread.submit(run, inner).result()
    assert tree.root.children[1].calls == {"recompute": 1}
    assert locate(8, second) == ("Linear", "backward")
    assert locate(7, first) == ("Identity", "backward")
