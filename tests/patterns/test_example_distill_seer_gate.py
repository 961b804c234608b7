"""The example that distils SeerAttention's gate, with a small random model in place of MiniLM."""

import runpy
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / "distill_seer_gate.py"))


class Letters:
    """A tokenizer whose tokens are bytes."""

    cls_token_id, sep_token_id = 256, 257

    def __call__(self, words, **_):
        return {"input_ids": list(words.encode())}


@pytest.fixture
def model():
    """Tokens of a block have one place, so blocks see the same ones in all texts, nearly."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip
    made = transformers.BertModel(config).eval()
    with torch.no_grad():
        places = made.embeddings.position_embeddings.weight
        places.copy_(2 * torch.randn(8, 32).repeat_interleave(64, 0))
    return made


def test_it_runs(example, model, monkeypatch, capsys):
    monkeypatch.setitem(example["main"].__globals__, "load", lambda folder: (Letters(), model))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert not example["main"](["--steps", "40"])
    head, _, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "2 layers, 2 heads, 512 tokens, blocks of 64x64"
    for row, (wanted, nearest) in zip(rows, ((50, 50), (75, 75), (90, 87.5)), strict=True):
        sparsity, reached, untrained, trained, *errors = (float(x.rstrip("%")) for x in row.split())
        assert (sparsity, reached) == (wanted, nearest)
        assert trained > untrained + 10
        assert len(errors) == 3
        assert min(errors) > 0
    assert all(torch.equal(before[n], weight) for n, weight in model.state_dict().items())


def test_all_blocks_are_the_dense_output(example, model):
    rows = torch.randint(0, 256, (2, 512))
    layers = example["inputs"](model, rows)
    gate = example["patterns"].SeerAttentionGate
    gates = [gate(2, 2, 16, gate_dim=16) for _ in layers]
    with torch.no_grad():
        exact = model(input_ids=rows).last_hidden_state.mean(1)
    for attend in (example["chosen_by"](gates, 8), example["chosen_by_truth"](8)):
        found = example["embed"](model, rows, attend)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert example["recall"](gates, layers, 8) == 1
