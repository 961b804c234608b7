"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a frozen model."""

import torch


class Adapted(torch.nn.Module):
    def __init__(self, linear, rank, generator):
        super().__init__()
        self.linear = linear
        scale = linear.in_features**-0.5
        down = torch.randn(rank, linear.in_features, generator=generator) * scale
        up = torch.randn(linear.out_features, rank, generator=generator) * scale
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def adapt(model, names, rank=4):
    """Puts adapters on the layers with these names; returns their parameters, the only trained."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    parameters = []
    for path, linear in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        number = name.isdigit() and f"{parent.rpartition('.')[2]}.{name}"
        if isinstance(linear, torch.nn.Linear) and (name in names or number in names):
            adapted = Adapted(linear, rank, generator)
            setattr(model.get_submodule(parent), name, adapted)
            parameters += [adapted.down, adapted.up]
    return parameters


def train(parameters, loss, steps=3):
    """Losses and the gradients of the first step, from parameters that are left as they were."""
    before = [x.detach().clone() for x in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        if first is None:
            first = [x.grad.clone() for x in parameters]
        optimizer.step()
    with torch.no_grad():
        for x, old in zip(parameters, before, strict=True):
            x.copy_(old)
    return losses, first


def assert_trains_alike(found, expected):
    (losses, grads), (wanted_losses, wanted_grads) = found, expected
    assert wanted_losses[-1] < wanted_losses[0]
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
