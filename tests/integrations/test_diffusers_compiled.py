"""Enabled models of diffusers under torch.compile: one graph for all sparse layers, exactly."""

import threading

import pytest
import tiny_diffusion
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")  # the newest of them

import tiny_diffusion_models
from tiny_diffusion_models import all_blocks, close

from sparse_fmha.integrations import diffusers as sparse

MAKERS = {**tiny_diffusion.MAKERS, **tiny_diffusion_models.MORE}


class Graphs:
    """A backend that counts the graphs it gets and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(name, **options):
    found = tiny_diffusion if name in tiny_diffusion.MAKERS else tiny_diffusion_models
    return found.make(name, **options)


def compiled_blocks(tiny, graphs):
    tiny.model.compile_repeated_blocks(backend=graphs, fullgraph=True)


def compiled_model(tiny, graphs):
    tiny.model = torch.compile(tiny.model, backend=graphs, fullgraph=True)


def graphs_of(tiny, compiled):
    """The number of graphs of a call, the largest difference to the call without them, and the
    number after two more calls."""
    expected, graphs, own = tiny(), Graphs(), tiny.model
    compiled(tiny, graphs)
    out, first = tiny(), graphs.count
    tiny(), tiny(400)
    tiny.model = own
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert graphs.count == first
    return first, out, expected


# Blocks that the model compiles apart: two kinds of them, or the last without a part.
GRAPHS = {"wan": 1, "minimax_h3": 2, "hunyuan_video": 4}


@pytest.mark.parametrize("name", GRAPHS)
def test_as_many_graphs_as_the_model_has_itself(name):
    tiny = make(name, **({"layers": 6} if name == "wan" else {}))
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    found, out, expected = graphs_of(tiny, compiled_blocks)
    assert found == GRAPHS[name]
    assert out.equal(expected) or name == "hunyuan_video"  # padded text is merged


@pytest.mark.parametrize("name", ["cogvideox", "qwen_image", "chroma"])
def test_one_graph_of_the_whole_model(name):
    tiny = make(name)
    sparse.enable(tiny.model, "neighborhood", **tiny.options)
    assert graphs_of(tiny, compiled_model)[0] == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("block_sparse", {"mask": all_blocks}),
        ("cube_top_k", {"keep": 0.5}),
        ("radial", {"decay": 0.2, "block": 64}),
        ("sol", {"tau": 0.5}),
    ],
)
def test_methods_in_one_graph_for_all_layers(method, options):
    tiny = make("wan")
    sparse.enable(tiny.model, method, **options)
    found, out, expected = graphs_of(tiny, compiled_blocks)
    assert found == 1
    assert out.equal(expected)


def test_routed_blocks_beside_padded_text():
    """Where all blocks are exact, the graph is the original."""
    tiny, graphs = make("hunyuan_video", lengths=(3, 10)), Graphs()
    expected = tiny()
    sparse.enable(tiny.model, "sol", tau=-1e6)
    compiled_blocks(tiny, graphs)
    close(tiny(), expected)
    assert graphs.count == GRAPHS["hunyuan_video"]


def test_methods_that_read_the_text_say_so():
    """Its length is part of shapes."""
    tiny = make("hunyuan_video", lengths=(3, 10))
    sparse.enable(tiny.model, "rectified", keep=0.5)
    compiled_blocks(tiny, Graphs())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads the padding of the text"):
        tiny()


@pytest.mark.parametrize("compiled", [compiled_blocks, compiled_model])
def test_dense_steps_and_layers(compiled):
    """A graph for each kind of step and layer; the steps are counted outside of it."""
    times = (900, 900, 700, 400, 900, 700)
    tiny = make("wan", layers=3)
    sparse.enable(
        tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2, dense_layers=[0]
    )
    expected, graphs = [tiny(t) for t in times], Graphs()
    sparse.disable(tiny.model)
    sparse.enable(
        tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2, dense_layers=[0]
    )
    compiled(tiny, graphs)
    for t, out in zip(times, expected, strict=True):
        assert tiny(t).equal(out)
    assert graphs.count == (3 if compiled is compiled_blocks else 2)


def test_a_thread_whose_first_call_is_compiled():
    tiny, graphs, found = make("wan"), Graphs(), []
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    expected = tiny()
    compiled_blocks(tiny, graphs)
    thread = threading.Thread(target=lambda: found.extend([tiny(), tiny()]))
    thread.start()
    thread.join()
    assert [out.equal(expected) for out in found] == [True] * 2
    assert graphs.count == 1
    assert tiny().equal(expected)
    assert graphs.count == 1


def test_another_size_is_one_more_graph():
    tiny, graphs = make("wan"), Graphs()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    other = {"hidden_states": torch.randn(2, 4, 5, 12, 12)}
    expected = tiny(), tiny(**other)
    compiled_blocks(tiny, graphs)
    assert tiny().equal(expected[0])
    assert graphs.count == 1
    assert tiny(**other).equal(expected[1])
    assert graphs.count == 2
    assert tiny().equal(expected[0])
    assert graphs.count == 2


def test_disable_and_enable_after_compiling():
    tiny, graphs = make("wan"), Graphs()
    dense = tiny()
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    expected, model = tiny(), tiny.model
    compiled_model(tiny, graphs)
    assert tiny().equal(expected)
    sparse.disable(tiny.model)
    assert tiny().equal(dense)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)  # the compiled model itself
    assert sparse.is_enabled(model)
    assert tiny().equal(expected)


def test_image_tokens_that_a_mask_hides_are_an_error_in_a_graph():
    tiny = make("flux")
    sparse.enable(tiny.model, "neighborhood", window=3)
    compiled_model(tiny, Graphs())
    mask = torch.arange(109).expand(2, 1, 1, 109) < 60
    with pytest.raises(RuntimeError, match="hides image tokens"):
        tiny(joint_attention_kwargs={"attention_mask": mask})


def test_gradients_of_compiled_blocks():
    tiny = make("wan")
    sparse.enable(tiny.model, "neighborhood", window=tiny.window)
    weight = tiny.model.blocks[0].attn1.to_q.weight

    def gradient():
        weight.grad = None
        tiny.model(**tiny.inputs, return_dict=False)[0].square().mean().backward()
        return weight.grad

    expected = gradient()
    tiny.model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    close(gradient(), expected)
