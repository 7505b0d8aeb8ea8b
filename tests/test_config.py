"params.yaml: what is wrong in it is one line that names file, field and fix."
import pytest
import yaml
from conftest import ROOT

from mmqlora.config import load_params, run_config
from mmqlora.core import InputError

PARAMS = yaml.safe_load((ROOT/"params.yaml").read_text())


def load_changed(tmp_path, change):
    "Load params.yaml after `change(params)`."
    params = yaml.safe_load((ROOT/"params.yaml").read_text())
    change(params)
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(params))
    return load_params(tmp_path/"params.yaml")


def test_the_file_of_this_repository_holds():
    params = load_params(ROOT/"params.yaml")
    assert params.profile == "cpu" and {"zeroshot", "full", "lora", "qlora", "tqlora"} <= set(params.runs)


@pytest.mark.parametrize("change, message", [
    (lambda p: p.update(profile="cup"), "params.yaml: profile: unknown profile 'cup' -- did you mean 'cpu'?"),
    (lambda p: p.update(profiel="cpu"), "params.yaml: profiel: unknown key -- did you mean 'profile'?"),
    (lambda p: p.update(framse=p.pop("frames")), "params.yaml: framse: unknown key -- did you mean 'frames'?"),
    (lambda p: p["runs"]["qlora"].update(rnaks={}), "params.yaml: runs.qlora: rnaks: unknown key -- did you mean 'ranks'?"),
    (lambda p: p["runs"]["qlora"].update(lr="fast"), "params.yaml: runs.qlora: lr: Input should be a valid number"),
    (lambda p: p["runs"]["qlora"].update(ranks={"smell": 4}), "params.yaml: runs.qlora: ranks.smell"),
    (lambda p: p["runs"]["qlora"].update(ranks={"text": 0}), "all ranks are 0: nothing would be trained"),
    (lambda p: p["runs"]["full"].update(gate="rank"), "a gate needs lora or qlora, not full"),
    (lambda p: p["frames"].update(selectors=["uniform"], sets={}), "is not in frames.selectors"),
    (lambda p: p["frames"].update(selectors=["uniform"]), "params.yaml: frames: Value error, sets.entropy: not in selectors, so nothing would be prepared for it; add 'entropy'"),
    (lambda p: p["profiles"]["gpu"]["frames"].update(sets={"adaptive": [4]}) or p.update(profile="gpu"), "params.yaml: profiles.gpu: FramesConfig: Value error, sets.adaptive: not in selectors"),
    (lambda p: p["corpus"].pop("root"), "params.yaml: corpus.root: Field required"),
])
def test_a_wrong_value_is_named_with_its_place(tmp_path, change, message):
    with pytest.raises(InputError) as err: load_changed(tmp_path, change)
    assert message in str(err.value) and "\n" not in str(err.value)


def test_an_unknown_run_names_the_nearest_one():
    with pytest.raises(InputError, match="unknown run 'qlroa' -- did you mean 'qlora'"): run_config(load_params(), "qlroa")


@pytest.mark.parametrize("name", PARAMS["runs"])
def test_a_run_lists_only_what_differs_from_the_defaults(name):
    assert not {k for k, v in PARAMS["runs"][name].items() if PARAMS["defaults"].get(k) == v}


def test_a_profile_caps_steps_and_seeds(tmp_path):
    smoke = load_changed(tmp_path, lambda p: p.update(profile="smoke"))
    assert all(run_config(smoke, r).steps <= 8 and len(run_config(smoke, r).seeds) == 1 for r in smoke.runs)


def test_tuning_never_uses_a_seed_that_is_reported():
    params = load_params()
    assert params.tune.seed not in {s for r in params.runs for s in run_config(params, r).seeds}
