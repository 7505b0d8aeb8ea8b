"What several tests share: where things are, a small real corpus, a short run."
import sys
from pathlib import Path

import pytest

from mmqlora.config import CorpusConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
from deps import code_cells


def notebooks(folder=""):
    "Notebooks directly in nbs/`folder`, in order."
    return sorted((ROOT/"nbs"/folder).glob("*.ipynb"))


def rooms():
    "Module names of the exporting notebooks, in the order of the house."
    named = (s.split("#| default_exp ")[1].split()[0] for p in notebooks() for s, _ in code_cells(p) if "#| default_exp" in s)
    return list(named)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "(folder, records) of a small MMEvents: 16 training clips, a gallery of 8 in each other split."
    from mmqlora.mmevents import build_mmevents
    root = tmp_path_factory.mktemp("corpus")
    config = CorpusConfig(name="mmevents", root="-", clips={"train": 16, "dev": 8, "test": 8, "ood": 8})
    return root, build_mmevents(root, config, workers=1)


@pytest.fixture(scope="session")
def training(corpus):
    "(clips, captions) of the 16 training clips, as the model sees them."
    from mmqlora.prepare import load_videos
    root, records = corpus
    train = [r for r in records if r.split == "train"]
    return load_videos([root/r.video for r in train]), [r.captions["en"][0] for r in train]


@pytest.fixture
def short():
    "A QLoRA run of a few steps."
    return RunConfig(method="qlora", ranks={"vision": 4, "fusion": 4, "text": 4}, steps=6, batch_size=4, warmup=2)
