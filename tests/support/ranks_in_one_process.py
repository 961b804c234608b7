"""`pass_kv` of all ranks one after the other in one process: a GPU computes what several would.

The steps, calls, merges and sums are those of `pass_kv`. Messages come from a table in their place,
so nothing overlaps.
"""

from unittest import mock

import torch

from sparse_fmha.distributed import _cut_lists, _exchange, _groups, _key_plan, _pass, _steps


class Table:
    """What all ranks send, in the place of `_exchange.send` and `send_back`."""

    def __init__(self, plans, own):
        self.plans, self.own = plans, own
        self.rank = 0
        self.returned = [torch.zeros_like(x, dtype=torch.float64) for x in own]

    def send(self, moved, step, group, name):
        (number,) = (i for i, one in enumerate(self.plans[self.rank]) if one is step)
        parts = [
            part
            for source, plan in enumerate(self.plans)
            for part in _exchange._parts(self.own[source], plan[number].sent[self.rank])
        ]
        arrived = torch.cat([self.own[0][:0], *parts])
        assert len(arrived) == sum(step.received)
        return Arrived([arrived])

    def send_back(self, gradients, step, group, name):
        (number,) = (i for i, one in enumerate(self.plans[self.rank]) if one is step)
        for source, part in enumerate(gradients[0].split(step.received)):
            rows = self.plans[source][number].sent[self.rank]
            chosen = [rows] if isinstance(rows, torch.Tensor) else rows
            first = 0
            for some in chosen:
                size = len(self.returned[source][some])
                self.returned[source][some] += part[first : first + size]
                first += size
        sent_by_us = sum(len(x) for x in map(self._sent, step.sent))
        return Arrived([gradients[0].new_zeros(sent_by_us, *gradients[0].shape[1:])])

    def _sent(self, rows):
        return torch.cat([self.own[self.rank][:0], *_exchange._parts(self.own[self.rank], rows)])


class Arrived:
    def __init__(self, received):
        self._received = received

    def wait(self):
        return self._received


def plans_of(shards, mask, causal):
    """The steps of each rank."""
    if mask is None:
        return [_steps.dense(shards, shards, r, causal, None) for r in range(shards.world)]
    cuts = (_cut_lists.Cut(mask, spans, spans) for spans in shards.spans)
    needed = torch.stack([cut.needed() for cut in cuts])
    found = []
    for rank in range(shards.world):
        with (
            mock.patch.object(_groups, "resolve", return_value=(None, rank, shards.world)),
            mock.patch.object(_key_plan, "_gathered", return_value=needed),
        ):
            found.append(_key_plan.plan_kv(mask, shards).steps)
    return found


def taken(x, spans):
    return torch.cat([x[:, :0], *(x[:, start:stop] for start, stop in spans)], 1)


def pass_kv(q, k, v, dout, shards, mask=None, causal=False):
    """out, lse, and the gradients of q, k and v of the whole sequence."""
    plans = plans_of(shards, mask, causal)
    both = torch.stack([k, v], 2)
    own = [taken(both, spans).movedim(1, 0).contiguous() for spans in shards.spans]
    table = Table(plans, own)
    results = [torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)]
    results += [torch.empty_like(x) for x in (q, both)]
    sums = []
    with (
        mock.patch.object(_exchange, "send", table.send),
        mock.patch.object(_exchange, "send_back", table.send_back),
    ):
        for rank, spans in enumerate(shards.spans):
            table.rank = rank
            way = _pass.Pass(plans[rank], None, None)
            rows, back = taken(q, spans), taken(dout, spans)
            out, lse = way.forward(rows, [own[rank]], None, None)
            needs = (True, True, False)
            dq, total = way.backward((back, None, rows, out, lse), None, [own[rank]], needs)
            sums.append(total[0])
            _put(results[:3], (out, lse, dq), spans)
    for total, returned, spans in zip(sums, table.returned, shards.spans, strict=True):
        _put(results[3:], ((total + returned).movedim(0, 1),), spans)
    return (*results[:3], *results[3].unbind(2))


def _put(wholes, parts, spans):
    for whole, part in zip(wholes, parts, strict=True):
        first = 0
        for start, stop in spans:
            whole[:, start:stop] = part[:, first : first + stop - start].to(whole.dtype)
            first += stop - start


def relative_errors(found, expected):
    """Of each tensor, root mean square."""
    pairs = zip(found, expected, strict=True)
    return [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs]
