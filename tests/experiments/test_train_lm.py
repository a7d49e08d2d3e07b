"""train_lm as a user starts it: killed, stopped, in several processes, and its tiny form."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lminf import checkpoints, cli
from lminf.checkpoints import native
from lminf.data import tokenizing
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.experiments import _training, train_lm
from lminf.run import folder, request
from tests.checkpoints import making
from tests.conftest import EMITTER

SMALL = (
    "--config=train_lm:tiny", "--config.model.width=32", "--config.model.num_layers=2",
    "--config.model.hidden_dim=48", "--config.data.batch=8", "--config.data.length=16",
    "--config.evaluate.batches=1", "--config.evaluate.sample=0", "--config.log_every=1",
)  # fmt: skip


TINY = "python -m experiments.train_lm --config=:tiny --out=runs/mine"


def small(*changes):
    """The words of SMALL with these changed: a field is given once."""
    return list({word.partition("=")[0]: word for word in (*SMALL, *changes)}.values())


def command(out, *changes):
    return [sys.executable, "-m", "experiments.train_lm", *small(*changes), f"--out={out}"]


def environment(devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} {EMITTER}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def finish(out, *changes, devices=1):
    done = subprocess.run(
        command(out, *changes), env=environment(devices), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def losses(out):
    return {row["step"]: row["loss"] for row in folder.RunFolder(out).metrics()}


def wait_for(process, condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_equals_one_that_was_not(tmp_path):
    """Killed twice: between checkpoints, and as soon as a save has begun."""
    steps = ("--config.steps=60", "--config.evaluate.every=30", "--config.checkpoint.every=10")
    finish(tmp_path / "whole", *steps)
    out = tmp_path / "killed"
    checkpoints = out / "checkpoints"
    for moment in (
        lambda: (out / "metrics.jsonl").exists() and max(losses_so_far(out), default=0) >= 14,
        lambda: checkpoints.exists() and any(int(p.name[:8]) >= 40 for p in folders(checkpoints)),
    ):
        process = subprocess.Popen(
            command(out, *steps), env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(process, moment)
        process.kill()
        process.communicate()
    resumed = finish(out, *steps)
    assert "going on from step" in resumed.stderr
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(losses(out)) == list(range(1, 61))
    kept = [
        [(row["part"], row["step"], row["loss"]) for row in folder.RunFolder(path).rows()]
        for path in (out, tmp_path / "whole")
    ]
    assert kept[0] == kept[1]
    before = {name: (out / name).read_text() for name in ("rows.jsonl", "report.md")}
    finish(out, *steps)
    assert {name: (out / name).read_text() for name in before} == before


STAGES = (
    "tokens=4096,length=16,batch=8,schedule=(cosine:peak=3e-3,floor=1e-3,warmup=4)",
    "tokens=4096,length=64,batch=2,schedule=(wsd:peak=1e-3,floor=1e-4,warmup=4,decay=8),"
    "rope_base=1e5,plan=(mixture:weights=(3,1)),"
    "transforms=(untie_the_knots:end_id=256,knot_ids=(248,249,250,251))",
)


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Two stores of the same tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("stores")
    for name, size in (("a", 3), ("b", 40)):
        lines = [json.dumps({"text": f"{name} {i} " * (size + i % 9)}) for i in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        source = [str(folder / f"{name}.jsonl")]
        tokenizing.tokenize(source, ByteTokenizer(), str(folder / name), name="bytes")
    tokenizing.tokenize(source, making.tiny_tokenizer(), str(folder / "other"), name="tiny")
    return folder


@pytest.mark.slow
def test_a_run_of_stages_that_was_killed_equals_one_that_was_not(tmp_path, two_stores):
    """Rows, data, rates and the rotary base change at step 32 of 64, and the kill is behind it."""
    stages = (
        f"--config.stages={STAGES!r}", "--config.checkpoint.every=10", "--config.evaluate.every=25",
        f"--config.data.path={two_stores}/a,{two_stores}/b",
        "--config.data.plan=mixture:weights=(1,3)", f"--config.export={tmp_path}/model",
    )  # fmt: skip
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(out, *stages), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for(process, lambda: (out / "metrics.jsonl").exists()
             and max(losses_so_far(out), default=0) >= 33)  # fmt: skip
    process.kill()
    process.communicate()
    resumed = finish(out, *stages)
    assert "going on from step" in resumed.stderr
    exported = checkpoints.load(f"{tmp_path}/model")
    assert exported.spec.encoding.base == 1e5
    assert exported.spec.trained_length == 64
    finish(tmp_path / "whole", *stages, "--config.export=")
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(losses(out)) == list(range(1, 65))
    rows = [row for row in folder.RunFolder(out).rows() if row["part"] == "loss"]
    assert [(row["step"], row["tokens"]) for row in rows] == [
        (25, 25 * 128), (32, 4096), (50, 50 * 128), (64, 8192)
    ]  # fmt: skip
    rates = {row["step"]: row["rate"] for row in folder.RunFolder(out).metrics()}
    assert rates[33] == 0  # the second stage warms up again
    assert rates[40] == pytest.approx(1e-3)


@pytest.mark.slow
def test_stores_of_different_tokenizers_are_not_mixed(two_stores):
    c = settings(f"data.path={two_stores}/a,{two_stores}/other", "data.plan=mixture:weights=(1,1)")
    with pytest.raises(InputError, match=r"other was written with the tokenizer tiny"):
        _training.data_of(c, ByteTokenizer(), train_lm.batches.WHOLE, vocab_size=257)


def folders(path):
    return [entry for entry in path.iterdir() if entry.is_dir() and entry.name[:8].isdigit()]


def losses_so_far(out):
    """Steps in metrics.jsonl, whose last line may be half written."""
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_sigterm_saves_and_a_second_run_is_kept_out(tmp_path):
    out, steps = tmp_path / "run", ("--config.steps=100000", "--config.checkpoint.every=100000")
    process = subprocess.Popen(
        command(out, *steps, "--config.evaluate.every=100000"), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(process, lambda: (out / "metrics.jsonl").exists())
    other = subprocess.run(
        command(out, *steps, "--config.evaluate.every=100000"), env=environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert other.returncode == 2
    assert f"is in use by process {process.pid} on {socket.gethostname()}" in other.stderr
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "the same command goes on from there" in said
    saved = [entry.name for entry in folders(out / "checkpoints")]
    assert int(saved[0]) == max(losses(out))


def two_processes(out, *changes):
    """Both started, of four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            command(
                out, *changes, "--config.processes.count=2", f"--config.processes.index={index}",
                f"--config.processes.coordinator=localhost:{port}",
            ),
            env=environment(4), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    """Losses, and the checkpoint that one process then goes on from."""
    changes = (
        "--config.steps=6", "--config.evaluate.every=6", "--config.strategy=zero3",
        "--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.evaluate.sample=4",
        "--config.schedule=constant:peak=3e-3",
    )  # fmt: skip
    finish(tmp_path / "one", *changes, devices=8)
    for process in two_processes(tmp_path / "two", *changes):
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == sorted(two) == list(range(1, 7))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-6


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    both = two_processes(tmp_path / "run", "--config.steps=100000", "--config.strategy=zero3",
                         "--config.mesh.data=1", "--config.mesh.fsdp=8",
                         "--config.evaluate.every=100000",
                         "--config.checkpoint.every=100000")  # fmt: skip
    wait_for(both[0], lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], said
    assert "the same command goes on from there" in said[0]
    saved = [entry.name for entry in folders(tmp_path / "run" / "checkpoints")]
    assert int(saved[0]) == max(losses(tmp_path / "run"))


@pytest.mark.slow
def test_a_mixture_of_experts_trains_over_their_axis_and_writes(tmp_path):
    changes = (
        "--config.experts.count=4", "--config.experts.hidden_dim=16", "--config.steps=3",
        "--config.mesh.data=2", "--config.mesh.expert=2", "--config.strategy=expert",
        "--config.evaluate.sample=4", "--config.schedule=constant:peak=3e-3",
    )  # fmt: skip
    finish(tmp_path / "run", *changes, devices=4)
    out = folder.RunFolder(tmp_path / "run")
    assert all(row["router_balance"] > 0.5 for row in out.metrics())
    assert any(row["part"] == "sample" for row in out.rows())


@pytest.fixture
def small_model(tmp_path):
    """A folder in Hugging Face's format with a tokenizer, not trained."""
    shape = dataclasses.replace(making.BASE, vocab_size=272)
    params, tokenizer = making.random_params(shape), making.tiny_tokenizer()
    checkpoints.save(
        tmp_path / "model", checkpoints.Checkpoint(shape, params, tokenizer, "made here")
    )
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", "lora:rank=4"])
def test_a_model_is_trained_further_and_written_back(lora, small_model, tmp_path):
    out = folder.RunFolder(tmp_path / "run")
    out.path.mkdir()
    changes = [
        f"--config.init={small_model}", f"--config.export={tmp_path / 'new'}",
        f"--config.lora={lora}", "--config.steps=20", "--config.evaluate.every=10",
        "--config.schedule=constant:peak=1e-2", "--config.mesh.data=1", "--config.mesh.fsdp=8",
        "--config.strategy=zero3",
    ]  # fmt: skip
    config = request.parse("train_lm", small(*changes)).config
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = list(train_lm.run(config, out))
        for row in rows:
            out.append_row(row)
        assert list(train_lm.run(config, out)) == []  # all is done, and the export is there
    found = [row["loss"] for row in rows if row["part"] == "loss"]
    written, before = checkpoints.load(tmp_path / "new"), checkpoints.load(small_model)
    assert written.spec == before.spec
    assert written.tokenizer.digest == before.tokenizer.digest
    changed = np.abs(
        written.params["layers"]["mlp"]["w_up"] - before.params["layers"]["mlp"]["w_up"]
    )
    assert changed.max() > 1e-4
    assert (written.params["embed"] == before.params["embed"]).all() == bool(lora)
    assert found[1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_loss_that_is_not_finite_stops_or_is_counted(choice, tmp_path):
    out = folder.RunFolder(tmp_path / "run")
    out.path.mkdir()
    changes = [
        "--config.schedule=constant:peak=1e38", "--config.steps=4", "--config.evaluate.every=4",
        f"--config.not_finite={choice}", "--config.optimizer=adamw:weight_decay=0.0",
    ]  # fmt: skip
    config = request.parse("train_lm", small(*changes)).config
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if choice == "stop":
            with pytest.raises(InputError, match=r"the loss of step 1 is .*not_finite=skip"):
                list(train_lm.run(config, out))
        else:
            list(train_lm.run(config, out))
            assert out.metrics()[-1]["skipped"] == 3
            assert out.metrics()[-1]["grad_norm"] is None


@pytest.mark.slow
def test_the_tiny_form_reaches_its_loss(tmp_path):
    """As the page about training runs it. Seen: 2.00 bits per byte."""
    done = subprocess.run(
        [sys.executable, *TINY.split()[1:]], cwd=tmp_path,
        env={**environment(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    run = folder.RunFolder(tmp_path / "runs/mine")
    last = [row for row in run.rows() if row["part"] == "loss"][-1]
    assert last["step"] == 200
    assert 1.9 < last["bits_per_byte"] < 2.1
    assert any(row["part"] == "sample" for row in run.rows())
    assert (run / "plots" / "train_lm.png").exists()
    assert (run / "plots" / "by_position.png").exists()


def test_a_folder_goes_on_only_with_the_same_settings(tmp_path):
    def start(steps):
        return folder.create(
            "demo", variant="", config={"steps": steps, "data": {"batch": 8}}, config_source="",
            overrides={}, command=["demo"], at=tmp_path, resume=True,
        )  # fmt: skip

    out = start(100)
    for step in (1, 2, 3):
        out.append_metrics(step, {"loss": 0.5})
        out.append_row({"step": step, "part": "loss"})
    again = start(100)
    again.keep_until(2)
    assert [row["step"] for row in again.metrics()] == [1, 2]
    assert [row["step"] for row in again.rows()] == [1, 2]
    with pytest.raises(InputError, match="holds a run with steps=100, not 200"):
        start(200)


def test_a_plan_of_a_run_agrees_with_zeros_formula(capsys):
    words = [
        "plan",
        "--config=train_lm:125m",
        "--devices=h100x8",
        "--override=data.tokenizer=bytes",
    ]
    cli.main([*words, "--json"])
    plan = json.loads(capsys.readouterr().out)
    held = plan["params_bytes"] + plan["grads_bytes"] + plan["optimizer_bytes"]
    assert held == pytest.approx(16 * plan["parameters"] / 8, rel=0.02)
    assert plan["fits"]
    assert plan["flops"] == pytest.approx(plan["hours"] * 3600 * 8 * 989e12 * 0.4)
    assert {row["parameter"] for row in plan["sharding"]} >= {"embed", "layers/attention/wq"}
    with pytest.raises(SystemExit):
        cli.main([*words[:2], "--devices=h1000x8"])
    assert "did you mean 'h100'" in capsys.readouterr().err


# --- Whose folder of checkpoints it is ------------------------------------------------------------


def settings(*changes):
    return request.parse("train_lm", small(*(f"--config.{one}" for one in changes))).config


def own(tmp_path, *changes, needed=0):
    store = native.Store(str(tmp_path / "checkpoints"), last=1)
    c = settings(*changes)
    return train_lm.checkpoint_folder(store, c, steps=c.steps, needed=needed)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("seed=1", "seed=0, not 1"),
        ("schedule=constant:peak=1e-3", "schedule='cosine:.*', not 'constant:peak=1e-3'"),
        ("optimizer=muon", "optimizer='adamw:.*', not 'muon'"),
        ("model.width=64", "model.width=32, not 64"),
        ("data.batch=4", "data.batch=8, not 4"),
        ("clip=2.0", "clip=1.0, not 2.0"),
    ],
)
def test_checkpoints_of_another_run_are_refused_with_both_settings_named(
    change, difference, tmp_path
):
    with own(tmp_path):
        pass
    written = (tmp_path / "checkpoints" / "run.json").read_text()
    with (
        pytest.raises(InputError, match=f"holds checkpoints of a run with {difference}; give"),
        own(tmp_path, change),
    ):
        pass
    assert (tmp_path / "checkpoints" / "run.json").read_text() == written


@pytest.mark.parametrize(
    "change", ["mesh.fsdp=4", "steps=400", "strategy=zero3", "remat=full", "evaluate.sample=3"]
)
def test_checkpoints_go_on_on_another_mesh_and_for_longer(change, tmp_path):
    with own(tmp_path):
        pass
    with own(tmp_path, change) as before:
        assert before == 200


def test_a_second_run_in_a_folder_of_checkpoints_is_refused(tmp_path):
    with (
        own(tmp_path),
        pytest.raises(InputError, match=r"in use by process .*checkpoint\.folder"),
        own(tmp_path),
    ):
        pass


def test_a_folder_of_checkpoints_with_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "checkpoints" / "photos").mkdir(parents=True)
    with pytest.raises(InputError, match="holds photos, which is no checkpoint"), own(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["photos"]


def test_a_disk_without_room_for_the_state_is_found_before_the_first_step(tmp_path):
    with (
        pytest.raises(InputError, match=r"needs \d+ MiB and its disk has \d+ MiB free"),
        own(tmp_path, needed=1 << 60),
    ):
        pass
    assert not (tmp_path / "checkpoints").exists()


def test_a_finished_run_is_not_reported_in_a_folder_without_its_losses(tmp_path):
    c, store = settings(), native.Store(str(tmp_path / "checkpoints"), last=1)
    out = folder.RunFolder(tmp_path)
    with pytest.raises(InputError, match=r"holds all 6 steps of this run, but .* none of its loss"):
        train_lm.check_rows(out, store, 6, 6)
    train_lm.check_rows(out, store, 5, 6)
    out.append_row({"part": "loss", "step": 6})
    train_lm.check_rows(out, store, 6, 6)
    out.append_row({"part": "loss", "step": "six"})
    with pytest.raises(InputError, match="rows without a whole number of steps"):
        train_lm.finished(c, out, 6)


@pytest.mark.slow
def test_a_pipeline_trains_and_evaluates_as_one_device_does(tmp_path):
    found = {}
    for name, mesh in (("alone", ("stage=1",)), ("piped", ("stage=4", "data=1"))):
        words = small(
            "--config.model.num_layers=4", "--config.steps=3", "--config.evaluate.every=3",
            "--config.schedule=constant:peak=1e-3", "--config.data.batch=16",
            *(f"--config.mesh.{size}" for size in mesh),
            *(["--config.pipeline=1f1b:vocab=one_barrier"] if name == "piped" else ()),
        )  # fmt: skip
        out = folder.RunFolder(tmp_path / name)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            rows = list(train_lm.run(request.parse("train_lm", words).config, out))
        found[name] = [row["loss"] for row in rows] + list(losses(tmp_path / name).values())
    assert len(found["piped"]) > 3
    np.testing.assert_allclose(found["piped"], found["alone"], atol=1e-4)
