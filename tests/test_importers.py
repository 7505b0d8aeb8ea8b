"Other corpora: each read from a small fixture in its own format, with real videos; what cannot be used is counted and listed."
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from conftest import ROOT

from mmqlora.batch import load_clips, save_clips
from mmqlora.config import load_params
from mmqlora.core import InputError, read_json, repo_path, write_json
from mmqlora.corpus import of_split, read_records, video_path
from mmqlora.importers import FORMATS, import_corpus
from mmqlora.mmevents import write_mp4
from mmqlora.prepare import prepare
from mmqlora.render import render, sound
from mmqlora.core import rng_for
from mmqlora.scenes import target_scene


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "The bytes of a video of two seconds."
    path = tmp_path_factory.mktemp("clip")/"a.mp4"
    scene = target_scene(rng_for(0, "import"))
    write_mp4(path, render(scene), sound(scene))
    return path.read_bytes()


@pytest.fixture
def place(tmp_path, clip):
    "place('a', 'b/c.mp4') writes videos; returns their folder."
    def write(*names):
        for name in names:
            path = tmp_path/"videos"/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip)
        return tmp_path/"videos"
    return write


def problems(out): return [json.loads(line) for line in (out/"problems.jsonl").read_text().splitlines()]


def msrvtt(folder, n=6, splits=("train", "train", "train", "validate", "test", "test")):
    info = dict(info=dict(year="2016", version="1.0", description="", contributor="", data_created=""))
    videos = [dict(category=9, url=f"https://www.youtube.com/watch?v={i}", video_id=f"video{i}", id=i, split=splits[i],
                   **{"start time": 137.72, "end time": 149.44}) for i in range(n)]
    sentences = [dict(caption=f"caption {j} of video {i}", video_id=f"video{i}", sen_id=20*i + j) for j in range(3) for i in range(n)]
    write_json(folder/"train_val_videodatainfo.json", dict(info, videos=videos[:4], sentences=[s for s in sentences if int(s["video_id"][5:]) < 4]))
    write_json(folder/"test_videodatainfo.json", dict(info, videos=videos[4:], sentences=[s for s in sentences if int(s["video_id"][5:]) >= 4]))
    return folder


def test_msrvtt_own_split(tmp_path, place):
    videos = place("TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4", "TrainValVideo/video3.mp4", "TestVideo/video4.mp4", "TestVideo/video5.mp4")
    report = import_corpus("msrvtt", [msrvtt(tmp_path)], videos, tmp_path/"out")
    records = read_records(tmp_path/"out")
    assert Counter(r.split for r in records) == report["splits"] == {"train": 2, "dev": 1, "test": 2}
    assert records[0].captions == {"en": ["caption 0 of video 0", "caption 1 of video 0", "caption 2 of video 0"]}
    assert report["problems"] == {"missing": 1} and problems(tmp_path/"out")[0]["clip"] == "video2"
    assert {r.gallery for r in records} == {None, "msrvtt-dev", "msrvtt-test"}
    assert all(r.start == 0 and r.end is None for r in records)                # the files are cut: `start time` is that of the original


@pytest.mark.parametrize("with_training_list", [True, False])
def test_msrvtt_1k_a_is_what_the_official_lists_say(tmp_path, place, with_training_list):
    msrvtt(tmp_path)
    (tmp_path/"MSRVTT_JSFUSION_test.csv").write_text('key,vid_key,video_id,sentence\nret0,msr4,video4,"a query, with a comma"\nret1,msr1,video1,caption 2 of video 1\n')
    if with_training_list: (tmp_path/"MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo3\n")
    import_corpus("msrvtt", [tmp_path], place(*(f"video{i}.mp4" for i in range(6))), tmp_path/"out")
    records = {r.id: r for r in read_records(tmp_path/"out")}
    assert {r.split for r in records.values()} == {"train", "test"}
    assert {i for i, r in records.items() if r.split == "test"} == {"video1", "video4"}
    assert len(records) == (5 if with_training_list else 6)
    assert records["video4"].captions["en"][0] == "a query, with a comma" and len(records["video4"].captions["en"]) == 4
    assert records["video1"].captions["en"] == ["caption 2 of video 1", "caption 0 of video 1", "caption 1 of video 1"]


def test_what_no_list_of_1k_a_names_is_listed_and_not_lost(tmp_path, place):
    msrvtt(tmp_path)
    (tmp_path/"MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\nret0,msr4,video4,a query\n")
    (tmp_path/"MSRVTT_train.7k.csv").write_text("video_id\nvideo0\nvideo1\n")
    report = import_corpus("msrvtt", [tmp_path], place(*(f"video{i}.mp4" for i in range(6))), tmp_path/"out")
    assert report["problems"] == {"outside_list": 3} and report["kept"] + 3 == report["clips"] == 6
    assert [p["clip"] for p in problems(tmp_path/"out")] == ["video2", "video3", "video5"]
    assert [r.id for r in read_records(tmp_path/"out")] == ["video0", "video1", "video4"]      # in the order of the annotations


def test_files_that_no_clip_can_have_are_counted_and_listed(tmp_path, place, clip):
    videos = place("a/video0.mp4", "b/video0.mp4", "c/video0.webm", "video1.mp4")
    (tmp_path/"outside.mp4").write_bytes(clip)
    (videos/"video2.mp4").symlink_to(tmp_path/"outside.mp4")
    (videos/"a/again").mkdir()
    os.link(videos/"a/video0.mp4", videos/"a/again/video0.mp4")                # the same file twice is no other file
    report = import_corpus("msrvtt", [msrvtt(tmp_path)], videos, tmp_path/"out")
    assert report["duplicate_names"] == 2 and report["links_outside"] == 1 and report["kept"] == 2
    listed = problems(tmp_path/"out")
    assert [(p["video"], p["problem"]) for p in listed if not p["clip"]] == [("b/video0.mp4", "duplicate_name"), ("c/video0.webm", "duplicate_name"), ("video2.mp4", "link_outside")]
    assert "a link that leads out" in next(p for p in listed if p["clip"] == "video2")["detail"]
    assert Counter(p["problem"] for p in listed if p["clip"]) == report["problems"] == {"missing": 4}


def test_activitynet_segments_and_the_videos_that_two_splits_share(tmp_path, place):
    told = dict(duration=2., timestamps=[[0, 1.2], [.5, 2.09], [1.9, 1.95], [3., 5.], [1.5, .5]], sentences=[" A man. ", "He jumps.", "Short.", "Late.", "Backwards."])
    for name in ("train", "val_1", "val_2"): write_json(tmp_path/f"{name}.json", {"v_QOlSCBRmfWY" if name == "train" else "v_bXdq2zI1Ms0": told})
    report = import_corpus("activitynet", [tmp_path], place("v_QOlSCBRmfWY.mp4", "v_bXdq2zI1Ms0.mp4"), tmp_path/"out")
    records = read_records(tmp_path/"out")
    assert [(r.start, r.end, r.captions["en"]) for r in records[:2]] == [(0, 1.2, ["A man."]), (.5, None, ["He jumps."])]
    assert report["problems"] == {"too_short": 3, "past_end": 3, "bad_span": 3} and report["clamped"] == 3
    assert report["splits"] == {"train": 2, "dev": 2, "test": 2} and report["videos_in_two_splits"] == {"dev/test": 1}


def test_vatex_is_read_in_both_languages_from_cut_clips_or_whole_videos(tmp_path, place):
    ids = ["aaaaaaaaaaa_000000_000010", "bb_bb-bbbbb_000001_000002", "ccccccccccc_000010_000020"]
    write_json(tmp_path/"vatex_training_v1.0.json", [dict(videoID=i, enCap=["a", "b "], chCap=["一个男人", "他跳"]) for i in ids])
    write_json(tmp_path/"vatex_public_test_english_v1.1.json", [dict(videoID="ddddddddddd_000000_000010", enCap=["c"])])
    write_json(tmp_path/"vatex_private_test_without_annotations.json", [dict(videoID="eeeeeeeeeee_000000_000010")])
    report = import_corpus("vatex", [tmp_path], place(ids[0] + ".mp4", "bb_bb-bbbbb.webm.mp4", "bb_bb-bbbbb.mp4", "ddddddddddd_000000_000010.mp4"), tmp_path/"out")
    whole, span, test = read_records(tmp_path/"out")
    assert whole.captions == {"en": ["a", "b"], "zh": ["一个男人", "他跳"]} and (whole.start, whole.end) == (0, None)
    assert (span.start, span.end, span.video) == (1, 2, "videos/bb_bb-bbbbb.mp4")
    assert test.split == "test" and list(test.captions) == ["en"]
    assert report["problems"] == {"missing": 1, "no_text": 1} and report["missing_videos"] == 1


def test_lsmdc_rows_with_several_sentences_quotes_and_the_retrieval_list(tmp_path, place):
    row = "{0}\t00.01.02.500\t00.01.04.000\t00.01.02.000\t00.01.04.500\t{1}\n"
    a, b, c = "0001_American_Beauty_00.01.02.500-00.01.04.000", "1004_Juno_00.01.02.500-00.01.04.000", "1005_Signs_00.00.01.000-00.00.02.000"
    (tmp_path/"LSMDC16_annos_training.csv").write_text(row.format(a, 'SOMEONE says "no.') + row.format(a, "He\u2028leaves."))
    (tmp_path/"LSMDC16_annos_test.csv").write_text(row.format(b, "She waits.") + row.format(c, "Corn."))
    (tmp_path/"LSMDC16_challenge_1000_publictect.csv").write_text(row.format(b, "She waits."))
    import_corpus("lsmdc", [tmp_path], place(f"0001_American_Beauty/{a}.avi", f"1004_Juno/{b}.avi", f"1005_Signs/{c}.avi"), tmp_path/"out")
    records = {r.id: r for r in read_records(tmp_path/"out")}
    assert records[a].captions["en"] == ['SOMEONE says "no.', "He\u2028leaves."] and records[a].video == f"videos/0001_American_Beauty/{a}.avi"
    assert records[a].truth == dict(aligned=[62.5, 64.], extracted=[62., 64.5])
    assert (records[b].gallery, records[c].gallery, records[c].split) == ("lsmdc-1000", None, "test")
    (tmp_path/"LSMDC16_annos_val.csv").write_text("clip,00.01,no tabs\n")
    with pytest.raises(InputError, match=r"LSMDC16_annos_val.csv:1: not six fields"): import_corpus("lsmdc", [tmp_path], tmp_path/"videos", tmp_path/"out")


def test_msrvtt_qa_gathers_the_questions_of_a_video(tmp_path, place):
    write_json(tmp_path/"train_qa.json", [dict(category_id=14, video_id=v, id=i, question=q, answer=a)
                                          for i, (v, q, a) in enumerate([(0, "what is a man doing?", "cook"), (0, "how many dogs are there?", "two"), (1, "who sings?", "man")])])
    write_json(tmp_path/"test_qa.json", [dict(category_id=1, video_id=2, id=9, question="where is it?", answer="street")])
    report = import_corpus("msrvtt-qa", [tmp_path], place("video0.mp4", "video1.mp4", "video2.mp4"), tmp_path/"out")
    records = read_records(tmp_path/"out")
    assert [(q.kind, q.answer) for q in records[0].questions] == [("what", "cook"), ("how", "two")] and not records[0].captions
    assert report["questions"] == 4 and report["splits"] == {"train": 2, "test": 1}


@pytest.mark.parametrize("stem, span", [("video-uid", (.25, 1.75)), ("clip-uid", (0, 1.5))])
def test_ego4d_nlq_answers_with_windows_in_whole_videos_or_cut_clips(tmp_path, place, stem, span):
    def query(a, b, text="Where was the knife?"): return dict(query=text, template="Objects: Where is object X?", slot_x="knife", clip_start_sec=a, clip_end_sec=b,
                                                              video_start_sec=a + .25, video_end_sec=b + .25, video_start_frame=0, video_end_frame=9, raw_tags=[])
    queries = [query(.2, .7), query(1., 1.), dict(query(0, 1), query=None)]
    nlq = dict(version="v1", date="220216", description="NLQ Annotations (train)", manifest="s3://x", videos=[dict(video_uid="video-uid", split="train", clips=[
        dict(clip_uid="clip-uid", source_clip_uid="s", video_start_sec=.25, video_end_sec=1.75, clip_start_sec=0, clip_end_sec=1.5, video_start_frame=0, video_end_frame=9,
             annotations=[dict(language_queries=queries, annotation_uid="a")])])])
    write_json(tmp_path/"nlq_train.json", nlq)
    report = import_corpus("ego4d-nlq", [tmp_path/"nlq_train.json"], place(f"{stem}.mp4"), tmp_path/"out")
    record, = read_records(tmp_path/"out")
    assert (record.start, record.end) == span and report["queries_without_window"] == 2
    assert [q.model_dump() for q in record.questions] == [dict(kind="Objects: Where is object X?", question="Where was the knife?", answer="0.2 s to 0.7 s")]


@pytest.mark.parametrize("form", ["json", "csv"])
def test_howto100m_subtitles_are_clips(tmp_path, place, form):
    told = dict(start=[0.1, .8, 5.], end=[1.1, 1.9, 6.], text=["add the flour", "stir", "late"])
    (tmp_path/"notes").mkdir()
    if form == "json": write_json(tmp_path/"notes/raw_caption.json", {"nVbIUDjzWY4": told, "missing-one": told})
    else: (tmp_path/"notes/nVbIUDjzWY4.csv").write_text("start,end,text\n" + "".join(f"{s},{e},{t}\n" for s, e, t in zip(*told.values())))
    report = import_corpus("howto100m", [tmp_path/"notes"], place("nVbIUDjzWY4.webm"), tmp_path/"out")
    assert [(r.id, r.start, r.end, r.captions["en"]) for r in read_records(tmp_path/"out")] == [
        ("nVbIUDjzWY4-0000", .1, 1.1, ["add the flour"]), ("nVbIUDjzWY4-0001", .8, 1.9, ["stir"])]
    assert report["problems"] == ({"past_end": 1, "missing": 3} if form == "json" else {"past_end": 1})


def test_every_problem_is_counted_and_listed_once(tmp_path, place):
    videos = place("video0.mp4", "video1.mp4", "video3.mp4")
    (videos/"video1.mp4").write_bytes((videos/"video1.mp4").read_bytes()[:700])
    report = import_corpus("msrvtt", [msrvtt(tmp_path)], videos, tmp_path/"out")
    listed = problems(tmp_path/"out")
    assert Counter(p["problem"] for p in listed) == report["problems"] == {"broken": 1, "missing": 3}
    assert report["kept"] + len(listed) == report["clips"] == 6
    assert next(p for p in listed if p["problem"] == "broken")["detail"].count("video1.mp4") and not (tmp_path/"out/videos/video1.mp4").exists()


def test_without_a_single_usable_clip_it_fails_and_the_list_says_why(tmp_path, place):
    with pytest.raises(InputError, match="none of 6 clips could be used: 6 missing"): import_corpus("msrvtt", [msrvtt(tmp_path)], place("other.mp4"), tmp_path/"out")
    assert len(problems(tmp_path/"out")) == 6 and not (tmp_path/"out/records.jsonl").exists()


def test_nothing_outside_the_folder_of_videos_is_reached(tmp_path, place, clip):
    msrvtt(tmp_path)
    data = read_json(tmp_path/"test_videodatainfo.json")
    for part in ("videos", "sentences"):
        for item in data[part]: item["video_id"] = {"video4": "../outside", "video5": "/etc/passwd"}[item["video_id"]]
    write_json(tmp_path/"test_videodatainfo.json", data)
    (tmp_path/"outside.mp4").write_bytes(clip)
    videos = place("video0.mp4")
    (videos/"video1.mp4").symlink_to(tmp_path/"outside.mp4")
    report = import_corpus("msrvtt", [tmp_path/"train_val_videodatainfo.json", tmp_path/"test_videodatainfo.json"], videos, tmp_path/"out")
    assert report["kept"] == 1 and report["problems"] == {"missing": 5}
    assert [p.name for p in (tmp_path/"out/videos").rglob("*")] == ["video0.mp4"]


def test_videos_are_linked_not_doubled_and_may_stay_in_place(tmp_path, place):
    videos = place("a/video0.mp4", "video3.mp4")
    import_corpus("msrvtt", [msrvtt(tmp_path)], videos, tmp_path/"out")
    assert (tmp_path/"out/videos/a/video0.mp4").samefile(videos/"a/video0.mp4")
    import_corpus("msrvtt", [tmp_path/"train_val_videodatainfo.json"], videos)
    records = read_records(videos)
    assert [r.video for r in records] == ["a/video0.mp4", "video3.mp4"] and all(video_path(videos, r).is_file() for r in records)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_in_another_format_is_one_line_that_names_it(tmp_path, place, name):
    videos = place("a.mp4")
    for wrong in ("train_val_videodatainfo.json", "train.json", "vatex_training_v1.0.json", "train_qa.json", "nlq_train.json", "caption.json"):
        write_json(tmp_path/wrong, {"something": {"else": 1}})
    (tmp_path/"LSMDC16_annos_training.csv").write_text("a,b,c\n")
    with pytest.raises(InputError) as err: import_corpus(name, [tmp_path], videos, tmp_path/"out")
    assert str(tmp_path) in str(err.value) and "\n" not in str(err.value) and "format" in str(err.value) or "six fields" in str(err.value)


@pytest.mark.parametrize("name, file, data", [
    ("activitynet", "train.json", {"v_a": dict(duration=1, timestamps=[[0]], sentences=["a"])}),
    ("activitynet", "train.json", {"v_a": dict(duration=1, timestamps=None, sentences=["a"])}),
    ("howto100m", "caption.json", {"a": dict(start=["soon"], end=[1], text=["a"])}),
    ("vatex", "vatex_training_v1.0.json", [dict(videoID=7, enCap=["a"])]),
    ("ego4d-nlq", "nlq_train.json", dict(videos=[dict(video_uid="a", clips=[dict(clip_uid="b")])])),
    ("msrvtt-qa", "train_qa.json", [dict(video_id=0, question=None, answer="a")])])
def test_a_damaged_annotation_is_one_line_and_no_traceback(tmp_path, place, name, file, data):
    write_json(tmp_path/file, data)
    with pytest.raises(InputError, match="not in the format of"): import_corpus(name, [tmp_path/file], place("a.mp4"), tmp_path/"out")


@pytest.fixture
def clone(tmp_path):
    "A repository with nothing in it but params.yaml."
    (tmp_path/"clone").mkdir()
    (tmp_path/"clone/params.yaml").write_bytes((ROOT/"params.yaml").read_bytes())
    return tmp_path/"clone"


def command(*arguments, cwd):
    code = "from mmqlora.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)})


def test_from_annotations_by_the_command_line_to_the_frames_that_a_model_sees(tmp_path, place, clone):
    videos = place(*(f"video{i}.mp4" for i in (0, 1, 3, 4, 5)))
    ran = command("import", "msrvtt", "--annotations", msrvtt(tmp_path), "--videos", videos, cwd=clone)
    assert ran.returncode == 0, ran.stderr
    assert "5 of 6 clips" in ran.stdout and "missing" in ran.stdout and "problems.jsonl" in ran.stdout
    params = yaml.safe_load((clone/"params.yaml").read_text())
    params |= dict(profile="here", profiles={"here": {"clips": {"train": 2, "dev": 1, "test": 2}}}, corpus=dict(name="msrvtt", root="data/msrvtt"))
    (clone/"params.yaml").write_text(yaml.safe_dump(params))
    settings = load_params(clone/"params.yaml")
    root = clone/settings.corpus.root
    records = read_records(root)
    for split, n in settings.profiles["here"].clips.items():
        sets, chosen = prepare(root, of_split(records, split, n), settings.frames, workers=1)
        save_clips(clone/f"artifacts/frames/entropy-8/{split}.safetensors", sets["entropy-8"])
        clips = load_clips(clone/f"artifacts/frames/entropy-8/{split}.safetensors")
        assert clips.pixels.shape == (n, 8, 3, 32, 32) and (np.diff(chosen["entropy-8"]) > 0).all()
    code = """from mmqlora.config import load_params, run_config
from mmqlora.runs import load_split
data = load_split(load_params(), run_config(load_params(), "qlora"), "test")
print(len(data.clips), data.captions, data.galleries)"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.stdout.strip() == "2 ['caption 0 of video 4', 'caption 0 of video 5'] ['msrvtt-test', 'msrvtt-test']", ran.stderr[-500:]
    checked = command("corpus", cwd=clone)
    assert checked.returncode == 0 and "5 clips" in checked.stdout, checked.stderr


def test_help_explains_every_format_and_a_mistake_is_one_line(tmp_path, clone):
    shown = " ".join(command("import", "--help", cwd=clone).stdout.split())
    assert all(name in shown and f.title in shown and f.files.split(",")[0] in shown for name, f in FORMATS.items())
    for arguments, words in ((("msvtt", "--annotations", tmp_path, "--videos", tmp_path), "did you mean 'msrvtt'?"),
                             (("vatex", "--annotations", tmp_path/"none", "--videos", tmp_path), "no such file or folder")):
        ran = command("import", *arguments, cwd=clone)
        assert ran.returncode == 1 and words in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr


def test_the_command_that_renders_mmevents_does_not_touch_another_corpus(clone):
    params = yaml.safe_load((clone/"params.yaml").read_text())
    params["corpus"] = dict(name="vatex", root="data/vatex")
    (clone/"params.yaml").write_text(yaml.safe_dump(params))
    for flags in ((), ("--force",)):
        ran = command("corpus", *flags, cwd=clone)
        assert ran.returncode == 1 and "mmqlora import vatex" in ran.stderr and not (clone/"data").exists()
    assert repo_path("params.yaml").is_file()
