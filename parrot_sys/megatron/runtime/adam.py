"""Adam in plain torch with the state layout of the fused Adams of Transformer Engine and apex.

Megatron's distributed optimizer cannot load its own checkpoints with `torch.optim.AdamW`, which keeps a step tensor for
each parameter; it expects one `step` in each group. `install_adam` puts this class where Megatron looks for a fused
Adam, if neither Transformer Engine nor apex is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from parrot_sys.errors import ConfigError


class Adam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980), or AdamW (arXiv 1711.05101) with `adam_w_mode`; float32 moments, `step` in the group."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        """
        Args:
            params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
            adam_w_mode: decoupled weight decay.
            bias_correction: divide the moments by 1 - beta^step.
            capturable: Megatron-Core >= 0.19 passes it; a step in a CUDA graph needs a fused Adam.
        """
        if capturable:
            raise ConfigError("optimizer_cuda_graph needs Transformer Engine's Adam: install it or switch it off")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; takes no closure."""
        if closure is not None:
            raise ValueError("Adam takes no closure")
        for group in self.param_groups:
            # As in the fused Adams: an empty group has no step, and Megatron aligns it when it saves.
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update([p for p in group["params"] if p.grad is not None], group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        gradients = [p.grad for p in params if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, params, alpha=decay))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        corrected = group["bias_correction"]
        correction1 = 1 - beta1 ** group["step"] if corrected else 1.0
        correction2 = 1 - beta2 ** group["step"] if corrected else 1.0
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -lr / correction1)


def install_adam() -> bool:
    """Make Megatron's optimizers use `Adam` where no fused one is installed; True if they do."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if optimizers.Adam is Adam:
        return True
    if not optimizers.USING_PYTORCH_OPTIMIZER:
        return False
    optimizers.Adam = distrib_optimizer.Adam = Adam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    # Of the two layouts that the distributed optimizer knows, apex's is ours.
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
