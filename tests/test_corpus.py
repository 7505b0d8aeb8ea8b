"From records to frames: equal bytes, no leaks, and one line for each bad file."
import dataclasses
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from mmqlora.batch import build_tokenizer, caption_ids, load_clips, pitch_class, save_clips
from mmqlora.config import CorpusConfig, FramesConfig, load_params
from mmqlora.core import InputError, rng_for, seed_for
from mmqlora.corpus import of_split, read_records, video_path
from mmqlora.datasheet import datasheet
from mmqlora.grammar import GRAMMARS, SOUNDS, TRANSIENT, slots_of, vocabulary
from mmqlora.mmevents import build_mmevents, scenes_of
from mmqlora.prepare import load_videos, pitch_classes, prepare
from mmqlora.pretrain import tasks_of
from mmqlora.render import PITCH, render, tones
from mmqlora.scenes import CORRUPTIONS, base_scene
from mmqlora.video import read_audio


def test_the_same_seed_renders_the_same_bytes(corpus, tmp_path):
    _, records = corpus
    again = build_mmevents(tmp_path, CorpusConfig(name="mmevents", root="-", clips={"train": 3, "ood": 8}), workers=1)
    known = {r.id: r.sha256 for r in records}
    assert all(known[r.id] == r.sha256 for r in again)


def test_another_seed_renders_other_clips(corpus, tmp_path):
    _, records = corpus
    other = build_mmevents(tmp_path, CorpusConfig(name="mmevents", root="-", seed=1, clips={"train": 3}), workers=1)
    assert not {r.sha256 for r in records} & {r.sha256 for r in other}


SIZES = load_params().corpus.clips
SCENES = {split: [scene for scene, _ in scenes_of(split, n)] for split, n in SIZES.items()}


def test_no_script_and_no_random_stream_is_shared_between_splits():
    seeds = [scene.seed for scenes in SCENES.values() for scene in scenes]
    scripts = [(scene.things, scene.events) for scenes in SCENES.values() for scene in scenes]
    assert len(set(seeds)) == len(seeds) and len(set(scripts)) == len(scripts) == sum(SIZES.values())
    streams = [seed_for(0, split, i) for split, n in SIZES.items() for i in range(n)]
    streams += [seed_for(0, "pretrain", i) for i in range(0, 200_000, 500)] + [seed_for(0, "tasks", i) for i in range(0, 200_000, 500)]
    assert len(set(streams)) == len(streams)


def test_the_base_model_is_trained_on_no_clip_of_the_corpus():
    rng = rng_for(0, "pretrain", 0)
    base = [base_scene(rng) for _ in range(3000)]
    ours = {(scene.things, scene.events) for scenes in SCENES.values() for scene in scenes}
    assert not ours & {(scene.things, scene.events) for scene in base}
    assert not {scene.caption for scenes in SCENES.values() for scene in scenes} & {scene.caption for scene in base}


def looks(scenes):
    "(N, features) eight frames of each scene, blurred to 8 x 8 blocks."
    return np.stack([render(s, 32, range(2, 32, 4)).astype(np.float32).reshape(8, 8, 4, 8, 4, 3).mean((2, 4)).ravel() for s in scenes])


def distances(a, b):
    "Root mean square difference in grey levels between all rows of a and of b."
    return np.sqrt(np.maximum((a*a).sum(1)[:, None] + (b*b).sum(1) - 2*a @ b.T, 0)/a.shape[1])


def test_no_clip_looks_nearly_like_one_of_another_split():
    seen = {split: looks(scenes) for split, scenes in SCENES.items()}
    nearest = [distances(seen[a], seen[b]).min() for a in seen for b in seen if a < b]
    noisy = looks([dataclasses.replace(s, corruption="noise") for s in SCENES["train"][:20]])
    same = distances(seen["train"][:20], noisy).diagonal().max()
    assert len(nearest) == 6 and min(nearest) > 20 > 3*same                     # a clip and its noisy copy would be found


def test_corruptions_are_named_balanced_and_only_out_of_domain():
    counts = Counter(s.corruption for s in SCENES["ood"])
    assert counts == {c: SIZES["ood"]//7 for c in CORRUPTIONS} and SIZES["ood"] % 56 == 0
    assert {s.corruption for split in ("train", "dev", "test") for s in SCENES[split]} == {None}


def test_every_corruption_changes_the_file_and_is_in_the_truth(tmp_path):
    records = build_mmevents(tmp_path, CorpusConfig(name="mmevents", root="-", clips={"ood": 56}), workers=1)
    assert [r.truth["corruption"] for r in records[::8]] == list(CORRUPTIONS)
    sizes = {c: np.mean([video_path(tmp_path, r).stat().st_size for r in records if r.truth["corruption"] == c]) for c in CORRUPTIONS}
    assert sizes["compression"] < sizes["blur"] < sizes["stripes"] < sizes["noise"]
    assert max(e["length"] for r in records if r.truth["corruption"] == "speed" for e in r.truth["events"]) <= 3


@pytest.mark.parametrize("language", GRAMMARS)
def test_captions_say_what_the_generator_did_in_every_language(corpus, language):
    _, records = corpus
    for r in records:
        slots = slots_of(r.captions[language][0], language)
        assert slots == r.truth["slots"] and [e["kind"] for e in r.truth["events"]] == [slots["e1"], slots["e2"]]


def test_the_datasheet_lies_beside_the_records(corpus):
    root, records = corpus
    sheet = (root/"DATASHEET.md").read_text(encoding="utf-8")
    assert "## Motivation" in sheet and "| train | 16 | 0 |" in sheet and "| zh | chinese | 40 |" in sheet


def test_the_datasheet_says_how_many_captions_are_told_in_another_split_too(corpus):
    root, records = corpus
    again = dict(of_split(records, "test")[0].captions)
    records = [*records, of_split(records, "train")[0].model_copy(update=dict(captions=again))]                   # at least one is
    lines = {line.split(" | ")[0]: line.split(" | ")[2:] for line in datasheet(records, root).split("| captions of |")[1].splitlines()[2:6]}
    told = {split: [(code, c) for r in of_split(records, split) for code, captions in r.captions.items() for c in captions] for split in ("train", "dev", "test", "ood")}
    for split, row in lines.items():
        here = told[split.strip("| ")]
        assert [int(cell.split(" (")[0]) for cell in row] == [sum((c in there) if there is not here else here.count(c) > 1 for c in here) for there in told.values()]
    assert int(lines["| test"][0].split(" (")[0]) >= len(again)


def test_half_of_what_is_seen_is_silent_and_half_of_the_clips_hold_an_unseen_sound():
    tracks = [tones(s) for s in SCENES["test"]]
    with_sound = np.mean([np.isin(t, [PITCH[k] for k in SOUNDS]).any() for t in tracks])
    audible = np.mean([(t[e.start:e.start + e.length] > 0).all() for s, t in zip(SCENES["test"], tracks) for e in s.events])
    assert .4 < with_sound < .6 and .4 < audible < .6


def test_audio_tokens_of_a_file_are_those_of_its_script(corpus):
    root, records = corpus
    for r, scene in zip(records[:8], SCENES["train"]):
        assert (pitch_classes(read_audio(root/r.video), 32) == pitch_class(tones(scene))).all()


def test_a_model_hears_only_when_asked_to(corpus, tmp_path):
    root, records = corpus
    config = FramesConfig(budgets=[8], selectors=["uniform"])
    with_audio, without = (prepare(root, records[:4], config, workers=1, audio=a)[0]["uniform-8"] for a in (True, False))
    assert without.audio is None and with_audio.audio.shape == (4, 8) and np.array_equal(with_audio.pixels, without.pixels)
    save_clips(tmp_path/"x.safetensors", with_audio)
    assert load_clips(tmp_path/"x.safetensors").audio is None
    assert np.array_equal(load_clips(tmp_path/"x.safetensors", audio=True).audio, with_audio.audio)


def test_every_word_of_the_corpus_is_trained_in_the_base(corpus):
    _, records = corpus
    rng, heard = rng_for(0, "words"), set()
    for i in range(4000):
        scene = base_scene(rng)
        heard |= {w for text in (scene.caption, *(t for _, *said in tasks_of(scene, rng).values() for t in said)) for w in text.split()}
    tokenizer = build_tokenizer(vocabulary())
    said = [t for r in records for t in (*(c for cs in r.captions.values() for c in cs), *(x for q in r.questions for x in (q.question, q.answer)),
                                         *(x for i in r.instructions for x in (i.prompt, i.answer)))]
    assert {w for text in said for w in text.split()} <= heard <= set(vocabulary())
    for text in said: caption_ids(tokenizer, text)


def test_the_base_is_shown_no_transient_event_and_told_no_target_sentence():
    rng, kinds, told = rng_for(0, "leak"), set(), []
    for i in range(1500):
        scene = base_scene(rng)
        kinds |= set(scene.kinds)
        told += [scene.tell(code) for code in GRAMMARS] + [answer for _, _, answer in tasks_of(scene, rng).values()]
    assert not kinds & set(TRANSIENT)
    both = [t for t in told for code in GRAMMARS if t.startswith(GRAMMARS[code].forms["target"].split()[0] + " ") and slots_of(t, code)["e1"]]
    assert not both


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
    ({"captions": {"en": []}, "questions": []}, "at least one caption"), ({"start": 2., "end": 1.}, "end must come after start"), ({"colour": "red"}, "colour: unknown key")])
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
