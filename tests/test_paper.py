"The paper: prose is ours, numbers are the pipeline's."
import re

import pytest
from conftest import ROOT

from mmqlora.report import check_keys

PAPER = ROOT/"paper"
SECTIONS = sorted((PAPER/"sections").glob("*.tex"))
TEXT = {p.stem: re.sub(r"(?<!\\)%.*", "", p.read_text()) for p in SECTIONS}
ALL = "\n".join(TEXT.values()) + (PAPER/"main.tex").read_text()


@pytest.mark.parametrize("section", TEXT)
def test_a_section_types_no_result(section):
    prose = re.sub(r"\\(val|ref|label|cite|run|input|tabinput|figinput|includegraphics|bibitem|url|texttt)(\[[^]]*\])?\{[^}]*\}", "", TEXT[section])
    prose = re.sub(r"Qwen2\.5-VL|SmolLM2-\w+|Python 3\.\d+", "", prose)
    assert not re.search(r"\d+\.\d+|\d+\s*(\\,|~)?\s*(\\%|percent|points?\b|GiB|MiB|GB|MB|KiB|ms\b)", prose)
    assert not re.search(r"\b(TODO|TBD|FIXME|lorem)\b", prose, re.I)


def test_every_value_table_and_figure_exists(): assert check_keys(PAPER) == []


def test_no_value_is_defined_twice():
    keys = re.findall(r"\\defval\{([^}]*)\}", (PAPER/"generated/macros.tex").read_text())
    assert keys and len(set(keys)) == len(keys)


def test_a_missing_value_would_be_found(tmp_path):
    (tmp_path/"sections").mkdir()
    (tmp_path/"generated").mkdir()
    (tmp_path/"main.tex").write_text("\\val{qlora.test.exact} \\tabinput{none} \\figinput{none}")
    (tmp_path/"generated/macros.tex").write_text("\\defval{lora.test.exact}{0.5}\n")
    assert len(check_keys(tmp_path)) == 3


def test_references_labels_and_citations_resolve():
    labels = re.findall(r"\\label\{([^}]*)\}", ALL)
    assert len(set(labels)) == len(labels)
    assert set(re.findall(r"\\(?:eq)?ref\{([^}]*)\}", ALL)) <= set(labels)
    known = set(re.findall(r"^@\w+\{([^,]+),", (PAPER/"refs.bib").read_text(), re.M))
    cited = {k.strip() for group in re.findall(r"\\cite\{([^}]*)\}", ALL) for k in group.split(",")}
    assert cited <= known and not known - cited


def test_all_sections_are_in_the_paper():
    assert {p.stem for p in SECTIONS} == set(re.findall(r"\\input\{sections/(\w+)\.tex\}", (PAPER/"main.tex").read_text()))
