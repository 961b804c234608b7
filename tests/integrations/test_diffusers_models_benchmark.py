"""The study of whole calls of models, with few tokens on the CPU."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.cases.models import CASES
from benchmarks.harness import report
from benchmarks.studies import models
from sparse_fmha.integrations import _diffusion_presets as presets
from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_models import find

ARGUMENTS = ["--tiny", "--blocks", "1", "--repeats", "1"]


def run(path, *arguments):
    assert models.main([*ARGUMENTS, *arguments, "--out", str(path)]) == 0
    return {each["case"]: each for each in report.load(path)["models"]}


def test_every_variant_of_every_model_runs(tmp_path, capsys):
    found = run(tmp_path / "a.json", "--compile", "none")
    assert list(found) == list(CASES)
    for name, model in found.items():
        own = CASES[name].variants
        names = ["sparse_fmha"] if own is None else ["torch", "dense", *own]
        assert set(names) | {models.NOTHING} <= set(model["rows"])
        for row in model["rows"].values():
            assert list(row) == ["eager"]
            assert row["eager"].get("call", 0) > 0, row
        assert set(model["shares"]) == set(model["rows"]) - {models.NOTHING}
    assert capsys.readouterr().out.count("attention  peak, MiB") == len(CASES)


@pytest.mark.filterwarnings("ignore")
def test_with_regional_compilation(tmp_path):
    given = ("--compile", "eager", "--case", "wan-14b-720p", "--dtype", "float32")
    rows = run(tmp_path / "a.json", *given)["wan-14b-720p"]["rows"]
    compiled = {name for name, row in rows.items() if "compiled" in row}
    assert compiled == {"torch", "sol-comfyui"}
    assert all(rows[name]["compiled"].get("call", 0) > 0 for name in compiled)


def test_models_are_compiled_at_once_before(tmp_path, capsys, monkeypatch):
    """Each in a process, which measures nothing; the decoder has nothing to compile."""
    started = []

    class Process:
        def __init__(self, command, env):
            started.append(command)
            assert command[:3] == [sys.executable, "-m", "benchmarks.studies.models"]
            assert int(env["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1
            self.returncode = models.main(command[3:])

        def wait(self):
            return self.returncode

    monkeypatch.setattr(models.subprocess, "Popen", Process)
    monkeypatch.setattr(models, "peak_bytes", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(models.timing, "measure", lambda *_, **__: pytest.fail("measured"))
    args = models.parser().parse_args([*ARGUMENTS, "--compile", "eager", "--dtype", "float32"])
    args.device, args.case = "cpu", ["ltx2.5-decoder", "flux2-klein-2048"]
    models.precompile(args)
    assert [command[4] for command in started] == ["flux2-klein-2048"]
    assert capsys.readouterr().out.startswith("compiled 1 models in ")


def test_more_memory_than_dense_attention_is_told():
    def row(eager, compiled=None):
        made = {"eager": {"call": 1.0, "peak_bytes": eager}}
        return (
            made
            if compiled is None
            else {**made, "compiled": {"call": 1.0, "peak_bytes": compiled}}
        )

    rows = {"torch": row(3000, 1000), "dense": row(2000), "a": row(2009, 1100), "b": row(2100)}
    rows["c"] = {"eager": {"error": "none"}}
    assert models.more_memory(rows) == ["b (eager)", "a (compiled)"]
    assert models.more_memory({"sparse_fmha": row(5)}) == []
    assert models.more_memory({name: row(None) for name in "ab"}) == []
    rows[models.NOTHING] = row(1)
    told = models.table("wan-14b-720p", CASES["wan-14b-720p"], rows, 2)
    assert told.endswith("more memory than dense attention: b (eager), a (compiled)")


def test_an_error_is_told(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(models, "peak_bytes", broken)
    rows = run(tmp_path / "a.json", "--case", "wan-14b-720p", "--compile", "none")
    row = rows["wan-14b-720p"]["rows"]["torch"]["eager"]
    assert row == {"error": "ValueError: no such thing"}
    assert "ValueError: no such thing" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].variants])
def test_the_shapes_are_those_of_the_models(name):
    """What the library reads from the real inputs; presets and windows fit it."""
    case = CASES[name]
    with torch.device("meta"):
        model, inputs = case.make(1, False)  # these are on the CPU
    model_name, row = find(model)
    layout = row.layout(model, inputs)
    assert layout.grid == case.grid
    assert layout.tokens == case.tokens
    for given in case.variants.values():
        if "preset" in given:
            preset = presets.find(given["preset"])
            assert model_name in preset.models
            assert preset.fits(case.grid)
        else:
            options = {key: value for key, value in given.items() if key != "method"}
            table.make(given["method"], options).check(Layout(case.grid))


def test_the_decoder_in_its_real_shape():
    """Without data: its last stage has the tokens that the case says."""
    case = CASES["ltx2.5-decoder"]
    with torch.device("meta"):
        model, inputs = case.make(1, False)
    model.set_attn_processor(models.NothingInDecoder())
    grids = []
    for block in model.decoder.diff_blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: grids.append((args or (*kwargs.values(),))[0].shape[1:4]),
            with_kwargs=True,
        )
    with torch.inference_mode():
        model(inputs["z"].to("meta"), return_dict=False)
    assert {tuple(grid) for grid in grids} == {case.grid}
    assert math.prod(case.grid) == case.tokens
