"""A state-space model, Mamba, step by step with its caches as the state: the gradient of its scan.

`mambapy` differentiates a sequence by one parallel scan over all steps, whose memory grows with
their number. Its `step`, which was made for generation, is a module as this package takes it.

    $ pip install mambapy
    $ python docs/examples/state_space.py
    500 steps: the gradient of the scan; peak 2.27 MiB, of the scan 57.69 MiB

Elsewhere within 5 %.
"""

import torch
from mambapy.mamba import Mamba, MambaConfig
from torch import Tensor, nn

from tbptt_ckpt import peak_memory, run_window

WIDTH, LAYERS, LANES = 16, 2, 2


class Steps(nn.Module):
    """One step of a Mamba: [B, D] to [B, D], and the caches of its layers."""

    def __init__(self, mamba: Mamba) -> None:
        super().__init__()
        self.mamba = mamba

    def forward(self, x: Tensor, caches: list):
        return self.mamba.step(x, caches)


def first_caches(config: MambaConfig) -> list:
    """Of each layer, the hidden state and the last inputs of its convolution."""
    hidden = torch.zeros(LANES, config.d_inner, config.d_state, dtype=torch.float64)
    inputs = torch.zeros(LANES, config.d_inner, config.d_conv - 1, dtype=torch.float64)
    return [(hidden, inputs) for _ in range(config.n_layers)]


def main(steps: int = 500) -> str:
    torch.manual_seed(0)
    config = MambaConfig(d_model=WIDTH, n_layers=LAYERS)
    mamba = Mamba(config).double()
    x, y = torch.randn(2, steps, LANES, WIDTH, dtype=torch.float64)

    with peak_memory() as scan:
        outputs = mamba(x.transpose(0, 1))  # batch first
        nn.functional.mse_loss(outputs, y.transpose(0, 1)).backward()
    expected = [weight.grad for weight in mamba.parameters()]

    mamba.zero_grad()
    with peak_memory() as window:
        run_window(Steps(mamba), nn.MSELoss(), x, y, first_caches(config), strategy="sqrt")
    for weight, gradient in zip(mamba.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-10)
    peaks = [meter.peak_bytes / 2**20 for meter in (window, scan)]
    return (
        f"{steps} steps: the gradient of the scan; "
        f"peak {peaks[0]:.2f} MiB, of the scan {peaks[1]:.2f} MiB"
    )


if __name__ == "__main__":
    print(main())
