"The command line as its user meets it: help, and one line on stderr for each mistake."
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

from mmqlora import cli

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


WORDS = {  # wrong words -> what the line says
    "nosuch": "No such command 'nosuch' -- see `mmqlora --help`", "caption": "Missing argument 'videos' -- see `mmqlora caption --help`",
    "caption a.mp4 --frames 0": "'--frames'", "caption a.mp4 --frames -3": "'--frames'", "caption a.mp4 --frames x": "'--frames'", "caption a.mp4 --best": "No such option",
    "check x": "unexpected extra argument", "corpus --workers 0": "'--workers'", "import vatex": "'--annotations'", "plan qwen2-vl-2b": "'--memory'",
    "plan qwen2-vl-2b --memory 8GiB --timed 32:stock:1.2.3": "not a timed step", "plan qwen2-vl-2b --memory 8GiB --timed 0:stock:9": "not a timed step",
    "plan qwen2-vl-2b --memory 8GiB --timed 32:fast:9": "unknown way 'fast' -- choose from: stock", "plan qwen2-vl-2b --memory 8GiB --side 3": "side: 3 pixels are less than one visual token -- at least 28",
    "plan qwen2-vl-2b --memory 8GiB --rank 100000": "rank: 100000 is not between", "plan qwen2-vl-2b --memory 8GiB --frames 1000000": "more than can be planned -- at most",
    "plan qwen2-vl-2": "'--memory'", "plan qwen2-vl-2 --memory 8GiB": "no such folder", "plan nowhere/at/all --memory 8GiB": "or one of qwen2.5-vl-7b",
}


@pytest.mark.parametrize("words", WORDS)
def test_wrong_words_are_one_line_and_quick(words, monkeypatch, capsys):
    begin = time.perf_counter()
    assert WORDS[words] in one_line(words.split(), monkeypatch, capsys)
    assert time.perf_counter() - begin < 30                                  # the first one imports torch; no hub is asked, no step imagined


def one_line(words, monkeypatch, capsys) -> str:
    "The one line on stderr of a command that must fail, in this process; bars of what was loaded before do not count."
    monkeypatch.setattr("sys.argv", ["mmqlora", *map(str, words)])
    with pytest.raises(SystemExit) as ended: cli.main()
    assert ended.value.code > 0
    told = re.sub(r"\r[^\r\n]*it/s\]\n?", "", capsys.readouterr().err)
    assert told.startswith("mmqlora: ") and told.count("\n") == 1, told
    return told


def made(folder, **files):
    "A folder that holds copies of files and folders, bytes, or nothing under these names (`_` for `.`)."
    folder.mkdir()
    for name, what in files.items():
        path = folder/name.replace("__", ".")
        if isinstance(what, bytes): path.write_bytes(what)
        elif what: shutil.copy(what, path)
        else: path.mkdir()
    return folder


@pytest.fixture
def videos(tmp_path, corpus):
    "Files that are no videos, and one that is."
    whole = corpus[0]/corpus[1][0].video
    return made(tmp_path/"videos", good__mp4=whole, text__mp4=b"I am text", empty__mp4=b"", cut__mp4=whole.read_bytes()[:2000], folder__mp4=None)


def test_what_is_no_video_is_one_line(videos, monkeypatch, capsys):
    for name, problem in dict(text="not a readable video", empty="not a readable video", cut="not a readable video", folder="is a folder -- give the video files in it").items():
        assert f"{name}.mp4: {problem}" in one_line(["caption", videos/f"{name}.mp4"], monkeypatch, capsys)
    assert "good.mp4: 99 frames asked of a clip of 32 -- at most 32" in one_line(["caption", videos/"good.mp4", "--frames", 99], monkeypatch, capsys)
    assert "unknown selector 'best' -- choose from: uniform" in one_line(["caption", videos/"good.mp4", "--selector", "best"], monkeypatch, capsys)


BASE, CONFIG = ROOT/"models/base", b'{"model_type": "%s"}'


def test_what_is_no_model_is_one_line(videos, tmp_path, monkeypatch, capsys):
    weights = (BASE/"model.safetensors").read_bytes()
    config, tokens = BASE/"config.json", BASE/"tokenizer.json"
    wrong = {"none": "no such folder", videos/"good.mp4": "is a file", made(tmp_path/"alien", config__json=CONFIG % b"gpt2"): "declare MODALITIES['gpt2']",
             made(tmp_path/"new", config__json=CONFIG % b"nothing"): "model type `nothing`", made(tmp_path/"torn", config__json=b"{"): "not a valid JSON file",
             made(tmp_path/"bare", config__json=config, tokenizer__json=tokens): "its weights cannot be read", made(tmp_path/"mute", config__json=config, model__safetensors=weights): "holds no tokenizer",
             made(tmp_path/"cut", config__json=config, tokenizer__json=tokens, model__safetensors=weights[:5000]): "its weights cannot be read"}
    for base, problem in wrong.items(): assert problem in one_line(["caption", videos/"good.mp4", "--base", base], monkeypatch, capsys)
    for base in (tmp_path/"alien", tmp_path/"torn", videos/"good.mp4"): assert wrong[base] in one_line(["plan", base, "--memory", "8GiB"], monkeypatch, capsys)


def test_what_is_no_adapter_is_one_line(videos, tmp_path, monkeypatch, capsys):
    import mmqlora
    model, folder = mmqlora.load_model(BASE, "nf4", device="cpu")[0], tmp_path/"adapter"
    mmqlora.save_adapter(mmqlora.adapt(model, ranks={"text": 2}, gate="rank"), folder)
    weights, config = (folder/"adapter_model.safetensors").read_bytes(), folder/"adapter_config.json"
    wrong = {tmp_path/"none": "holds no adapter_config.json", made(tmp_path/"bare", adapter_config__json=config): "adapter_model.safetensors: no such file",
             made(tmp_path/"torn", adapter_config__json=b"{", adapter_model__safetensors=weights): "not valid JSON",
             made(tmp_path/"other", adapter_config__json=b"{}", adapter_model__safetensors=weights): "peft_type: unknown",
             made(tmp_path/"cut", adapter_config__json=config, adapter_model__safetensors=weights[:3000]): "not a whole file"}
    for adapter, problem in wrong.items(): assert problem in one_line(["caption", videos/"good.mp4", "--adapter", adapter], monkeypatch, capsys)
    assert "another model" in one_line(["caption", videos/"good.mp4", "--adapter", folder, "--base", ROOT/"models/base-large"], monkeypatch, capsys)


def test_params_that_cannot_be_read_and_wrong_values_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"params.yaml").write_bytes(b"\xff\xfe")
    assert "params.yaml: not valid YAML" in one_line(["train", "qlora"], monkeypatch, capsys)
    params = yaml.safe_load((ROOT/"params.yaml").read_text())
    for n in (0, -2):                                                        # 0 "rendered" a corpus of no clips, -2 the same
        (tmp_path/"params.yaml").write_text(yaml.safe_dump(params | {"corpus": params["corpus"] | {"clips": {"train": n}}}))
        assert "params.yaml: corpus.clips.train: Input should be greater than 0" in one_line(["corpus"], monkeypatch, capsys)
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(params | {"defaults": {"stepz": 3}}))
    assert "params.yaml: defaults: stepz: unknown key -- did you mean 'steps'?" in one_line(["train", "qlora"], monkeypatch, capsys)


def test_caption_writes_a_line_per_video(corpus):
    root, records = corpus
    out = subprocess.run([COMMAND, "caption", root/records[0].video, root/records[1].video], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"})
    assert out.returncode == 0 and out.stdout.count(".mp4: ") == out.stdout.count("\n") == 2, out.stderr        # however narrow the window


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
