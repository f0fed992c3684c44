"""Is torch recording or transforming what runs? Then it cannot read a tensor's values, nor compute a part twice."""

import torch


def recording() -> bool:
    """Whether a graph is being recorded: torch.compile, torch.export (and so ONNX), torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether a function transform of torch.func (grad, vmap, jvp ...) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None
