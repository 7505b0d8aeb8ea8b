"Other corpora, end to end: annotations in their own format and real videos, imported, prepared, learned from by a small QLoRA run, and scored."
import os
import shutil
import subprocess
import sys

import av
import pytest
import yaml
from conftest import ROOT

from mmqlora.batch import build_tokenizer, load_clips, save_clips
from mmqlora.config import load_params
from mmqlora.core import InputError, read_json, rng_for, write_json
from mmqlora.corpus import of_split, read_records
from mmqlora.importers import FORMATS, import_corpus
from mmqlora.mmevents import write_mp4
from mmqlora.model import new_model, save_model, small_config
from mmqlora.prepare import prepare
from mmqlora.render import SAMPLE_RATE, render, sound
from mmqlora.runs import run_experiment
from mmqlora.scenes import FPS, target_scene
from mmqlora.video import video_info


def msrvtt(folder):
    splits = ("train", "train", "train", "validate", "test", "test")
    write_json(folder/"MSRVTT_data.json", dict(videos=[dict(video_id=f"video{i}", split=s, category=1) for i, s in enumerate(splits)],
                                               sentences=[dict(video_id=f"video{i}", caption=f"caption {j} of video {i}") for j in range(3) for i in range(6)]))
    return [f"video{i}" for i in range(6)]


def activitynet(folder):
    told = dict(duration=2., timestamps=[[0, 1.2], [.5, 2.]], sentences=["A man runs.", "He jumps."])
    for name, videos in (("train", "ab"), ("val_1", "c"), ("val_2", "d")): write_json(folder/f"{name}.json", {f"v_{v}": told for v in videos})
    return [f"v_{v}" for v in "abcd"]


def vatex(folder):
    def clips(names): return [dict(videoID=f"{n}_000000_000002", enCap=["a man runs", "someone runs"], chCap=["一个 男人 跑"]) for n in names]
    write_json(folder/"vatex_training_v1.0.json", clips("abc"))
    write_json(folder/"vatex_public_test_english_v1.1.json", clips("de"))
    return [f"{n}_000000_000002" for n in "abcde"]


def lsmdc(folder):
    clips = [f"000{i}_Film_00.00.0{i}.000-00.00.0{i}.900" for i in range(5)]
    rows = [f"{c}\t00.00.01.000\t00.00.02.000\t00.00.01.000\t00.00.02.000\tSOMEONE waits {i}.\n" for i, c in enumerate(clips)]
    (folder/"LSMDC16_annos_training.csv").write_text("".join(rows[:3]))
    (folder/"LSMDC16_annos_test.csv").write_text("".join(rows[3:]))
    (folder/"LSMDC16_challenge_1000_publictect.csv").write_text(rows[3])
    return clips


def msrvtt_qa(folder):
    def asked(videos): return [dict(video_id=v, id=10*v + i, category_id=1, question=q, answer=a) for v in videos for i, (q, a) in enumerate((("what runs?", "dog"), ("who is it?", "man")))]
    for split, videos in (("train", (0, 1, 2)), ("test", (3, 4))): write_json(folder/f"{split}_qa.json", asked(videos))
    return [f"video{i}" for i in range(5)]


def ego4d_nlq(folder):
    def video(uid):
        queries = [dict(query="Where was the knife?", template="Objects: Where is object X?", clip_start_sec=.2, clip_end_sec=.7)]
        return dict(video_uid=uid, split="train", clips=[dict(clip_uid=f"{uid}-clip", video_start_sec=0., video_end_sec=1.5, clip_start_sec=0., clip_end_sec=1.5,
                                                              annotations=[dict(language_queries=queries)])])
    write_json(folder/"nlq_train.json", dict(version="v1", videos=[video(uid) for uid in "abcd"]))
    return list("abcd")


def howto100m(folder):
    write_json(folder/"raw_caption.json", {v: dict(start=[0., .9], end=[.8, 1.8], text=["add the flour", "stir"]) for v in "abcd"})
    return list("abcd")


FIXTURES = {"msrvtt": msrvtt, "activitynet": activitynet, "vatex": vatex, "lsmdc": lsmdc, "msrvtt-qa": msrvtt_qa, "ego4d-nlq": ego4d_nlq, "howto100m": howto100m}
ASKED = ("msrvtt-qa", "ego4d-nlq")
UNTESTED = ("ego4d-nlq", "howto100m")                                         # no test split with annotations


def words_of(records):
    said = [c for r in records for cs in r.captions.values() for c in cs] + [t for r in records for q in r.questions for t in (q.question, q.answer)]
    return sorted({w for text in said for w in text.split()})


def make_base(folder, words):
    tower, tokenizer = dict(hidden=64, layers=1, mlp=128), build_tokenizer(words)
    save_model(folder, new_model(small_config(tokenizer, tower, tower)), tokenizer, {})


def make_clone(folder, name, run):
    "A repository with params.yaml for the corpus `name`; one that is there gets other params."
    folder.mkdir(exist_ok=True)
    params = yaml.safe_load((ROOT/"params.yaml").read_text())
    params |= dict(profile="here", profiles={"here": dict(clips={"train": None, "test": None})}, corpus=dict(name=name, root=f"data/{name}"),
                   runs={"qlora": dict(frames=2, steps=2, batch_size=2, seeds=[0], **run)})
    params["frames"] |= dict(budgets=[2], sets={}, selectors=["entropy"], on_error="skip")
    (folder/"params.yaml").write_text(yaml.safe_dump(params))
    return folder


def write_avi(path, frames, samples):
    "A true AVI, as LSMDC has them: MPEG-4 and PCM."
    with av.open(str(path), "w", format="avi") as out:
        picture, heard = out.add_stream("mpeg4", rate=FPS), out.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        for pixels in frames: out.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        chunk = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        chunk.sample_rate = SAMPLE_RATE
        out.mux(heard.encode(chunk))
        for stream in (picture, heard): out.mux(stream.encode(None))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "place(folder, names) writes a video of two seconds for each name, each its own."
    folder, made = tmp_path_factory.mktemp("videos"), []
    for i in range(6):
        scene = target_scene(rng_for(i, "corpora"))
        for suffix, write in ((".mp4", write_mp4), (".avi", write_avi)): write(folder/f"{i}{suffix}", render(scene), sound(scene))
        made.append({suffix: (folder/f"{i}{suffix}").read_bytes() for suffix in (".mp4", ".avi")})
    def place(target, names, suffix=".mp4"):
        target.mkdir(parents=True)
        for name, content in zip(names, made): (target/f"{name}{suffix}").write_bytes(content[suffix])
        return target
    return place


def suffix_of(name): return ".avi" if name == "lsmdc" else ".mp4"


def test_the_avi_files_are_avi(clips, tmp_path):
    path = clips(tmp_path/"videos", ["a"], ".avi")/"a.avi"
    with av.open(str(path)) as container: assert container.format.name == "avi"
    assert path.read_bytes()[8:12] == b"AVI " and video_info(path) == (2., 64, 64, FPS, True)


@pytest.fixture
def corpus(tmp_path, clips, monkeypatch):
    "corpus(name) -> (folder of a repository, its params, records): annotations imported there, a base model that knows their words."
    def make(name, run=None):
        (tmp_path/"annotations").mkdir()
        videos = clips(tmp_path/"videos", FIXTURES[name](tmp_path/"annotations"), suffix_of(name))
        clone = make_clone(tmp_path/"clone", name, run or ({"tasks": ["questions"], "checks": ["tasks"]} if name in ASKED else {}))
        import_corpus(name, [tmp_path/"annotations"], videos, clone/f"data/{name}", held_out=.5 if name in UNTESTED else 0.)
        records = read_records(clone/f"data/{name}")
        make_base(clone/"models/base", words_of(records))
        monkeypatch.chdir(clone)
        return clone, load_params(), records
    return make


def frames_of(clone, params):
    "What the stage `frames` does."
    records = read_records(clone/params.corpus.root)
    for split in params.profiles[params.profile].clips:
        sets, _ = prepare(clone/params.corpus.root, of_split(records, split), params.frames, workers=1, report=clone/f"artifacts/frames/kept-{split}.json")
        for name, clips in sets.items(): save_clips(clone/f"artifacts/frames/{name}/{split}.safetensors", clips)


@pytest.mark.parametrize("name", FORMATS)
def test_annotations_and_videos_become_a_scored_run(name, corpus):
    clone, params, records = corpus(name)
    frames_of(clone, params)
    record = run_experiment(params, "qlora")
    tested, metrics = [r for r in records if r.split == "test"], record["metrics"]
    assert len(record["curve"]["loss"][0]) == 1 and metrics["test.exact"]["n"] == len(tested) >= 2
    assert not any(k.startswith("ood") or k in ("test.slots", "test.event") for k in metrics)      # nothing that this corpus has not
    if name in ASKED:
        assert {"test.vqa", "test.questions"} <= metrics.keys() and "test.cider" not in metrics
        assert [e["reference"] for e in record["examples"]] == [r.questions[0].answer for r in tested]
    else: assert {"test.bleu4", "test.cider", "test.rouge_l", "test.loss"} <= metrics.keys()
    assert ("test.t2v_r1" in metrics) == (name in ("msrvtt", "activitynet", "vatex", "lsmdc"))
    assert set(record["galleries"]["test"]) == {r.video for r in tested}              # intervals resample videos
    assert (clone/"artifacts/adapters/qlora/seed0/adapter_model.safetensors").is_file()


def test_clips_outside_every_gallery_have_no_rank_and_count_nowhere(corpus):
    clone, params, records = corpus("lsmdc")
    frames_of(clone, params)
    metrics = run_experiment(params, "qlora")["metrics"]
    assert [r.gallery for r in records if r.split == "test"].count(None) == 1
    assert metrics["test.t2v_r1"]["n"] == metrics["test.t2v_medr"]["n"] == 1 and metrics["test.t2v_r1"]["value"] == 1   # one clip alone in its gallery


def test_a_broken_video_is_left_out_of_frames_and_run_and_listed(corpus):
    clone, params, records = corpus("msrvtt")
    bad = next(r for r in records if r.split == "train")
    path = clone/params.corpus.root/bad.video
    content = path.read_bytes()
    path.unlink()                                                             # it is a hard link to the user's file
    path.write_bytes(content[:len(content)//2])
    frames_of(clone, params)
    kept = read_json(clone/"artifacts/frames/kept-train.json")
    assert kept["asked"] == 3 and len(kept["kept"]) == 2 and [s["id"] for s in kept["skipped"]] == [bad.id] and bad.video in kept["skipped"][0]["problem"]
    assert run_experiment(params, "qlora")["metrics"]["test.exact"]["n"] == 2


def test_a_word_that_the_base_does_not_know_is_one_line_that_names_it(corpus):
    clone, params, records = corpus("activitynet")
    frames_of(clone, params)
    shutil.rmtree(clone/"models/base")
    make_base(clone/"models/base", [w for w in words_of(records) if w != "jumps."])
    with pytest.raises(InputError, match="words unknown to this base model: jumps.*subword tokenizer"): run_experiment(params, "qlora")


def test_a_corpus_of_questions_asks_for_a_run_that_answers(corpus):
    clone, params, _ = corpus("msrvtt-qa", run={"tasks": ["caption"]})
    frames_of(clone, params)
    with pytest.raises(InputError, match=r"questions and no captions.*tasks: \[questions\]"): run_experiment(params, "qlora")


CLI = (sys.executable, "-c", "from mmqlora.cli import main; main()")


def ran(clone, *command):
    "What a command prints, run in a repository with code of its own; it must succeed."
    environment = {**os.environ, "PYTHONPATH": str(clone), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    "A clone with code and the stages `code`, `frames` and `finetune`, under git and DVC."
    clone = make_clone(tmp_path_factory.mktemp("stages")/"clone", "msrvtt", {})
    for part in ("mmqlora", "scripts", "nbs/experiments"): shutil.copytree(ROOT/part, clone/part, ignore=shutil.ignore_patterns("__pycache__"))
    stages = yaml.safe_load((ROOT/"dvc.yaml").read_text())["stages"]
    (clone/"dvc.yaml").write_text(yaml.safe_dump(dict(stages={k: stages[k] for k in ("code", "frames", "finetune")})))
    shutil.copy(ROOT/".dvcignore", clone)
    ran(clone, "git", "init", "-q")
    ran(clone, "dvc", "init", "-q")
    return clone


def imported(repository, name, tmp_path, clips):
    "Import a corpus by the command line in place of what the repository had; its records."
    clone = make_clone(repository, name, {})
    for old in ("data", "artifacts"): shutil.rmtree(clone/old, ignore_errors=True)
    (tmp_path/"annotations").mkdir()
    videos = clips(tmp_path/"videos", FIXTURES[name](tmp_path/"annotations"), suffix_of(name))
    more = ("--held-out", ".5") if name in UNTESTED else ()
    said = ran(clone, *CLI, "import", name, "--annotations", tmp_path/"annotations", "--videos", videos, *more)
    records = read_records(clone/f"data/{name}")
    assert f"{len(records)} of {len(records)} clips" in said
    ran(clone, "dvc", "add", "-q", "data")
    return records


@pytest.mark.parametrize("name", [f for f in FORMATS if f != "msrvtt"])       # that one goes further, below
def test_every_format_goes_by_the_command_line_to_the_frames_of_the_stage(name, tmp_path, clips, repository):
    records = imported(repository, name, tmp_path, clips)
    ran(repository, "dvc", "repro", "-q", "frames")
    for split in ("train", "test"):
        sets, chosen = load_clips(repository/f"artifacts/frames/entropy-2/{split}.safetensors", audio=True), of_split(records, split)
        assert sets.pixels.shape == (len(chosen), 2, 3, 32, 32) and len(chosen) and sets.pixels.float().std() > 10
        assert read_json(repository/"artifacts/frames/corpus.json")["splits"][split]["clips"] == len(chosen)
    assert "up to date" in ran(repository, "dvc", "repro", "frames")


def test_the_stages_themselves_run_on_an_imported_corpus(tmp_path, clips, repository):
    "By the command line: import, dvc add, dvc repro of one run; a second dvc repro has nothing to do."
    records = imported(repository, "msrvtt", tmp_path, clips)
    for base in ("base", "base-small", "base-large"): make_base(repository/"models"/base, words_of(records))      # deps of every run
    ran(repository, "dvc", "repro", "-q", "finetune@qlora")
    record = read_json(repository/"results/here/qlora.json")
    assert len(records) == 6 and record["metrics"]["test.cider"]["n"] == 2 and read_json(repository/"artifacts/frames/corpus.json")["splits"]["train"]["clips"] == 3
    assert "up to date" in ran(repository, "dvc", "repro", "finetune@qlora")
