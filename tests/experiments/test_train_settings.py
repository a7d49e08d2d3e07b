"""Settings of train_lm that cannot be, or that nothing would read: one sentence each, at once."""

import jax
import pytest

from lminf.errors import InputError
from lminf.experiments import _training, train_lm
from lminf.parallel.distributed import Distributed
from lminf.run import folder, request
from tests.experiments.test_train_lm import settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mesh.fsdp=3", "does not divide 8 devices"),
        ("schedule=cosin:peak=1", "no schedule is called 'cosin'"),
        ("strategy=zero4", "did you mean 'zero"),
        ("remat=dot", "did you mean 'dots'"),
        ("mesh.tensor=2", "the strategy divides nothing over tensor"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(change, message):
    asked = request.parse("train_lm", ["--config=train_lm:tiny", f"--config.{change}"])
    with pytest.raises(InputError, match=message):
        _training.program_of(asked.config, _training.shape_to_plan(asked.config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=0", "--config.steps=0: give a .* at least 1"),
        ("checkpoint.every=0", "--config.checkpoint.every=0: give a .* at least 1"),
        ("data.batch=0", "--config.data.batch=0: give a .* at least 1"),
        ("not_finite=warn", "there is no not_finite 'warn'; use stop, skip"),
        ("experts.top_k=9", "top_k=9 of 2 experts"),
        ("init=smollm2-135m-instruct", "models with experts are neither read nor written"),
        ("export=README.md", "README.md exists and is not an empty folder"),
        ("model.num_heads=3", "num_heads=3 is no multiple of num_kv_heads=2"),
        ("profile=(5,)", "give the first and the last step to trace"),
        ("profile=('a','b')", "give the first and the last step to trace"),
        ("profile=(-1,1)", "give the first and the last step to trace"),
        ("data.path=,", "no store or file is named"),
        ("attention=snapkv:capacity=8,window=2", "acts at the end of a prompt, and training has"),
        ("checkpoint.folder=gs://nope/z", "needs a package that is not installed|gs://nope"),
        ("evaluate.sample=-5", "--config.evaluate.sample=-5: give a .* at least 0"),
        ("export=/proc/none/model", "cannot write /proc/.*; name another folder"),
        ("lora=lora:rank=4", "lora=lora:rank=4: adapters are of a model that is there already"),
        ("steps=19", "the schedule's warmup=20 is more than the 19 steps of the run"),
        ("schedule=wsd:peak=1,floor=0,warmup=9,decay=192", "warmup=9 . decay=192 is more than"),
        ("schedule=cosine:peak=1e-4,floor=1e-3,warmup=1", "floor is 0.001, above Cosine.peak=0"),
        ("schedule=rewarm:peak=1,floor=0,starts=(200,)", "run ends after 200 steps, before the"),
        ("profile=(190,201)", "give the first and the last step to trace, of the 200"),
        ("processes.index=1", "index=1 and .* count=1: this process is alone"),
        (
            "data.transforms=untie_the_knots:end_id=256,knot_ids=(248,249,250,257)",
            "writes the token 257, which the vocabulary of 257 tokens lacks",
        ),
        ("data.transforms=per_seqence", "no transform is called 'per_seqence'; did you mean"),
        ("stages=('tokens=9,length=4,batch=2',)", "lacks schedule; stage"),
        (
            "stages=('tokens=9,length=4,batch=2,schedule=(constant:peak=1),plan=(concot)',)",
            "no data plan is called 'concot'; did you mean 'concat'",
        ),
        ("stages=('tokens=9,length=1,batch=2,schedule=(constant:peak=1)',)", "Stage.length is 1"),
    ],
)
def test_settings_that_would_fail_later_are_refused_at_once(change, message, tmp_path):
    mixture = ["--config.experts.count=2"] if "experts" in message else []

    def start():
        words = ["--config=train_lm:tiny", *mixture, f"--config.{change}"]
        return next(train_lm.run(request.parse("train_lm", words).config, tmp_out))

    tmp_out = folder.RunFolder(tmp_path)
    with pytest.raises(InputError, match=message):
        start()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("init=m model.width=64", "config.model.width: the model of init=m has its own"),
        ("init=m data.tokenizer=n", "config.data.tokenizer: the model of init=m has its own"),
        ("experts.top_k=2", "config.experts.top_k: there are no experts; give their number"),
        ("experts.count=2 experts.dense_layers=4", "dense_layers=4 of 4 layers: no layer is left"),
        ("experts.count=2 experts.router=expert_choice", "experts that choose see later tokens"),
        ("experts.count=2 experts.router=hsh", "no router is called 'hsh'; did you mean 'hash'"),
        ("processes.count=2 processes.index=2 processes.coordinator=a:1", "index=2 of count=2"),
        (
            "stages=('tokens=9,length=4,batch=2,schedule=(constant:peak=1)',) steps=5",
            "config.steps: each of the stages has its own",
        ),
        ("processes.count=2", "at coordinator=''; give every process its own index"),
        ("processes.count=0 processes.index=1", "the cluster says who takes part"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(words, message):
    given = [f"--config.{word}" for word in words.split()]
    asked = request.parse("train_lm", ["--config=train_lm:tiny", *given])
    with pytest.raises(InputError, match=message):
        train_lm.check(asked.config, asked.overrides)


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=r"none is recognised here \(coordinator_address should"):
        Distributed(count=0).join()


def test_what_another_length_does_to_the_schedule_is_said():
    cosine, constant = settings("steps=400"), settings("steps=400", "schedule=constant:peak=1e-3")
    assert "from 0.0003 to" in _training.rates_moved(cosine, 200, 200)
    assert _training.rates_moved(constant, 200, 200) is None
    stable = settings("steps=400", "schedule=wsd:peak=1e-3,floor=1e-4,warmup=10,decay=50")
    assert _training.rates_moved(stable, 200, 150) is None  # the decay had not begun
    assert _training.rates_moved(stable, 200, 200)


def test_an_export_into_the_folder_of_checkpoints_is_refused():
    both = ("checkpoint.folder=somewhere", "export=somewhere")
    with pytest.raises(InputError, match="is also the folder of the checkpoints"):
        _training.check(settings(*both))


def test_the_config_of_another_experiment_is_refused():
    with pytest.raises(
        InputError, match="is the config of the experiment passkey, not of train_lm"
    ):
        request.parse("train_lm", ["--config=passkey:tiny"])
    with pytest.raises(InputError, match=r"config\.policies=\(\): give at least"):
        request.parse("passkey", ["--config=passkey:tiny", "--config.policies=()"])
