"The command line as its user meets it: help, and one line on stderr for each mistake."
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

COMMAND = f"{sys.prefix}/bin/mmqlora"


def mmqlora(*arguments, cwd=ROOT):
    return subprocess.run([COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def test_help_names_the_commands_and_is_quick():
    begin = time.perf_counter()
    out = mmqlora("--help").stdout
    assert all(name in out for name in ("corpus", "train", "caption", "check"))
    code = "import mmqlora.cli, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert time.perf_counter() - begin < 60


def complaint(*arguments, **more):
    "The one line on stderr of a command that must fail."
    ran = mmqlora(*arguments, **more)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stderr.startswith("mmqlora: ") and ran.stderr.count("\n") == 1 and "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr


def test_an_unknown_run_is_one_line(): assert "unknown run 'qlroa' -- did you mean 'qlora'?" in complaint("train", "qlroa")


def test_a_missing_video_is_one_line(): assert "none.mp4: no such video file" in complaint("caption", "none.mp4")


def test_a_folder_without_a_model_is_one_line(corpus):
    root, records = corpus
    assert "not a model" in complaint("caption", root/records[0].video, "--base", root)


def test_a_folder_without_an_adapter_is_one_line(corpus):
    root, records = corpus
    assert "holds no adapter_config.json" in complaint("caption", root/records[0].video, "--adapter", root)


def test_an_unknown_selector_is_one_line(corpus):
    root, records = corpus
    assert "selector" in complaint("caption", root/records[0].video, "--selector", "best")


def test_outside_a_clone_it_says_where_to_run_it(tmp_path): assert "params.yaml" in complaint("train", "qlora", cwd=tmp_path)


def test_caption_writes_a_line_per_video(corpus):
    root, records = corpus
    out = mmqlora("caption", root/records[0].video, root/records[1].video)
    assert out.returncode == 0 and out.stdout.count(".mp4: ") == 2, out.stderr


@pytest.fixture
def clone(tmp_path, corpus):
    "The part of a clone that `mmqlora corpus` needs, with a small corpus that is not yet rendered."
    params = yaml.safe_load((ROOT/"params.yaml").read_text())
    params["corpus"]["clips"] = {"train": 2, "test": 8}
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def test_corpus_is_rendered_once_and_repaired_on_request(clone):
    assert "rendered 10 clips" in mmqlora("corpus", cwd=clone).stdout.replace("\n", " ")
    assert "all intact" in mmqlora("corpus", cwd=clone).stdout.replace("\n", " ")
    video = next((clone/"data").rglob("*.mp4"))
    whole = video.read_bytes()
    video.write_bytes(whole[:100])
    assert "corrupt" in complaint("corpus", cwd=clone)
    mmqlora("corpus", "--force", cwd=clone)
    assert video.read_bytes() == whole


def test_training_without_frames_says_which_stage_writes_them(clone):
    shutil.copytree(ROOT/"models", clone/"models")
    mmqlora("corpus", cwd=clone)
    assert "clips" in complaint("train", "zeroshot", cwd=clone)              # fewer than the profile asks for
    assert not (clone/"results").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    from mmqlora.core import write_json
    write_json(tmp_path/"a.json", {"x": 1})
    before = (tmp_path/"a.json").read_text()
    with pytest.raises(ValueError): write_json(tmp_path/"a.json", {"x": float("nan")})
    assert (tmp_path/"a.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
