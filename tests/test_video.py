"Decoding: whatever the file is like, the answer is frames or one line that names file and reason."
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT

from mmqlora.core import InputError
from mmqlora.corpus import ClipRecord, video_path
from mmqlora.video import read_audio, read_clip, read_frames, torchcodec_problem, video_info

GREY = lambda i, n: 40 + 170*i//max(1, n - 1)                                  # noqa: E731  brightness tells the frame's number


def write(path, n=20, size=(64, 48), codec="mpeg4", pix="yuv420p", fps=10, container=None, gop=5, times=None, options=None, rotate=0):
    "A video of `n` plain frames that grow brighter, its left half darker than its right."
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, pix
        stream.codec_context.gop_size = gop
        if codec.startswith("libx26"): stream.options = {"preset": "ultrafast", "x264-params": f"keyint={gop}:scenecut=0"}
        if times: stream.codec_context.time_base = Fraction(1, 1000)
        if rotate: stream.set_display_rotation(rotate)
        for i in range(n):
            pixels = np.full((size[1], size[0], 3), GREY(i, n), np.uint8)
            pixels[:, :size[0]//2] //= 2
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix)
            if times: frame.pts, frame.time_base = int(times[i]*1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def bright(clip): return clip.frames[:, :, 20:].mean((1, 2, 3))


KINDS = {
    "plain.mp4": {},
    "h264.mp4": dict(codec="libx264"),
    "ten-bit.mkv": dict(codec="ffv1", pix="yuv420p10le"),
    "ten-bit.mp4": dict(codec="libx265", pix="yuv420p10le"),
    "grey.mkv": dict(codec="ffv1", pix="gray"),
    "yuv444.mkv": dict(codec="ffv1", pix="yuv444p"),
    "alpha.mkv": dict(codec="ffv1", pix="bgra"),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "vp8.webm": dict(codec="libvpx"),
    "old.avi": dict(codec="mpeg4"),
    "moving.gif": dict(codec="gif", pix="rgb8"),
    "odd.mkv": dict(codec="ffv1", size=(63, 47)),
    "tiny.mkv": dict(codec="ffv1", size=(2, 2)),
    "stream.ts": dict(codec="mpeg2video", fps=25),
    "clip.mov": dict(codec="mjpeg", pix="yuvj420p"),
    "one.mp4": dict(n=1),
    "видео 🎬 'a b'.mp4": {},
    "-y;rm -rf ~ $(x).mp4": {},
    "concat:a|b%03d.mp4": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_frames_in_order(tmp_path, name):
    path = tmp_path/name
    kind = KINDS[name]
    write(path, container=None if path.suffix != ".ts" else "mpegts", **kind)
    n = kind.get("n", 20)
    clip = read_clip(path)
    assert clip.frames.shape == (n, 32, 32, 3) and clip.frames.dtype == np.uint8
    assert clip.times[0] == 0 and (np.diff(clip.times) > 0).all()
    assert abs(bright(clip) - [GREY(i, n) for i in range(n)]).max() < 16
    assert not len(read_audio(path)) and not video_info(path).audio


def test_a_relative_name_that_looks_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    write(tmp_path/"concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read_clip("concat:a.mp4").frames) == 20


def test_variable_frame_rate_keeps_the_times_of_the_file(tmp_path):
    times = [0, .1, .15, .9, 1., 2.5, 2.6]
    clip = read_clip(write(tmp_path/"vfr.mkv", n=7, codec="ffv1", times=times))
    np.testing.assert_allclose(clip.times, times, atol=2e-3)
    assert len(read_clip(tmp_path/"vfr.mkv", start=.5, end=2.).frames) == 2


@pytest.mark.parametrize("degrees, dark", [(90, np.s_[:, 20:, :]), (180, np.s_[:, :, 20:]), (-90, np.s_[:, :12, :])])
def test_rotation_metadata_turns_the_picture_upright(tmp_path, degrees, dark):
    path = write(tmp_path/"phone.mp4", rotate=degrees)
    frames = read_clip(path).frames
    assert frames[dark].mean() < .65*frames.max((1, 2, 3)).mean()
    info = video_info(path)
    assert (info.width, info.height) == ((48, 64) if degrees != 180 else (64, 48))


def test_a_header_without_duration_is_no_obstacle(tmp_path):
    path = tmp_path/"live.webm"
    write(path, codec="libvpx", container="webm", options={"live": "1"})
    with av.open(str(path)) as c: assert not c.duration and not c.streams.video[0].duration
    assert len(read_clip(path).frames) == 20
    assert video_info(path).seconds == pytest.approx(2., abs=.15)
    assert np.array_equal(read_frames(path, [.55, 1.25]).frames, read_clip(path).frames[[5, 12]])


@pytest.mark.parametrize("name, make", [
    ("empty.mp4", lambda p: p.write_bytes(b"")),
    ("text.mp4", lambda p: p.write_text("hello")),
    ("noise.mp4", lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000))),
    ("none.mp4", lambda p: None),
    ("folder.mp4", lambda p: p.mkdir()),
    ("no-frames.mp4", lambda p: write(p, n=0)),
    ("cut-before-index.mp4", lambda p: (write(p), p.write_bytes(p.read_bytes()[:-300]))),
    ("playlist.mp4", lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")),
    ("list.mp4", lambda p: p.write_text("ffconcat version 1.0\nfile /etc/hostname\n")),
    ("two\nlines.mp4", lambda p: p.write_text("x")),
    ("nul\0.mp4", lambda p: None),
])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, make):
    path = tmp_path/name
    make(path)
    for read in (read_clip, video_info, lambda p: read_frames(p, [0.])):
        with pytest.raises(InputError) as err: read(path)
        line = str(err.value)
        assert "\n" not in line and name.split(".")[0].split("\n")[0].split("\0")[0] in line and ": " in line


@pytest.mark.parametrize("codec, name", [("mpeg4", "cut.mp4"), ("libvpx", "cut.webm"), ("mpeg4", "cut.avi")])
def test_a_truncated_file_is_an_error_and_not_a_shorter_clip(tmp_path, codec, name):
    path = write(tmp_path/name, n=80, size=(160, 120), codec=codec, options={"movflags": "faststart"} if name.endswith("mp4") else None)
    assert len(read_clip(path).frames) == 80
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size*.6)])
    with pytest.raises(InputError, match=name): read_clip(path)
    early = read_clip(path, end=1.)
    assert len(early.frames) == 10


def test_damage_in_the_middle_never_hangs_or_crashes(tmp_path):
    path = write(tmp_path/"damaged.mp4", n=40, codec="libx264")
    data = bytearray(path.read_bytes())
    for at in range(200, len(data) - 1200, 97): data[at] ^= 0x5a
    path.write_bytes(data)
    try: assert len(read_clip(path).frames)
    except InputError as err: assert "damaged.mp4" in str(err) and "\n" not in str(err)


@pytest.mark.parametrize("url", ["https://example.org/a.mp4", "rtsp://camera/1", "file:///etc/passwd", "http://127.0.0.1/x.mp4"])
def test_urls_are_refused(url):
    with pytest.raises(InputError, match="URLs are not opened"): read_clip(url)


def test_a_link_out_of_the_data_root_is_refused(tmp_path):
    write(tmp_path/"outside.mp4")
    (tmp_path/"root").mkdir()
    (tmp_path/"root/a.mp4").symlink_to(tmp_path/"outside.mp4")
    for video in ("a.mp4", "../outside.mp4", str(tmp_path/"outside.mp4")):
        record = ClipRecord(id="x", video=video, split="train", captions={"en": ["a"]})
        with pytest.raises(InputError, match="outside"): video_path(tmp_path/"root", record)


@pytest.mark.parametrize("start, end, frames", [(0, 99., 20), (1.5, None, 5), (1.5, 99., 5), (.5, .6, 1), (0, .05, 1)])
def test_spans_end_where_the_file_ends(tmp_path, start, end, frames):
    assert len(read_clip(write(tmp_path/"a.mp4"), start=start, end=end).frames) == frames


@pytest.mark.parametrize("start, end", [(2., None), (50., 60.), (1., .5), (-1., None), (float("nan"), None), (0., float("nan"))])
def test_an_empty_or_senseless_span_is_an_error(tmp_path, start, end):
    with pytest.raises(InputError, match="a.mp4"): read_clip(write(tmp_path/"a.mp4"), start=start, end=end)


def test_a_span_is_the_same_frames_as_in_the_whole_clip(tmp_path):
    path = write(tmp_path/"a.mp4", n=60, codec="libx264", gop=25)
    whole, part = read_clip(path), read_clip(path, start=3.3, end=4.7)
    assert np.array_equal(part.frames, whole.frames[33:47]) and np.allclose(part.times, whole.times[33:47])


PEAK = """
import sys
from mmqlora.video import read_clip
def most(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])/1024
before = most()
print(len(read_clip(sys.argv[1]).frames), most() - before)
"""


def test_huge_pictures_are_scaled_while_they_are_decoded(tmp_path):
    "In a process of its own, by the memory that it ever held (VmHWM: what `ru_maxrss` says may be its parent's): that of FFmpeg counts."
    path = write(tmp_path/"4k.mp4", n=24, size=(3840, 2160))
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, cwd=ROOT, check=True)
    frames, mebibytes = map(float, done.stdout.split())
    assert frames == 24 and mebibytes < 200, mebibytes                         # 24 frames are 285 MiB as decoded, 570 in RGB


def test_frames_a_second_thin_out_evenly(tmp_path):
    path = write(tmp_path/"a.mp4", n=60, fps=30)
    np.testing.assert_allclose(read_clip(path, fps=10).times, np.arange(20)/10, atol=1e-3)
    np.testing.assert_allclose(np.diff(read_clip(path, fps=8).times).mean(), 1/8, rtol=.05)
    assert len(read_clip(path, fps=1000).frames) == 60


def test_frames_a_second_do_not_make_up_for_a_pause(tmp_path):
    path = write(tmp_path/"pause.mkv", n=9, codec="ffv1", times=[0, .1, .2, 3., 3.1, 3.2, 3.3, 3.4, 3.5])
    np.testing.assert_allclose(read_clip(path, fps=4).times, [0, 3., 3.3, 3.5], atol=2e-3)      # a grid of .25 s: not all after 3 s


@pytest.mark.parametrize("name, kind", [("a.mp4", {}), ("b.mp4", dict(codec="libx264")), ("c.avi", {}), ("d.mkv", dict(codec="libx264")),
                                        ("e.webm", dict(codec="libvpx")), ("f.gif", dict(codec="gif", pix="rgb8")), ("g.ts", dict(codec="mpeg2video", fps=25, container="mpegts"))])
def test_chosen_instants_are_the_frames_on_screen_then(tmp_path, name, kind):
    path = write(tmp_path/name, n=60, **kind)
    clip = read_clip(path)
    chosen = [0, 1, 7, 8, 30, 44, 59]
    exact, between = (read_frames(path, clip.times[chosen] + late) for late in (0, .015))
    for picked in (exact, between):
        assert np.array_equal(picked.frames, clip.frames[chosen]) and np.allclose(picked.times, clip.times[chosen])


@pytest.fixture(scope="module")
def long(tmp_path_factory): return write(tmp_path_factory.mktemp("long")/"long.mp4", n=10_000, size=(16, 16), fps=25, gop=50)


def test_eight_of_ten_thousand_frames_decode_at_most_eight_groups_of_pictures(long):
    times = np.linspace(3., 396., 8)
    picked = read_frames(long, times)
    assert picked.decoded <= 8*52                                              # a group, and one more to see that it is the last
    np.testing.assert_allclose(picked.times, np.floor(times*25 + 1e-6)/25, atol=1e-6)


def test_neighbouring_instants_do_not_decode_their_group_again(long):
    assert read_frames(long, 200 + np.arange(8)*.16).decoded <= 60


def test_a_late_span_does_not_decode_what_comes_before(long, monkeypatch):
    from mmqlora import video
    timed, seen = video._timed, []
    monkeypatch.setattr(video, "_timed", lambda *a: (seen.append(f) or f for f in timed(*a)))
    assert len(read_clip(long, start=300., end=301.).frames) == 25
    assert len(seen) <= 25 + 51


def test_times_must_be_increasing_seconds(long):
    for times in ([], [2., 1.], [-1.], [float("nan")]):
        with pytest.raises(InputError, match="times must be"): read_frames(long, times)


@pytest.fixture(scope="module")
def shared_libraries(tmp_path_factory):
    "Folders with FFmpeg's libraries under their usual names: those that PyAV's wheel carries."
    carried = Path(av.__file__).parent.parent/"av.libs"
    folder = tmp_path_factory.mktemp("ffmpeg")
    for lib in carried.glob("lib*.so.*"):
        stem, version = lib.name.split("-")[0], lib.name.split(".so.")[1].split(".")[0]
        if stem in ("libavutil", "libavcodec", "libavformat", "libavdevice", "libavfilter", "libswscale", "libswresample"):
            (folder/f"{stem}.so.{version}").symlink_to(lib)
    return f"{folder}:{carried}"


SAME = """
import sys, numpy as np
from mmqlora.video import read_clip, torchcodec_problem
if problem := torchcodec_problem(): sys.exit(f"{problem}: pip install -r requirements.txt")
for path in sys.argv[1:]:
    for span in ({}, dict(start=.55, end=1.25), dict(fps=5)):
        a, b = read_clip(path, **span), read_clip(path, **span, backend="torchcodec")
        assert np.allclose(a.times, b.times, atol=1e-3), (path, span, a.times, b.times)
        assert abs(a.frames.astype(int) - b.frames).mean() < 3, (path, span, abs(a.frames.astype(int) - b.frames).mean())
"""


def test_torchcodec_gives_the_same_frames(tmp_path, shared_libraries):
    paths = [write(tmp_path/"a.mp4", codec="libx264"), write(tmp_path/"b.webm", codec="libvpx"), write(tmp_path/"c.mp4", rotate=90)]
    env = dict(os.environ) if not torchcodec_problem() else dict(os.environ, LD_LIBRARY_PATH=shared_libraries)
    done = subprocess.run([sys.executable, "-c", SAME, *map(str, paths)], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]


def test_a_backend_that_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match="backend torchcodec: torchcodec is not installed.* use the backend pyav"):
        read_clip(write(tmp_path/"a.mp4"), backend="torchcodec")
