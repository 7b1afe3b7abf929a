"""Nothing lost: what a kill, a signal, damage, a failure or a second run costs a run."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from multiprocessing import Event

import pytest
import torch

from tests.cli.runs import train_arguments, write_photos
from tests.cli.test_train import CHECKPOINTS, FILES, interrupt_at, last_state, metrics
from vimamba.cli import main
from vimamba.data.samples import FileSamples
from vimamba.processes import cores
from vimamba.tasks import signals
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.run_folder import RunFolder
from vimamba.tasks.task import Task

LAST, PREVIOUS, BEST = (f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))


def at_step(monkeypatch, step, do):
    """Do something while a step (counted from 0) is computed."""
    original, steps = ClassificationTask.training_step, iter(range(1000))

    def training_step(self, batch, batch_idx):
        if next(steps) == step:
            do()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", training_step)


def same_run(run, other):
    one, two = last_state(run), last_state(other)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert metrics(run) == metrics(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "every", "options"),
    [  # 4 steps an epoch
        (3, "2steps", []),  # within the first epoch
        (7, "3 steps", ["--ema", "0.9", "--mixup", "0.5"]),
        (6, "0.00001min", ["--num_workers", "1", "--layer_decay", "0.7"]),
        (6, "1step", ["--accumulate", "2"]),  # each second batch is a step
        (6, "null", []),
    ],
)
def test_what_a_kill_leaves_resumes_to_the_same_result(vimamba, photos, tmp_path, monkeypatch, step, every, options):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--checkpoint_every", every, *options)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: shutil.copytree(whole, cut))
        assert vimamba(*train_arguments(photos, whole, *more))[0] == 0
    steps = torch.load(cut / LAST, weights_only=True)["global_step"]
    assert steps == {"2steps": 2, "3 steps": 6, "0.00001min": 6, "1step": 3, "null": 4}[every]
    assert vimamba("train", "--resume", cut)[0] == 0
    same_run(cut, whole)


@pytest.mark.slow
def test_a_killed_process_releases_its_folder_and_is_resumed(vimamba, photos, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("--checkpoint_every", "2steps", "--num_workers", "1")
    program = """
import sys
from vimamba.cli import main
from vimamba.tasks import signals
from vimamba.tasks.classification import ClassificationTask
original, steps = ClassificationTask.training_step, iter(range(1000))
def training_step(self, batch, batch_idx):
    if next(steps) == 5:
        print("\\nat step 5", flush=True)
        sys.stdin.read()
    return original(self, batch, batch_idx)
ClassificationTask.training_step = training_step
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, *map(str, train_arguments(photos, run, *more))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while (line := process.stdout.readline()) and line != "at step 5\n":
            pass
        for arguments in (train_arguments(photos, run, "--overwrite"), ["train", "--resume", run]):
            status, _, err = vimamba(*arguments)
            assert status == 2
            assert "another run is writing to it" in err
        process.kill()
    assert metrics(run)[0]["epoch"] == "1"
    assert vimamba("train", "--resume", run)[0] == 0
    assert vimamba(*train_arguments(photos, whole))[0] == 0
    same_run(run, whole)
    assert not (run / ".lock").exists()


def start_apart(arguments, start_new_session=False, **environment):
    """A command in a process of its own."""
    command = [sys.executable, "-m", "vimamba", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=start_new_session,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("nodes", "devices", "changes"),
    [(1, 2, "devices 2 -> 1, strategy ddp -> auto"), (2, 1, "strategy ddp -> auto, num_nodes 2 -> 1")],
    ids=["devices", "machines"],
)
def test_two_processes_and_then_one(vimamba, photos, tmp_path, nodes, devices, changes):
    run = tmp_path / "run"
    for path in sorted((photos / "train").rglob("*.png"))[:9]:  # batches without an image, in one process or in both
        path.write_bytes(b"")
    (photos / "val" / "red" / "3.png").unlink()  # an odd number held out: one of the processes has one more
    more = ("--batch_size", 1, "--max_undecodable", 0.9, "--checkpoint_every", "5steps", "--schedule", "constant")
    apart = ("--num_nodes", nodes, "--devices", devices, "--strategy", "ddp")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if nodes > 1 else {}
    started = [
        start_apart(train_arguments(photos, run, *more, *apart), **place, NODE_RANK=str(node)) for node in range(nodes)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * nodes, printed
    assert all((run / name).stat().st_size for name in (*FILES, *CHECKPOINTS))
    assert [(row["epoch"], row["step"]) for row in metrics(run)] == [("1", "12"), ("2", "24")]
    best = max(metrics(run), key=lambda row: float(row["val_top1"]))
    found = json.loads(vimamba("eval", run, "--json")[1])
    assert found["images"] == 11
    assert found["top1"] == pytest.approx(float(best["val_top1"]), abs=1e-5)
    assert found["loss"] == pytest.approx(float(best["val_loss"]), abs=1e-5)
    back = ("--devices", 1, "--num_nodes", 1, "--strategy", "auto")
    status, out, _ = vimamba("train", "--resume", run, *back, "--epochs", 3)
    assert status == 0
    assert changes in out
    assert metrics(run)[2]["step"] == "48"
    (schedule,) = torch.load(run / LAST, weights_only=True)["lr_schedulers"]
    assert schedule["last_epoch"] == 3 * 24  # of one process's steps, as if the run had had them from the first


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_of_schedulers_and_terminals_save(vimamba, photos, tmp_path, monkeypatch, request, name):
    signum = getattr(signal, name)
    inherited = signal.signal(signum, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    request.addfinalizer(lambda: signal.signal(signum, inherited))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signum)]

    def twice():  # schedulers repeat themselves
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)

    at_step(monkeypatch, 2, twice)
    status, out, _ = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert status == 128 + signum
    assert "Stopped at epoch 1, batch 3; everything is saved." in out
    assert (tmp_path / "run" / LAST).is_file()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signum)] == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_saves(vimamba, photos, tmp_path, name):
    run, signum = tmp_path / "run", getattr(signal, name)
    arguments = train_arguments(photos, run, "--num_workers", 2, "--epochs", 100_000)
    with start_apart(arguments, start_new_session=True) as process:
        try:
            while process.poll() is None and not (run / "metrics.csv").exists():
                time.sleep(0.05)
            os.killpg(process.pid, signum)  # the processes that decode among them
            out, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (128 + signum, "")
    assert "; everything is saved. Continue with" in out
    assert vimamba("train", "--resume", run, "--epochs", len(metrics(run)) + 1)[0] == 0


@pytest.mark.parametrize("asked", [True, False])
def test_a_decoding_process_that_was_killed_ends_in_a_sentence(vimamba, photos, tmp_path, monkeypatch, asked):
    def kill():
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(5)  # in which PyTorch learns of it

    at_step(monkeypatch, 2, kill)
    run = tmp_path / "run"
    more = ("--num_workers", 1, "--checkpoint_every", "1step")
    status, out, err = vimamba(*train_arguments(photos, run, *more))
    assert status == (143 if asked else 2)
    assert f"{run} keeps its state of epoch 1, batch 2" in out + err
    assert (
        "Stopped at once" if asked else "error: --num_workers: a process that decodes images was ended"
    ) in out + err


def test_nohup_is_respected(vimamba, photos, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 2, signal.SIGHUP)
        assert vimamba(*train_arguments(photos, tmp_path / "run"))[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("step", "kept"), [(1, "nothing was saved yet"), (5, "keeps its state of epoch 1, batch 3")])
def test_a_second_ctrl_c_stops_at_once_and_says_what_is_kept(vimamba, photos, tmp_path, monkeypatch, step, kept):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, step, twice)
    run = tmp_path / "run"
    status, out, err = vimamba(*train_arguments(photos, run, "--batch_size", 4, "--checkpoint_every", "3steps"))
    assert (status, err) == (130, "")
    assert out.splitlines()[-1].startswith("Stopped at once; ")
    assert kept in out
    assert run.exists() == (step == 5)  # a run that saved nothing leaves nothing


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_sigterm_ends_a_run_that_hangs_in_its_data(vimamba, photos, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(signals, "ECHO_S", 0.1)
    original, read, run = FileSamples.image, itertools.count(), tmp_path / "run"
    hangs, ended = Event(), threading.Event()

    def image(self, index):
        if next(read) == 12:  # for the third batch of 6
            hangs.set()
            time.sleep(60)
        return original(self, index)

    def terminate():
        hangs.wait()
        while not (run / PREVIOUS).exists():  # a worker is two batches ahead
            time.sleep(0.01)
        while not ended.wait(0.2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FileSamples, "image", image)
    sender = threading.Thread(target=terminate, daemon=True)
    sender.start()
    more = ("--num_workers", workers, "--checkpoint_every", "1step")
    status, out, _ = vimamba(*train_arguments(photos, run, *more))
    ended.set()
    sender.join()
    assert status == 143
    assert "Stopped at once; " in out
    assert f"{run} keeps its state of epoch 1, batch 2: vimamba train --resume {run}" in out


def test_a_second_sigterm_waits_for_what_is_being_saved():
    with signals.StopSignals() as asked:
        asked._note(signal.SIGTERM, None)
        asked._terminated -= 2 * signals.ECHO_S
        with asked.saving():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.StoppedAtOnce):
            signal.raise_signal(signal.SIGTERM)


def damage(run, how):
    last = run / LAST
    whole = last.read_bytes()
    if how == "cut":
        last.write_bytes(whole[: len(whole) // 2])
    elif how == "zeros":
        last.write_bytes(bytes(len(whole)))
    elif how == "a bit":
        with zipfile.ZipFile(last) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        middle = largest.header_offset + largest.file_size // 2
        last.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif how == "not a number":
        contents = torch.load(last, weights_only=True)
        contents["state_dict"]["model.head.weight"][0, 0] = torch.nan
        torch.save(contents, last)
    elif how == "gone":
        last.unlink()


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A run of three epochs at a constant rate, and the same one of four."""
    root = tmp_path_factory.mktemp("longer")
    photos = write_photos(root / "photos")
    for epochs in (3, 4):
        more = ("--epochs", epochs, "--schedule", "constant", "--warmup_epochs", 0, "--checkpoint_every", "3steps")
        assert main([str(a) for a in train_arguments(photos, root / str(epochs), *more)]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "zeros", "a bit", "not a number", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(vimamba, longer, tmp_path, monkeypatch, how):
    run = shutil.copytree(longer / "3", tmp_path / "run")
    assert len({(run / name).stat().st_ino for name in (LAST, PREVIOUS, BEST)}) == 3
    damage(run, how)
    at_step(monkeypatch, 5, lambda: shutil.copytree(run, tmp_path / "saved once"))
    status, _, err = vimamba("train", "--resume", run, "--epochs", 4, "--checkpoint_every", "null")
    assert status == 0
    assert err.startswith(f"warning: {run / LAST}: ")
    assert err.endswith("continuing from checkpoints/previous.ckpt\n")
    assert err.count("\n") == 1
    same_run(run, longer / "4")
    for name, steps in ((LAST, 12), (PREVIOUS, 9)):  # the damaged one did not become the one before
        assert torch.load(tmp_path / "saved once" / name, weights_only=True)["global_step"] == steps


def test_nothing_to_fall_back_to_is_said(vimamba, photos, tmp_path):
    run = tmp_path / "run"
    assert vimamba(*train_arguments(photos, run, "--epochs", 1))[0] == 0
    for name in (LAST, BEST):
        (run / name).write_bytes(b"damaged")
    status, _, err = vimamba("train", "--resume", run, "--epochs", 2)
    assert status == 2
    assert err.startswith(f"error: --resume {run}: {run / LAST}: not a PyTorch")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ["--accelerator", "gpu"],
        ["--devices", "1000"],
        ["--num_nodes", "2"],
        ["--strategy", "ddp_spawn"],
        ["--strategy", "nonsense"],
        ["--precision", "16-mixed"],
        ["--checkpoint", "nowhere.pth"],
        ["--model", "vim_nanno"],
        ["--model_args.depth", "-1"],
        ["--auto_augment", "nonsense"],
        ["--lr", "1e30", "--warmup_epochs", "0"],  # fails within the first epoch
    ],
    ids=" ".join,
)
def test_a_refused_run_leaves_the_earlier_one_as_it_was(vimamba, photos, trained, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    new, old = tmp_path / "some" / "new", tmp_path / "old"
    shutil.copytree(trained, old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    for arguments in (train_arguments(photos, new, *wrong), train_arguments(photos, old, "--overwrite", *wrong)):
        status, _, err = vimamba(*arguments)
        assert status == 2
        assert err.count("\n") == 1
    assert not (tmp_path / "some").exists()
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_the_earlier_run_is_replaced_at_the_first_checkpoint(vimamba, photos, trained, tmp_path, monkeypatch):
    run, cut = tmp_path / "run", tmp_path / "cut"
    shutil.copytree(trained, run)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: shutil.copytree(run, cut))
        at_step(patch, 3, lambda: shutil.copytree(run, tmp_path / "later"))
        more = ("--overwrite", "--seed", 3, "--checkpoint_every", "2steps")
        assert vimamba(*train_arguments(photos, run, *more))[0] == 0
    for name in ("config.yaml", "model.safetensors", LAST, BEST):
        assert (cut / name).read_bytes() == (trained / name).read_bytes()
    found = {str(path.relative_to(tmp_path / "later")) for path in (tmp_path / "later").rglob("[!.]*.*")}
    assert {name for name in found if not name.startswith("logs/")} == {"config.yaml", "held_out.json", LAST}
    assert not any((tmp_path / "later" / log.relative_to(trained)).exists() for log in (trained / "logs").glob("*/*"))


def test_what_a_killed_start_leaves_is_no_obstacle(vimamba, photos, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".config.1.partial.yaml", "checkpoints/.last.7.partial.ckpt", "checkpoints/.last.partial"):
        (run / name).write_bytes(b"half")
    assert vimamba(*train_arguments(photos, run, "--epochs", 1))[0] == 0
    assert not list(run.rglob(".*"))


def test_a_folder_that_cannot_be_written_is_refused_before_training(vimamba, photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert vimamba(*train_arguments(photos, run, "--epochs", 1))[0] == 0

    def lock(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RunFolder, "_lock", lock)
    monkeypatch.setattr(ClassificationTask, "training_step", None)  # not reached
    status, _, err = vimamba("train", "--resume", run, "--epochs", 2)
    assert status == 2
    assert err == f"error: --resume {run}: cannot be written to (Permission denied)\n"


def test_a_disk_without_space_for_the_run_is_refused_before_it(vimamba, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert status == 2
    assert "the run needs about 0 MB for its checkpoints and 0 MB are free" in err
    assert not (tmp_path / "run").exists()


# -- numbers that are none


def spoil(monkeypatch, step, what):
    """At a step the loss, or after it a weight or a moment, is not finite."""
    original, steps = Task.training_step, iter(range(1000))

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        if next(steps) != step:
            return loss
        if what == "loss":
            return original(self, batch._replace(images=batch.images * torch.nan), batch_idx)
        (optimizer,) = self.trainer.optimizers
        weight = self.model.head.weight
        with torch.no_grad():
            value = self.ema.module.head.weight if what == "average" else optimizer.state[weight]["exp_avg_sq"]
            value[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(Task, "training_step", training_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "signum", "message"),
    [
        ("loss", 0, "the loss is no finite number at epoch 2, batch 3; "),
        ("loss", signal.SIGTERM, "the loss is no finite number at epoch 2, batch 3; "),
        ("moment", signal.SIGTERM, "the weights or their moments are no finite numbers at epoch 2, batch 3; "),
        ("average", signal.SIGTERM, "the weights or their moments are no finite numbers at epoch 2, batch 3; "),
        ("moment", 0, "the weights or their moments are no finite numbers at epoch 2; "),
    ],
)
def test_a_state_that_is_not_finite_is_never_saved(vimamba, photos, tmp_path, monkeypatch, what, signum, message):
    run = tmp_path / "run"
    more = ("--ema", 0.9, "--checkpoint_every", "2steps")
    with monkeypatch.context() as patch:
        spoil(patch, 6, what)
        if signum:
            interrupt_at(patch, 6, signum)
        status, out, err = vimamba(*train_arguments(photos, run, *more))
    assert status == 2
    assert "saved" not in out
    assert err.count("\n") == 1
    assert message in err
    assert f"{run} keeps its state of epoch 2, batch 2: continue from it with --resume {run} and a lower --lr" in err
    assert all(value.isfinite().all() for value in last_state(run).values())
    status, out, err = vimamba("train", "--resume", run, "--lr", 1e-4)  # the advice
    assert (status, err) == (0, "")
    assert "lr 0.002 -> 0.0001" in out
    assert len(metrics(run)) == 2


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_state_past_mending_is_not_resumed_for_ever(vimamba, photos, tmp_path, monkeypatch, epochs):
    """A kept state may be finite and still lead nowhere: then the run says what else to do."""
    run = tmp_path / "run"
    more = ("--epochs", epochs, "--checkpoint_every", "2steps")
    for arguments in (train_arguments(photos, run, *more), ["train", "--resume", run, "--lr", 1e-4]):
        with monkeypatch.context() as patch:
            spoil(patch, 4 * epochs - 2 if arguments[1] == "--data" else 0, "loss")
            status, _, err = vimamba(*arguments)
        assert status == 2
    start = f"--checkpoint {run}/model.safetensors" if epochs == 2 else f"--output {run} --overwrite"
    assert err.endswith(f", or, as that state may be past mending, start a new run with {start} and such an --lr\n")
    again = ["--checkpoint", run / "model.safetensors"] if epochs == 2 else ["--overwrite"]
    output = tmp_path / "new" if epochs == 2 else run
    assert vimamba(*train_arguments(photos, output, *more, *again, "--lr", 1e-4))[0] == 0


def test_a_held_out_loss_that_is_not_finite_is_said_as_that(vimamba, photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = ClassificationTask.validation_step

    def validation_step(self, batch, batch_idx):
        images = batch.images * torch.nan if self.current_epoch else batch.images
        original(self, batch._replace(images=images), batch_idx)

    monkeypatch.setattr(ClassificationTask, "validation_step", validation_step)
    status, _, err = vimamba(*train_arguments(photos, run))
    assert status == 2
    assert f"the held-out loss is nan after epoch 2; {run} keeps its state of epoch 1" in err


def test_a_batch_without_a_decodable_image_is_passed_over(vimamba, photos, tmp_path):
    for path in sorted((photos / "train").rglob("*.png"))[:10]:
        path.write_bytes(b"")
    more = ("--batch_size", 2, "--max_undecodable", 0.9, "--ema", 0.9)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", *more))
    assert status == 0, err
    assert "10 training images could not be decoded" in err


@pytest.mark.parametrize("every", ["10", "ten min", "0steps", "-1min", "2.5 steps", "5 epochs", "", "10 m"])
def test_what_is_no_measure_of_work_is_refused(vimamba, photos, tmp_path, every):
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", f"--checkpoint_every={every}"))
    assert status == 2
    assert err == f"error: --checkpoint_every is '{every}'; give minutes or steps, such as 10min or 500steps\n"
