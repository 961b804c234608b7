"""The filter of racecheck's reports: the known ones pass, whatever else is there does not.

The samples are made of lines as CUDA 12 and 13 print them, with places of today's sources.
"""

import pytest
import racecheck
from racecheck import GRID, INCLUDE, KNOWN, LISTS, STRIPES

KERNEL = "void sparse_fmha::sm90::attention_kernel<sparse_fmha::Row<(int)128>>(T1::Params)"
# The same place as newer and older versions name it, with the whole path or with the file alone.
FORMS = {
    "new": KERNEL + "+0x1f20 in /build/include/sparse_fmha/{file}:{line}",
    "file": KERNEL + "+0x1f20 in {name}:{line}",
    "old": "0x1f20 in /build/include/sparse_fmha/{file}:{line}:" + KERNEL,
}
COPY = "/cutlass/include/cute/arch/copy_sm90_tma.hpp:1450"


def place(file, line, form="new"):
    if isinstance(line, str):
        text = (INCLUDE / file).read_text()
        line = text[: text.index(line)].count("\n") + 1
    return FORMS[form].format(file=file, name=file.split("/")[-1], line=line)


def analysis(first, *others):
    lines = [f"Error: Race reported between {first[0]} access at {first[1]}"]
    lines += [f"    and {kind} access at {where} [32 hazards]" for kind, where in others]
    return lines


def hazard(kind, first, second):
    return [
        f"Error: Potential {kind} hazard detected at __shared__ 0x410 in block (11,0,0) :",
        *(f"    {access} Thread (127,0,0) at {where}" for access, where in (first, second)),
        "    Current Value : 0, Incoming Value : 181",
        "    Saved host backtrace up to driver entry point at kernel launch time",
        "    Host Frame: error_handler() [0x1234] in libtorch.so",
    ]


def output(*reports, counted=None):
    counted = len(reports) if counted is None else counted
    lines = ["COMPUTE-SANITIZER", *(line for report in reports for line in (*report, ""))]
    lines += [f"RACECHECK SUMMARY: {counted} hazards displayed ({counted} errors, 0 warnings)"]
    return "160 problems, 0 wrong\n" + "".join(f"========= {line}\n" for line in lines)


def known(text):
    return [report.known() for report in racecheck.reports(text)]


NEEDS = "Read", place(GRID, "shared.needed[place.index] >>")
PUBLISH = "Write", place(GRID, "shared.needed[place.index] = box.needed")
LOOK_UP = "Read", place(LISTS, "seen.set(r, word,")


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_sites_are_in_the_sources(known):
    for site in (*known.reads, *known.writes):
        assert site.function is None or len(site.lines()) == 1, site


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.name)
def test_known(entry, form):
    write = entry.writes[0]
    second = "Write", place(write.file, write.lines()[0][0], form)
    for read in entry.reads:
        first = "Read", place(read.file, read.lines()[0][-1], form)
        text = output(analysis(first, second, second), analysis(second, first))
        assert known(text) == [entry.name] * 2
        assert known(output(hazard("WAR", first, second))) == [entry.name]


# What CUDA 13.0 printed for the kernels of block lists; the lines are looked up anew.
MEASURED = """\
========= Error: Race reported between Write access at sparse_fmha::sm90::Lists<\
sparse_fmha::sm90::KernelTraits<sparse_fmha::sm90::KernelConfig<sparse_fmha::BlockSparse, \
cutlass::half_t, (int)256, (int)128, (int)64, (int)2, (sparse_fmha::sm90::Schedule)1, \
(sparse_fmha::sm90::Skipping)0>>, sparse_fmha::BlockSparse>::publish(StageBox &, \
const sparse_fmha::sm90::RingState<(int)2> &) const+0x12900 in lists.h:{publish}
=========     and Read access at sparse_fmha::seen_columns(const sparse_fmha::BlockSparse::Params \
&, const sparse_fmha::BoxSizes &, const int *, unsigned int, const unsigned char *, int, int, \
int)::[lambda(int, bool) (instance 1)]::operator ()(int, bool) const+0x25b0 \
in list_stages.h:{seen} [16 hazards]
=========     and Read access at sparse_fmha::first_columns(int)+0x5710 \
in list_stages.h:{first} [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_known_of_a_real_run():
    def line(site):
        return site.lines()[0][0]

    lists = KNOWN[2]
    text = MEASURED.format(
        publish=line(lists.writes[0]), seen=line(lists.reads[1]), first=line(lists.reads[2])
    )
    assert known(text) == [lists.name]


def test_a_copy_in_a_header_of_another():
    assert known(output(analysis(LOOK_UP, ("Write", f"{KERNEL}+0x10 in {COPY}")))) == [
        KNOWN[2].name
    ]
    assert known(output(analysis(NEEDS, ("Write", f"{KERNEL}+0x10 in {COPY}")))) == [None]


UNKNOWN = {
    "another function of the file": [("Read", place(GRID, "has_row(Work const&")), PUBLISH],
    "behind the function": [("Read", place(GRID, KNOWN[0].reads[0].lines()[0][-1] + 1)), PUBLISH],
    "another mechanism's": [NEEDS, ("Write", place(STRIPES, "stage.keys[w * 32 + lane] ="))],
    "another file of that name": [("Read", NEEDS[1].replace("geometry/grid", "forward")), PUBLISH],
    "written by the consumer": [("Write", NEEDS[1]), ("Read", PUBLISH[1])],
    "two writes": [("Write", NEEDS[1]), PUBLISH],
    "no lines": [NEEDS, ("Write", KERNEL + "+0x1f20")],
    "one of several": [NEEDS, PUBLISH, ("Write", place(GRID, 1))],
}


@pytest.mark.parametrize("accesses", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(accesses):
    assert known(output(analysis(NEEDS, PUBLISH), analysis(*accesses))) == [KNOWN[0].name, None]


@pytest.mark.parametrize("kind", ["RAW", "WAW"])
def test_another_kind_of_hazard(kind):
    assert known(output(hazard(kind, NEEDS, PUBLISH))) == [None]


def test_the_line_behind_a_function_is_not_in_it():
    (lines,) = KNOWN[0].reads[0].lines()
    assert (INCLUDE / GRID).read_text().splitlines()[lines[-1] - 1].strip() == "}"
    assert not KNOWN[0].reads[0].has("grid.h", lines[-1] + 1)


SOUND = output(analysis(NEEDS, PUBLISH))
BROKEN = {
    "no RACECHECK SUMMARY": "Traceback ...\n",
    "no RACECHECK SUMMARY ": SOUND[: SOUND.index("========= RACECHECK")],
    "counts 2 reports, of which 1 are here": output(analysis(NEEDS, PUBLISH), counted=2),
    "no report of a race: .* Internal": "========= Internal Sanitizer Error: out of memory\n"
    + SOUND,
    "no report of a race: .* Error: Target": SOUND
    + "========= Error: Target application stopped\n",
    "no report of a race: .* not printed": SOUND + "========= 9 hazards were not printed\n",
    "part of no report": "=========     and Write access at x [1 hazard]\n" + SOUND,
    "less than two accesses": output(analysis(NEEDS)),
}


@pytest.mark.parametrize(("message", "text"), BROKEN.items())
def test_output_that_is_not_understood(message, text):
    with pytest.raises(ValueError, match=message.strip()):
        racecheck.reports(text)


@pytest.mark.parametrize("new", [False, True])
def test_command(tmp_path, capsys, new):
    log = tmp_path / "racecheck.log"
    found = [analysis(NEEDS, PUBLISH)] * 2 + [analysis(LOOK_UP, PUBLISH)] * new
    log.write_text(output(*found))
    assert racecheck.main([str(log)]) == new
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"2 known: {KNOWN[0].name}"
    assert lines[-1] == f"{int(new)} unknown reports"
    assert sum("Race reported" in line for line in lines) == new
