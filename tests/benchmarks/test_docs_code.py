"""Every code block of the docs runs on its own, or says why it does not and is compiled."""

import re
import socket
import subprocess
import sys

import pages
import pytest
import server_stubs
import torch
from pages import PAGES, ROOT

from sparse_fmha import reference
from sparse_fmha.cli import main

BLOCKS = [block for page in PAGES for block in pages.blocks_of(page)]
COMPILED = "compiled only"
WITH_A_MODEL = "run with a small random model"
OPTIONAL = ("diffusers", "matplotlib", "transformers")
AS_ONE_RANK = "run in one process"
WITH_STUBS = "run over stubs of the server"


def of(*languages):
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def run(block):
    """The names that a block of Python leaves."""
    names = {"__name__": "docs"}
    torch.manual_seed(0)
    exec(compile(block.code, str(block), "exec"), names)
    return names


def of_the_page(name, word):
    (block,) = (b for b in BLOCKS if b.page.name == name and word in b.code)
    return run(block)


@pytest.fixture
def small_models(monkeypatch):
    """What pretrained models are made from is small, random and on the CPU."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from sparse_fmha.integrations import transformers as sparse

    def pipeline(name, **_):
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4,
            text_dim=8, ffn_dim=8, freq_dim=8, num_layers=1,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.WanPipeline(None, None, vae, scheduler, transformer=transformer)
        pipe.to = lambda device: pipe
        return pipe

    def llama(name, *, attn_implementation="sdpa"):
        config = transformers.LlamaConfig(
            vocab_size=90, hidden_size=16, intermediate_size=16, num_hidden_layers=32,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16384,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        model.set_attn_implementation(attn_implementation)
        return model

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", llama)
    yield
    sparse.register()


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun tells the only process of its group."""
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told["MASTER_PORT"] = free.getsockname()[1]
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def stubs(monkeypatch):
    """vLLM and SGLang as far as their backends need them."""
    server_stubs.install(monkeypatch)
    names = [f"sparse_fmha.integrations.{name}" for name in ("vllm", "sglang")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in names:
        sys.modules.pop(name, None)


# By what the comment before a block says.
FIXTURES = {
    WITH_A_MODEL: "small_models",
    AS_ONE_RANK: "one_rank",
    WITH_STUBS: "stubs",
}


@of("python")
def test_python(block, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if block.kind == COMPILED:
        compile(block.code, str(block), "exec")
        return
    for name in OPTIONAL:
        if re.search(rf"\b{name}\b", block.code):
            pytest.importorskip(name)
    if block.kind:
        request.getfixturevalue(FIXTURES[block.kind])
    run(block)


@of("console")
def test_console(block, capsys):
    """What a command is shown to print is what it prints; `...` stands for any lines."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, shown = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", part, re.DOTALL).groups()
        program, module, name, *arguments = line.replace("\\\n", " ").split()
        assert (program, module, name) == ("python", "-m", "sparse_fmha")
        assert not main(arguments)
        pattern = ".*".join(re.escape(text.strip()) for text in shown.split("...\n"))
        assert re.fullmatch(pattern, capsys.readouterr().out.strip(), re.DOTALL)


@of("sh")
def test_shell(block):
    """It parses, and the modules, files and targets that it names are there."""
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for module in re.findall(r"python -m (benchmarks[\w.]*|sparse_fmha)", block.code):
        place = ROOT / ("python" if module == "sparse_fmha" else "") / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), module
    for path in re.findall(r"\b((?:tools|tests|examples)/[\w/]+\.(?:py|sh))", block.code):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^(\w+):|^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {word for pair in targets for words in pair for word in words.split()}
    assert set(re.findall(r"^make (\w+)", block.code, re.MULTILINE)) <= targets


def test_blocks_have_a_language_and_a_reason():
    assert {block.language for block in BLOCKS} <= {"python", "sh", "console", "text"}
    assert {b.kind for b in BLOCKS} <= {None, COMPILED, *FIXTURES}
    assert len([b for b in BLOCKS if b.language == "python" and b.kind != COMPILED]) >= 15


def test_readme_computes_attention():
    names = of_the_page("README.md", "return_lse")
    q, k, v, dense, lse = (names[x] for x in ("q", "k", "v", "dense", "lse"))
    length = q.shape[1]
    exact, exact_lse = reference.attention(q, k, v, torch.ones(length, length).tril().bool())
    torch.testing.assert_close(dense.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_usage_vision_transformer():
    names = of_the_page("usage.md", "CLS token")
    q, k, v, out = (names[x] for x in ("q", "k", "v", "out"))
    place = torch.arange(14).clamp(3, 10)  # windows shift at borders
    near = (torch.arange(14) - place[:, None]).abs() <= 3
    visible = torch.ones(197, 197, dtype=torch.bool)
    visible[1:, 1:] = (near[:, None, :, None] & near[None, :, None, :]).reshape(196, 196)
    exact, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_usage_custom_mask():
    names = of_the_page("usage.md", "from_mask_mod")
    q, k = torch.arange(2048)[:, None], torch.arange(2048)
    visible = (k < 64) | ((k <= q) & (k > q - 256))
    exact, _ = reference.attention(*(names[x] for x in ("q", "k", "v")), visible)
    torch.testing.assert_close(names["out"].double(), exact, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_usage_models(small_models):
    model = of_the_page("usage.md", "AutoModelForCausalLM")["model"]
    tokens = torch.randint(0, 90, (1, 70 * 128))
    ours = model(tokens, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    assert 0 < (ours - model(tokens, use_cache=False).logits).norm() < 0.1 * ours.norm()
    pipe = of_the_page("usage.md", "WanPipeline")["pipe"]
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "sparse_fmha"
