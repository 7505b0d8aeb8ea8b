"From records to frames: equal bytes, no leaks, and one line for each bad file."
import json
import os
import shutil

import numpy as np
import pytest

from mmqlora.config import CorpusConfig, FramesConfig
from mmqlora.core import InputError
from mmqlora.corpus import read_records, video_path
from mmqlora.mmevents import build_mmevents, scenes_of
from mmqlora.prepare import load_videos, prepare
from mmqlora.scenes import slots_of


def test_the_same_seed_renders_the_same_bytes(corpus, tmp_path):
    _, records = corpus
    again = build_mmevents(tmp_path, CorpusConfig(name="mmevents", root="-", clips={"train": 3, "ood": 8}), workers=1)
    known = {r.id: r.sha256 for r in records}
    assert all(known[r.id] == r.sha256 for r in again)


def test_another_seed_renders_other_clips(corpus, tmp_path):
    _, records = corpus
    other = build_mmevents(tmp_path, CorpusConfig(name="mmevents", root="-", seed=1, clips={"train": 3}), workers=1)
    assert not {r.sha256 for r in records} & {r.sha256 for r in other}


def test_no_script_and_no_random_stream_is_shared_between_splits():
    seeds = [scene.seed for split in ("train", "dev", "test", "ood") for scene, _ in scenes_of(split, 200)]
    assert len(set(seeds)) == len(seeds)


def test_captions_say_what_the_generator_did(corpus):
    _, records = corpus
    for r in records:
        slots = slots_of(r.captions["en"][0])
        assert slots == r.truth["slots"] and [e["kind"] for e in r.truth["events"]] == [slots["e1"], slots["e2"]]


def test_frames_do_not_depend_on_the_number_of_workers(corpus):
    root, records = corpus
    one, two = (prepare(root, records[:6], FramesConfig(budgets=[8], selectors=["entropy"]), workers=n)[0]["entropy-8"] for n in (1, 2))
    assert np.array_equal(one.pixels, two.pixels) and np.array_equal(one.signal, two.signal)


@pytest.fixture
def own(corpus, tmp_path):
    "A corpus folder with three clips that a test may break."
    root, records = corpus
    (tmp_path/"train").mkdir()
    for r in records[:3]: shutil.copy(root/r.video, tmp_path/r.video)
    (tmp_path/"records.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in records[:3]))
    return tmp_path


def complaint(root):
    "The one line with which preparing the corpus in `root` fails."
    with pytest.raises(InputError) as err: prepare(root, read_records(root), FramesConfig(budgets=[8], selectors=["uniform"]), workers=1)
    assert "\n" not in str(err.value)
    return str(err.value)


def test_a_missing_video_is_named(own):
    (own/"train/00001.mp4").unlink()
    assert "00001.mp4: missing (clip train-00001)" in complaint(own)


@pytest.mark.parametrize("damage", [lambda b: b[:-200], lambda b: b[:1000] + bytes(100) + b[1100:], lambda b: b""])
def test_a_damaged_video_is_named(own, damage):
    path = own/"train/00002.mp4"
    path.write_bytes(damage(path.read_bytes()))
    assert "00002.mp4: corrupt: its hash is not that of clip train-00002" in complaint(own)


def test_a_broken_line_is_named_by_its_number(own):
    with open(own/"records.jsonl", "a") as f: f.write('{"id": "x", "video"\n')
    assert "records.jsonl:4: not valid JSON" in complaint(own)


@pytest.mark.parametrize("change, message", [
    ({"video": "../secret.mp4"}, "lies outside"), ({"video": "/etc/passwd"}, "lies outside"), ({"split": "trian"}, "split"),
    ({"captions": {"en": []}}, "at least one caption"), ({"start": 2., "end": 1.}, "end must come after start"), ({"colour": "red"}, "colour: unknown key")])
def test_a_wrong_record_is_named(own, change, message):
    lines = (own/"records.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    (own/"records.jsonl").write_text("\n".join(lines) + "\n")
    assert message in complaint(own)


def test_a_link_out_of_the_data_root_is_refused(own, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")/"x.mp4"
    shutil.move(own/"train/00000.mp4", outside)
    os.symlink(outside, own/"train/00000.mp4")
    assert "lies outside" in complaint(own)
    with pytest.raises(InputError): video_path(own, read_records(own)[0])


def test_a_name_with_spaces_and_other_scripts_is_only_a_name(corpus, tmp_path):
    root, records = corpus
    path = tmp_path/"видео $(touch x); 视频.mp4"
    shutil.copy(root/records[0].video, path)
    assert np.array_equal(load_videos([path]).pixels, load_videos([root/records[0].video]).pixels)


def test_a_text_file_named_mp4_is_one_line(tmp_path):
    (tmp_path/"a.mp4").write_text("not a video")
    with pytest.raises(InputError, match="a.mp4: not a readable video"): load_videos([tmp_path/"a.mp4"])
