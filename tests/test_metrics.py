"Metrics: parity with the toolkits they are said to follow, hard input, ties, intervals and tests that keep their level."
import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import ROOT
from torchmetrics.functional.retrieval import (
    retrieval_average_precision, retrieval_hit_rate, retrieval_normalized_dcg, retrieval_reciprocal_rank)

from mmqlora.core import InputError
from mmqlora.errors import error_counts, error_kinds
from mmqlora.meteor import align, meteor_exact
from mmqlora.metrics import (
    caption_metrics, clip_metrics, normalize_answer, ptb_tokenize, ranks, sacre_metrics, tokenize, vqa_accuracy)
from mmqlora.retrieval import average_precision, both_ways, first_ranks, ndcg, query_scores, retrieval_metrics
from mmqlora.runs import caption_scores
from mmqlora.scenes import quartet, target_scene
from mmqlora.statistics import (
    bootstrap_statistic, cliffs_delta, cohens_d, compare_family, compare_scores, holm, order_sensitivity, paired_permutation)

JAVA = pytest.mark.skipif(not shutil.which("java"), reason="METEOR and the PTB tokenizer need Java, and there is none here")
COCO = json.loads((ROOT/"tests/data/coco_example.json").read_text())           # where it is from, and its licence, are in it
PUBLISHED = dict(bleu1=.579, bleu2=.404, bleu3=.279, bleu4=.191, meteor=.195, rouge_l=.396, cider=.600)


@pytest.fixture(scope="module")
def sentences():
    "(predictions, references): 60 captions of the grammar, spoiled; one to three references each."
    rng = np.random.default_rng(0)
    true = [[target_scene(rng).caption for _ in range(int(n))] for n in rng.integers(1, 4, 60)]
    words = " ".join(r for refs in true for r in refs).split()
    def spoil(caption): return " ".join(w if rng.random() < .7 else str(rng.choice(words)) for w in caption.split() if rng.random() < .95)
    return [spoil(refs[0]) for refs in true], true


# Captions: the COCO toolkit and sacreBLEU

@pytest.fixture(scope="module")
def example():
    "(results, captions) of the toolkit's example: 1,000 images of COCO val2014."
    return [i["result"] for i in COCO["images"].values()], [i["captions"] for i in COCO["images"].values()]


@JAVA
def test_the_toolkit_s_example_gives_its_published_figures(example):
    found = caption_metrics(*example, tokenizer="ptb", meteor=True)
    assert {k: round(found[k], 3) for k in PUBLISHED} == PUBLISHED


def test_without_java_the_toolkit_s_example_gives_its_figures_within_a_thousandth(example):
    found = caption_metrics(*example)
    assert found == pytest.approx({k: v for k, v in PUBLISHED.items() if k != "meteor"}, abs=.001)


def test_bleu_of_the_toolkit_s_published_counts_is_its_published_bleu():
    "The example's log: n-grams that match, n-grams said, words said, words of the closest references."
    for n in range(1, 5):
        bleu = sacrebleu.BLEU(max_ngram_order=n, smooth_method="none").compute_bleu([5732, 2510, 1043, 423][:n], [9893, 8893, 7893, 6893][:n], 9893, 9855, "none",
                                                                                   max_ngram_order=n)
        assert round(bleu.score/100, 3) == PUBLISHED[f"bleu{n}"]


@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_bleu_is_sacrebleu_s_with_the_same_tokens(sentences, n):
    said, true = [tokenize(p) for p in sentences[0]], [[tokenize(r) for r in refs] for refs in sentences[1]]
    streams = [[refs[i] if i < len(refs) else None for refs in true] for i in range(3)]
    theirs = sacrebleu.BLEU(max_ngram_order=n, smooth_method="none", tokenize="none").corpus_score(said, streams).score/100
    assert caption_metrics(*sentences)[f"bleu{n}"] == pytest.approx(theirs, abs=1e-6)


def longest(a, b):
    row = [0]*(len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1): row[j], last = max(row[j], row[j - 1], last + (x == y)), row[j]
    return row[-1]


def test_rouge_l_is_lin_s_formula(sentences):
    def score(said, true):
        common = [longest(said, r) for r in true]
        p, r = max(c/len(said) for c in common), max(c/len(t) for c, t in zip(common, true))
        return (1 + 1.2**2)*p*r/(r + 1.2**2*p) if p and r else 0.
    expected = [score(tokenize(s).split(), [tokenize(t).split() for t in refs]) for s, refs in zip(*sentences)]
    assert clip_metrics(*sentences)["rouge_l"] == pytest.approx(expected)


def test_cider_is_vedantam_s_formula(sentences):
    def grams(text, n): return Counter(zip(*(text.split()[i:] for i in range(n))))
    said, true = [tokenize(p) for p in sentences[0]], [[tokenize(r) for r in refs] for refs in sentences[1]]
    def vector(text, n, seen): return {g: c*(math.log(len(said)) - math.log(max(1, seen[g]))) for g, c in grams(text, n).items()}
    total = np.zeros(len(said))
    for n in range(1, 5):
        seen = Counter(g for refs in true for g in {g for r in refs for g in grams(r, n)})
        for i, (s, refs) in enumerate(zip(said, true)):
            a = vector(s, n, seen)
            for r in refs:
                b = vector(r, n, seen)
                dot = sum(min(v, b.get(g, 0.))*b.get(g, 0.) for g, v in a.items())
                size = math.sqrt(sum(v*v for v in a.values())*sum(v*v for v in b.values()))
                total[i] += 10/4/len(refs)*(dot/size if size else 0.)*math.exp(-(len(s.split()) - len(r.split()))**2/72)
    assert clip_metrics(*sentences)["cider"] == pytest.approx(total)


@pytest.mark.parametrize("lang, tokens", [("en", "13a"), ("zh", "zh"), ("ar", "13a")])
def test_sacre_metrics_are_sacrebleu_s_own_numbers(lang, tokens):
    said = {"en": ["The red disc hops.", "A bar"], "zh": ["红色的圆盘跳起来。", "蓝条"], "ar": ["قرص أحمر يقفز", "شريط"]}[lang]
    true = {"en": ["The red disc jumps.", "A blue bar"], "zh": ["红色圆盘跳起来。", "蓝色的条"], "ar": ["قرص أحمر يقفز.", "شريط أزرق"]}[lang]
    ours = sacre_metrics(said, [[t] for t in true], lang)
    assert ours["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [true], tokenize=tokens).score)
    assert ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [true]).score)


@JAVA
def test_meteor_scores_an_empty_prediction_zero_and_equal_words_high():
    true = [["a man riding a wave"], ["the red disc hops"], ["the blue bar"]]
    each = clip_metrics(["a man rides a wave", "", "the blue bar"], true, tokenizer="ptb", meteor=True)["meteor"]
    assert each[1] == 0 and each[2] == pytest.approx(1, abs=.01) and .5 < each[0] < 1           # `rides` by its stem


@JAVA
def test_our_words_are_those_of_the_ptb_tokenizer_on_the_grammar_s_captions(sentences):
    assert ptb_tokenize(sentences[0]) == [tokenize(s) for s in sentences[0]]


@JAVA
def test_the_ptb_tokenizer_keeps_one_line_per_caption_whatever_is_in_it():
    assert ptb_tokenize(["a\nb", "", "c\r\u2028d", "قرص أحمر"]) == ["a b", "", "c d", "قرص أحمر"]


def test_without_java_meteor_and_ptb_are_errors_that_say_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for options in (dict(meteor=True), dict(tokenizer="ptb")):
        with pytest.raises(InputError, match="needs Java.*install a Java runtime"): caption_metrics(["a b"], [["a b"]], **options)


def test_meteor_exact_finds_the_alignment_with_most_matches_and_fewest_chunks():
    def brute(said, true):
        best = (0, 0)
        for picks in itertools.product(*([None, *(j for j, t in enumerate(true) if t == w)] for w in said)):
            used = [j for j in picks if j is not None]
            if len(set(used)) < len(used): continue
            chunks = sum(j is not None and (i == 0 or picks[i - 1] is None or j != picks[i - 1] + 1) for i, j in enumerate(picks))
            best = min(best, (-len(used), chunks))
        return -best[0], best[1]
    rng = np.random.default_rng(0)
    for _ in range(60):
        said, true = ([str(w) for w in rng.choice(list("abc"), int(n))] for n in rng.integers(1, 7, 2))
        assert align(said, true) == brute(said, true)


def test_meteor_exact_is_a_name_of_its_own_and_needs_no_java(monkeypatch, example):
    monkeypatch.setenv("PATH", "/nowhere")
    assert np.mean(meteor_exact(*example)) == pytest.approx(.376, abs=.001)                  # METEOR 1.5 has .195: another scale
    assert "meteor" not in caption_metrics(*(part[:20] for part in example))


def of_java(names):
    "Those of metric names whose score only Java gives: METEOR, by any name but that of its exact stage."
    return [n for n in names if "meteor" in n and n.partition(".")[2] != "meteor_exact"]


def test_no_committed_result_holds_a_score_that_needs_java():
    assert of_java(["test.exact", "test.meteor", "ood.meteor_exact", "meteor_exact", "test.meteor_exact_stems"]) == ["test.meteor", "meteor_exact", "test.meteor_exact_stems"]
    records = [json.loads(p.read_text()) for p in sorted((ROOT/"results").glob("*/*.json"))]
    assert records and not of_java(m for r in records for m in r["metrics"])


def test_what_a_run_says_of_its_captions_needs_no_java(monkeypatch, sentences):
    monkeypatch.setenv("PATH", "/nowhere")
    per_clip, whole = caption_scores(*sentences)
    assert per_clip["meteor_exact"] == pytest.approx(meteor_exact(*sentences)) and 0 < per_clip["meteor_exact"].mean() < 1
    assert not of_java(f"test.{n}" for n in (*per_clip, *whole))


def test_empty_predictions_count_as_wrong():
    half = caption_metrics(["a red disc hops", ""], [["a red disc hops"]]*2)
    full = caption_metrics(["a red disc hops"]*2, [["a red disc hops"]]*2)
    assert half["rouge_l"] == pytest.approx(full["rouge_l"]/2) and half["bleu1"] < full["bleu1"]
    assert all(values[1] == 0 for values in clip_metrics(["a red disc", " "], [["a red disc"], ["a bar"]]).values())
    assert vqa_accuracy(["", " ", "."], [["a"], ["the"], ["."]]).tolist() == [0, 0, 1]


def test_a_clip_without_references_is_named():
    with pytest.raises(InputError, match="references of clip 1"): caption_metrics(["a", "b"], [["a"], []])
    with pytest.raises(InputError, match="a clip has none"): sacre_metrics(["a", "b"], [["a"], []])


def test_scripts_without_blanks_right_to_left_and_marks_are_tokenized():
    assert tokenize("红色的圆盘，跳！") == "红 色 的 圆 盘 跳"
    assert tokenize("赤いディスク2個") == "赤 い デ ィ ス ク 2 個"
    assert tokenize("\u202bالقُرْص الأحمر\u202c، يقفز؟") == "القُرْص الأحمر يقفز"
    assert tokenize("लाल चक्र कूदता है।") == "लाल चक्र कूदता है"                     # vowel signs stay with their letters
    assert caption_metrics(["القرص الأحمر يقفز عاليا"], [["القرص الأحمر يقفز عاليا"]])["bleu4"] == pytest.approx(1)
    assert caption_metrics(["红色的圆盘"], [["红色圆盘"]])["bleu1"] == pytest.approx(4/5)


# Answers

@pytest.mark.parametrize("answer, clean", [
    ("The red disc.", "red disc"), ("two", "2"), ("none", "0"), ("10,000", "10000"), ("1.5", "1.5"), ("dont know", "don't know"), ("x-ray", "x ray"),
    ("yes , no", "yes no"), ("a", ""), ("５个", "5个")])
def test_answers_are_cleaned_like_those_of_vqa(answer, clean):
    assert normalize_answer(answer) == clean


def test_vqa_accuracy_of_ten_answers_is_the_published_formula():
    def expected(equal): return np.mean([min(1, (equal - mine)/3) for mine in [1]*equal + [0]*(10 - equal)])
    for equal in range(11):
        assert vqa_accuracy(["red"], [["red"]*equal + ["blue"]*(10 - equal)])[0] == pytest.approx(expected(equal))


# Retrieval: torchmetrics, ties

def theirs(function, scores, relevant, **options):
    return np.array([function(torch.tensor(s), torch.tensor(r), **options) for s, r in zip(scores, relevant)])


@pytest.mark.parametrize("several", (False, True), ids=("one right", "several right"))
@pytest.mark.parametrize("ties", (False, True), ids=("no ties", "ties"))
def test_retrieval_is_torchmetrics_with_ties_broken_against_us(several, ties):
    rng = np.random.default_rng(1)
    scores = 1 + (rng.integers(0, 4, (60, 17)).astype(float) if ties else rng.random((60, 17)))
    relevant = rng.random((60, 17)) < .2 if several else np.zeros((60, 17), bool)
    relevant[np.arange(60), rng.integers(0, 17, 60)] = True
    lowered = scores - (1e-3 if ties else 0)*relevant                    # torchmetrics sees the right ones just below their equals
    ours = query_scores(scores, relevant, depths=(1, 5))
    assert ours["ap"] == pytest.approx(theirs(retrieval_average_precision, lowered, relevant), abs=1e-6)
    assert 1/ours["rank"] == pytest.approx(theirs(retrieval_reciprocal_rank, lowered, relevant), abs=1e-6)
    assert ours["ndcg"] == pytest.approx(theirs(retrieval_normalized_dcg, lowered, relevant.astype(int)), abs=1e-6)
    for k in (1, 5): assert ours[f"r{k}"] == pytest.approx(theirs(retrieval_hit_rate, lowered, relevant, top_k=k))


def test_graded_ndcg_is_torchmetrics():
    rng = np.random.default_rng(2)
    scores, gains = rng.random((40, 9)), rng.integers(0, 4, (40, 9))
    gains[:, 0] += 1
    for k in (None, 3): assert ndcg(scores, gains, k) == pytest.approx(theirs(retrieval_normalized_dcg, scores, gains, top_k=k), abs=1e-6)


def test_ties_never_help():
    rng = np.random.default_rng(3)
    scores, relevant = rng.integers(0, 3, (50, 12)).astype(float), np.eye(12, dtype=bool)[rng.integers(0, 12, 50)]
    broken = scores + 1e-6*rng.random(scores.shape)
    assert (first_ranks(scores, relevant) >= first_ranks(broken, relevant)).all()
    assert (average_precision(scores, relevant) <= average_precision(broken, relevant) + 1e-12).all()
    assert first_ranks(np.zeros((3, 7)), np.eye(3, 7, dtype=bool)).tolist() == [7, 7, 7]


def test_a_square_gallery_gives_the_ranks_of_the_metrics_room():
    scores = np.random.default_rng(4).integers(0, 5, (8, 8)).astype(float)
    each = both_ways(scores, np.arange(8))
    assert each["v2t"]["rank"].tolist() == ranks(scores[None], 2)[0].tolist() and each["t2v"]["rank"].tolist() == ranks(scores[None], 1)[0].tolist()


def test_several_captions_per_video_and_rectangular_galleries():
    owner = np.array([0, 0, 1, 1, 1, 2])
    perfect = (owner[None] == np.arange(4)[:, None]).astype(float)
    with pytest.raises(InputError, match="query 3 has no right candidate"): retrieval_metrics(perfect, owner)     # a video without a caption
    found = retrieval_metrics(perfect[:3], owner)
    assert all(found[f"{d}_{m}"]["value"] == 1 for d in ("v2t", "t2v") for m in ("r1", "r5", "r10", "medr", "meanr", "map", "ndcg"))
    assert (found["v2t_map"]["n"], found["t2v_map"]["n"]) == (3, 6)


# Intervals and tests

def test_the_permutation_test_keeps_its_level_with_clips_in_galleries():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), 8)
    def p(): return paired_permutation(*(np.repeat(rng.normal(size=30), 8) + .1*rng.normal(size=240) for _ in range(2)), groups, n=300)
    assert np.mean([p() < .05 for _ in range(200)]) < .09
    alone = [paired_permutation(*(np.repeat(rng.normal(size=30), 8) for _ in range(2)), n=300) < .05 for _ in range(60)]
    assert np.mean(alone) > .2                                             # clips taken as independent: far too many


def test_the_permutation_test_is_exact_where_all_signs_can_be_listed():
    a, b = np.array([1., 2, 4, 8, 3, 1]), np.zeros(6)
    assert paired_permutation(a, b, n=40000) == pytest.approx(2/2**6, abs=.004)


def test_holm_is_never_below_p_and_keeps_the_order():
    p = {f"c{i}": v for i, v in enumerate(np.random.default_rng(6).random(12)**3)}
    adjusted = holm(p)
    assert all(p[k] <= adjusted[k] <= 1 for k in p)
    assert sorted(p, key=p.get) == sorted(adjusted, key=lambda k: (adjusted[k], p[k]))
    assert holm({"a": .01, "b": .01})["a"] == pytest.approx(.02)


def test_effect_sizes_by_hand():
    assert cohens_d([1, 2, 3], [0, 2, 1]) == pytest.approx(1/1)
    assert cliffs_delta([1, 2, 3], [0, 2, 1]) == pytest.approx((6 - 1)/9)
    assert math.isnan(cohens_d([1, 1], [1, 1])) and cliffs_delta([1, 1], [1, 1]) == 0


def test_a_family_is_corrected_and_leaves_out_what_is_nan():
    rng = np.random.default_rng(7)
    a = rng.random((3, 80)); b = a - .05*rng.random((3, 80)); b[:, :10] = np.nan
    rows = compare_family({"x": (a, b), "y": (a, a)}, np.arange(80)//4)
    assert rows["x"]["n"] == 70 and rows["x"]["padj"] == pytest.approx(2*rows["x"]["p"]) and rows["y"]["padj"] == 1
    assert compare_scores(a, a[:, ::-1].mean(0))["low"] < 0 < compare_scores(a, a[:, ::-1].mean(0))["high"]


def test_the_interval_of_a_whole_set_score_resamples_galleries():
    rng = np.random.default_rng(8)
    values, groups = np.repeat(rng.random(40), 5), np.repeat(np.arange(40), 5)
    wide, narrow = (np.diff(bootstrap_statistic(lambda i: values[i].mean(), 200, g, n=300))[0] for g in (groups, None))
    assert wide > 1.7*narrow
    with pytest.raises(InputError, match="3 for 4 clips"): bootstrap_statistic(np.mean, 4, [0, 1, 2])


def test_order_sensitivity_tells_a_bag_of_frames_from_a_reader_of_order():
    rng = np.random.default_rng(9)
    right = (rng.random((3, 200)) < .9).astype(float)
    assert order_sensitivity(right, right)["drop"] == 0
    assert order_sensitivity(right, rng.permutation(right, axis=1))["p"] > .05
    reader = order_sensitivity(right, right*(rng.random((3, 200)) < .5), np.arange(200)//8)
    assert reader["p"] < .01 and reader["shuffled"] == pytest.approx(reader["in_order"] - reader["drop"])


# Errors

def test_every_wrong_caption_has_a_kind_and_every_right_one_none(sentences):
    said, true = sentences[0] + ["", "…"], [refs[0] for refs in sentences[1]] + ["a red disc"]*2
    for s, t in zip([*said, *true], [*true, *true]): assert bool(error_kinds(s, t)) == (s.split() != t.split())
    counts = error_counts(said, true)
    assert counts["n"] == 62 and counts["empty"] == 1 and counts["malformed"] >= 1
    assert counts["right"] + len({i for i, (s, t) in enumerate(zip(said, true)) if error_kinds(s, t)}) == 62


def test_the_hard_negatives_of_a_gallery_are_told_apart_by_kind():
    straight, order, verbs, both = [scene.caption for scene in quartet(np.random.default_rng(3))]
    assert [error_kinds(c, straight) for c in (straight, order, verbs, both)] == [[], ["order"], ["binding"], ["order", "binding"]]
