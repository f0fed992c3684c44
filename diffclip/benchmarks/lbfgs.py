"""L-BFGS with strong Wolfe search as `torch.optim.LBFGS` has it, in a few operations a step instead of hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe  # private there; the line search of the official probe

Objective = Callable[[Tensor], tuple[float, Tensor]]  # point (n,) -> its value and gradient (n,)


class History:
    """The last `size` steps s and changes y of the gradient, all (n,), and the direction of descent that they give.

    The two-loop recursion (Nocedal & Wright, Numerical Optimization, algorithm 7.4) takes two products of vectors for
    each step kept. Its first loop solves a triangular system in the products s_i y_j, and its second the transposed
    one, so that with these products at hand a direction takes four products with matrices. Memory: 2.5 size n numbers.
    """

    def __init__(self, size: int, point: Tensor) -> None:
        rows = size + size // 4 + 1  # more than are kept, so that they are moved seldom
        self.size, self.first, self.end = size, 0, 0
        self.s, self.y = (point.new_zeros(rows, len(point)) for _ in range(2))
        self.products = point.new_zeros(rows, rows)  # s_i y_j
        self.scale = 1.0  # of the first guess of the inverse Hessian

    def add(self, s: Tensor, y: Tensor) -> None:
        """Keep a step, if the objective is curved upwards along it."""
        sy = float(s.dot(y))
        if not sy > 1e-10:
            return
        if self.end == len(self.s):
            old, self.first, self.end = slice(self.first, self.end), 0, self.end - self.first
            self.s[: self.end] = self.s[old].clone()
            self.y[: self.end] = self.y[old].clone()
            self.products[: self.end, : self.end] = self.products[old, old].clone()
        here = self.end
        self.end += 1
        self.first = max(self.first, self.end - self.size)
        kept = slice(self.first, self.end)
        self.s[here], self.y[here] = s, y
        self.products[here, kept], self.products[kept, here] = self.y[kept] @ s, self.s[kept] @ y
        self.products[here, here] = sy  # as it was tested: another order of summation might give 0
        self.scale = sy / float(y.dot(y))

    def direction(self, gradient: Tensor) -> Tensor:
        """Where to go from a point with this gradient (n,), at least one step being kept: (n,)."""
        kept = slice(self.first, self.end)
        s, y, upper = self.s[kept], self.y[kept], self.products[kept, kept]
        alpha = torch.linalg.solve_triangular(upper, (s @ -gradient)[:, None], upper=True)[:, 0]
        r = torch.addmv(-gradient, y.T, alpha, alpha=-1) * self.scale
        gamma = torch.linalg.solve_triangular(upper.T, (upper.diagonal() * alpha - y @ r)[:, None], upper=False)[:, 0]
        return torch.addmv(r, s.T, gamma)


@torch.no_grad()
def lbfgs(objective: Objective, start: Tensor, max_iter: int, history_size: int = 100) -> Tensor:
    """The point to which `torch.optim.LBFGS(lr=1)` goes from `start` (n,) in at most `max_iter` steps, to rounding."""
    tolerance_gradient, tolerance_change, max_eval = 1e-7, 1e-9, max_iter * 5 // 4
    x, history = start.clone(), History(history_size, start)
    value, gradient = objective(x)
    evaluations = 1
    for iteration in range(max_iter):
        if float(gradient.abs().max()) <= tolerance_gradient:
            break
        d = history.direction(gradient) if history.end else -gradient
        t = 1.0 if iteration else min(1.0, 1.0 / float(gradient.abs().sum()))
        slope = gradient.dot(d)
        if float(slope) > -tolerance_change:
            break
        before, old = value, gradient
        value, gradient, t, count = _strong_wolfe(
            lambda x, t, d: objective(torch.add(x, d, alpha=float(t))),
            *(x, t, d, value, gradient, slope),
            max_ls=max_eval - evaluations,  # the rule of the torch that is pinned; older ones have 25
        )
        x, step = torch.add(x, d, alpha=float(t)), d * t
        evaluations += count
        if evaluations >= max_eval or float(step.abs().max()) <= tolerance_change:
            break
        if abs(value - before) < tolerance_change:
            break
        history.add(step, gradient - old)
    return x
