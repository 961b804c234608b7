"""Cases of FSDP2: a model whose parameters are sharded trains as it does in one process."""

import copy

import torch
from distributed_ranks import case
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import sparse_fmha
from sparse_fmha import BlockMask

DIM, HEADS, GRID, VOCABULARY = 32, 4, (8, 16), 16


class Causal(nn.Module):
    """Block-sparse causal attention with grouped heads over the tokens of a grid in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, DIM + DIM)
        self.proj = nn.Linear(DIM, DIM)
        tokens = GRID[0] * GRID[1]
        blocks = torch.ones(1, 1, tokens // 64, tokens // 32, dtype=torch.bool)
        self.mask = BlockMask.from_blocks(blocks, tokens, tokens, 64, 32, causal=True)

    def forward(self, x):
        heads = self.qkv(x.flatten(1, 2)).unflatten(-1, (2 * HEADS, DIM // HEADS))
        q, k, v = heads.split([HEADS, HEADS // 2, HEADS // 2], -2)
        out = sparse_fmha.block_sparse_attention(q, k, v, self.mask)
        return self.proj(out.flatten(-2)).view(x.shape)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.recomputes = recomputes
        self.enter = nn.Embedding(VOCABULARY, DIM)
        window = sparse_fmha.nn.NeighborhoodAttention(DIM, HEADS, window=(3, 5))
        self.blocks = nn.ModuleList([Block(window), Block(Causal())])
        self.leave = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens):
        x = self.enter(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.leave(x)


def model_of(recomputes):
    torch.manual_seed(0)  # the same weights on all ranks
    return Model(recomputes)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (8, *GRID), generator=generator) for _ in range(count)]


def loss_of(model, tokens):
    logits = model(tokens).flatten(0, -2).float()
    return nn.functional.cross_entropy(logits, tokens.roll(1, -1).flatten())


def train(model, steps, part=lambda tokens: tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for tokens in batches(steps):
        optimizer.zero_grad()
        loss_of(model, part(tokens)).backward()
        optimizer.step()


def sharded(ranks, model, **options):
    mesh = init_device_mesh("cpu", (ranks.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@case(2, 4)
def fsdp_trains_as_one_process(ranks):
    """Each rank has its part of the batch; gradients are means over ranks."""
    for recomputes in (False, True):
        whole = model_of(recomputes)
        start = copy.deepcopy(whole.state_dict())
        parts = sharded(ranks, model_of(recomputes))
        train(whole, 3)
        train(parts, 3, lambda tokens: ranks.part(tokens, 0))
        for (name, one), part in zip(whole.named_parameters(), parts.parameters(), strict=True):
            assert part.to_local().numel() < one.numel()  # it is sharded
            torch.testing.assert_close(part.full_tensor(), one, rtol=1e-4, atol=1e-5)
            assert not torch.equal(one, start[name])


@case(2)
def fsdp_in_bfloat16(ranks):
    """Parameters gathered in bfloat16, gradients added in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = sharded(ranks, model_of(False), mp_policy=policy)
    (tokens,) = batches(1)
    loss_of(parts, ranks.part(tokens, 0)).backward()
    whole = model_of(False)
    loss_of(whole, tokens).backward()
    expected = torch.cat([x.grad.flatten() for x in whole.parameters()])
    found = torch.cat([x.grad.full_tensor().flatten() for x in parts.parameters()])
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 0.02 * expected.norm()  # a bias of keys alone has none
