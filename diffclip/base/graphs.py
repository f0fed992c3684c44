"""Is torch recording or transforming what runs? Then it cannot read a tensor's values, nor compute a part twice."""

import torch


def recording() -> bool:
    """Whether a graph is being recorded: torch.compile, torch.export (and so ONNX), torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether a function transform of torch.func (grad, vmap, jvp ...) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def watched(x: torch.Tensor) -> bool:
    """Whether a mode counts or replaces the operations that run, or x only stands for numbers (FakeTensor, DTensor)."""
    return torch._C._len_torch_dispatch_stack() > 0 or type(x) is not torch.Tensor
