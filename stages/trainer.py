"""transformers' Trainer as all stages use it: without work, or waits for a device, in steps that nobody looks at."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer

from stages import background


class StageTrainer(Trainer):
    """Computes the norm of the gradients only where it clips them or where it is logged, and scales nothing by it."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> object:
        step, args = self.state.global_step + 1, self.args
        if step % self.state.logging_steps and not (step == 1 and args.logging_first_step):
            return None
        if grad_norm is not None or self.is_deepspeed_enabled:
            return super()._get_grad_norm(model, grad_norm)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        large = self.is_deepspeed_enabled and isinstance(self.model, nn.Module) and background.gains(self.model)
        with background.written_behind(self.model_wrapped, Path(output_dir)) if large else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)
