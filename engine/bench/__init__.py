"""``slipstream bench``: how fast a model runs here, beside the floor of the hardware and beside peers.

``command.py`` is the command. ``survey.py`` and ``floors.py`` say what a step must read and compute, and how fast this
device could do that. ``pool.py`` runs each kernel set and each peer in a process of its own (``peer_worker.py``, with
``own.py`` for ours and ``peers.py`` for the others); the parent never touches a GPU. ``report.py`` and ``chart.py``
show what came back.
"""
