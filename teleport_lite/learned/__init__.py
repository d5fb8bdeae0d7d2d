r"""Learned optimizers: a recurrent network reads gradients and emits steps and group elements.

One step, from parameters w with gradient $\nabla$, is

- "fixed" or "rate": $w \mapsto w' - \eta\,\nabla L(w')$ with $w' = e^{\xi} \cdot w$, teleport first;
- "update": $w \mapsto e^{\xi} \cdot (w + u)$, the update where its gradient was read, then the teleport,

with $\eta$, u and $\xi$ emitted by a two-layer LSTM (arXiv:2305.13404, section 5; with momentum after
arXiv:2504.15399). An exact symmetry carries the gradient to w' for free; a mini-batch one needs a second gradient.
Everything runs on a batch of problems at once. Derived in the chapter *Learning to teleport*.
"""

from teleport_lite.learned.optimizer import EMITS, TELEPORTS, LearnedOptimizer, State, bounded, run
from teleport_lite.learned.task import Task, gradient, on_batch
from teleport_lite.learned.training import EXPLODED, PATIENCE, History, meta_train

__all__ = [
    "EMITS",
    "EXPLODED",
    "PATIENCE",
    "TELEPORTS",
    "History",
    "LearnedOptimizer",
    "State",
    "Task",
    "bounded",
    "gradient",
    "meta_train",
    "on_batch",
    "run",
]
