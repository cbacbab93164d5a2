"""`tbptt-ckpt train` with snapshots, and `tbptt-ckpt snapshots`."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbptt_ckpt.cli.app import main
from tbptt_ckpt.snapshot.store import SnapshotStore

TEXT = b"it is what it is, and it was what it was. " * 200


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def words(text: Path) -> list[str]:
    """A run of a second: 16 windows of 8 steps."""
    return (
        f"train --data {text} --device cpu --hidden 12 --lanes 4 --k1 8 --k2 16 --max-steps 128 "
        "--strategy uniform:4"
    ).split()


def weights(capsys: Any, words: list[str], path: Path) -> tuple[bytes, dict[str, Any]]:
    """What a run saves and says."""
    code = main([*words, "--save", str(path), "--force", "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return path.read_bytes(), json.loads(out)


def windows_of(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line["steps"] for line in lines if line["event"] == "window"]


def test_a_resumed_run_gives_the_bytes_of_an_undisturbed_one(
    capsys: Any, words: list[str], tmp_path: Path
) -> None:
    expected, outcome = weights(capsys, words, tmp_path / "weights")
    folder = tmp_path / "deep" / "snapshots"
    options = ["--snapshot-dir", str(folder), "--snapshot-every", "24", "--keep", "2"]
    for steps in ("40", "72"):  # --max-steps counts in total
        weights(capsys, [*words, "--max-steps", steps, *options, "--resume"], tmp_path / "part")
        assert SnapshotStore(folder).steps()[-1] == int(steps)
    found, resumed = weights(capsys, [*words, *options, "--resume"], tmp_path / "part")
    assert found == expected
    assert resumed["scores"] == outcome["scores"]
    for name in ("num_windows", "num_steps", "num_passes", "mean_drift", "last_loss"):
        assert resumed["work"][name] == outcome["work"][name]
    assert windows_of(folder) == list(range(8, 129, 8))
    assert len(SnapshotStore(folder).steps()) == 2
    again, _ = weights(capsys, [*words, *options, "--resume"], tmp_path / "part")
    assert again == expected


def test_snapshots_change_nothing(capsys: Any, words: list[str], tmp_path: Path) -> None:
    plain = weights(capsys, words, tmp_path / "weights")
    options = ["--snapshot-dir", str(tmp_path / "s"), "--snapshot-minutes", "0.0001"]
    saved = weights(capsys, [*words, *options], tmp_path / "weights")
    assert saved[0] == plain[0]
    assert saved[1]["scores"] == plain[1]["scores"]


def test_resume_starts_afresh_where_there_is_nothing(
    capsys: Any, words: list[str], tmp_path: Path
) -> None:
    expected, _ = weights(capsys, words, tmp_path / "weights")
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        options = ["--snapshot-dir", str(tmp_path / folder), "--resume"]
        assert weights(capsys, [*words, *options], tmp_path / "weights")[0] == expected


def test_a_broken_snapshot_is_passed_over_with_a_warning(
    capsys: Any, words: list[str], tmp_path: Path
) -> None:
    expected, _ = weights(capsys, words, tmp_path / "weights")
    folder = tmp_path / "s"
    options = ["--snapshot-dir", str(folder), "--snapshot-every", "16"]
    main([*words, "--max-steps", "64", *options])
    (folder / "step-64" / "state.pt").write_bytes(b"")
    capsys.readouterr()
    path = tmp_path / "weights"
    assert main([*words, *options, "--resume", "--save", str(path), "--force"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"tbptt-ckpt: warning: SNAPSHOT PASSED OVER: {folder / 'step-64'}")
    assert f"falling back to {folder / 'step-48'}" in err
    assert err.count("\n") == 1
    assert path.read_bytes() == expected


def refused(capsys: Any, words: list[str]) -> str:
    assert main(words) == 2
    err: str = capsys.readouterr().err
    assert err.startswith("tbptt-ckpt: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resume", "--resume needs --snapshot-dir"),
        ("--snapshot-every 5", "--snapshot-every needs --snapshot-dir"),
        ("--snapshot-minutes 5", "--snapshot-minutes needs --snapshot-dir"),
        ("--snapshot-dir S --snapshot-every 0", "--snapshot-every=0 must be"),
        ("--snapshot-dir S --snapshot-minutes nan", "--snapshot-minutes=nan must be"),
        ("--snapshot-dir S --keep 0", "--keep=0 must be"),
    ],
)
def test_options_that_cannot_work(
    capsys: Any, words: list[str], options: str, message: str
) -> None:
    assert message in refused(capsys, [*words, *options.split()])


def test_another_run_is_neither_continued_nor_overwritten(
    capsys: Any, words: list[str], tmp_path: Path
) -> None:
    options = ["--snapshot-dir", str(tmp_path / "s")]
    assert main([*words, *options]) == 0
    capsys.readouterr()
    assert "resume from them, or name another" in refused(capsys, [*words, *options])
    changed = [*words, *options, "--resume", "--lr", "0.5"]
    assert "lr=0.5, which was 0.004" in refused(capsys, changed)
    (tmp_path / "file").touch()
    options = ["--snapshot-dir", str(tmp_path / "file")]
    assert "is a file" in refused(capsys, [*words, *options])


def test_snapshots_are_listed_and_verified(capsys: Any, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    main([*words, "--snapshot-dir", str(folder), "--snapshot-every", "40"])
    capsys.readouterr()
    assert main(["snapshots", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("valid") == 3
    assert main(["snapshots", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["snapshots"]
    assert [(s["step"], s["problem"]) for s in listed] == [(80, None), (120, None), (128, None)]
    (folder / "step-120" / "manifest.json").unlink()
    assert main(["snapshots", str(folder), "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)["snapshots"]
    assert [s["problem"] for s in listed] == [None, "manifest.json is missing", None]
    assert main(["snapshots", str(folder)]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out
    assert main(["snapshots", str(tmp_path)]) == 0
    assert "there is no directory" in refused(capsys, ["snapshots", str(tmp_path / "none")])


def test_what_a_stream_cannot_show_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gräßlich"
    SnapshotStore(folder).save(3, {})
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["snapshots", str(folder)]) == 0
    assert main(["snapshots", str(folder / "ö")]) == 2
    shown = [stream.buffer.getvalue() for stream in (sys.stdout, sys.stderr) if not stream.flush()]
    assert b"gr\\xe4\\xdflich" in shown[0]
    assert b"\\xf6" in shown[1]


def test_closed_streams_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SnapshotStore(tmp_path).save(3, {})
    for folder, code in ((tmp_path, 0), (tmp_path / "none", 2)):
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, None)
        assert main(["snapshots", str(folder)]) == code


def test_a_terminated_run_saves_and_goes_on_later(
    capsys: Any, words: list[str], tmp_path: Path, injected: Callable[..., None]
) -> None:
    expected, _ = weights(capsys, [*words, "--max-steps", "1600"], tmp_path / "weights")
    folder = tmp_path / "s"
    options = ["--max-steps", "1600", "--snapshot-dir", str(folder), "--resume"]
    command = [sys.executable, "-m", "tbptt_ckpt", *words, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "step-0").exists():
            assert process.poll() is None
            time.sleep(0.01)  # the other core may not be free
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    steps = SnapshotStore(folder).steps()[-1]
    assert process.returncode == 143
    assert err == f"tbptt-ckpt: terminated after {steps} steps; resume from {folder}\n"
    assert steps < 1600
    injected("SIGTERM, SIGINT")
    assert weights(capsys, [*words, *options], tmp_path / "weights")[0] == expected


def saving(text: Path, folder: Path, steps: int = 128, *options: str) -> list[str]:
    """A command as a supervisor starts it, over and over: always the same, never --force."""
    words = (
        f"train --data {text} --device cpu --hidden 12 --lanes 4 --k1 8 --k2 16 "
        f"--strategy uniform:4 --snapshot-dir {folder} --snapshot-every 24 --resume "
        f"--save {folder}.pt"
    )
    return [*words.split(), "--max-steps", str(steps), *options]


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_command_that_saves_is_run_again_after_a_kill_and_when_done(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: Path,
    tmp_path: Path,
    injected: Callable[..., None],
) -> None:
    expected, _ = weights(capsys, words, tmp_path / "weights")
    folder, saved = tmp_path / "s", tmp_path / "s.pt"
    command = saving(text, folder)
    with monkeypatch.context() as patch:
        patch.setattr("tbptt_ckpt.cli.train.job.retained_peak", killed)
        child = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    injected("kill -9 in mid-sequence")
    assert saved.read_bytes() == expected  # it had been written, and the run was not over
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["work"]["num_steps"] == 128
        assert saved.read_bytes() == expected


def test_a_run_that_goes_on_replaces_its_own_weights_and_no_others(
    capsys: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = tmp_path / "s", tmp_path / "s.pt"
    assert main(saving(text, folder, 64)) == 0
    with monkeypatch.context() as patch:  # stopped when it has trained on, before it saves
        patch.setattr("tbptt_ckpt.cli.train.job.save_weights", interrupted)
        assert main(saving(text, folder, 96)) == 130
    first = saved.read_bytes()
    assert main(saving(text, folder, 96)) == 0
    second = saved.read_bytes()
    assert second != first
    capsys.readouterr()
    for stranger in (b"", b"mine", second[:-1]):
        saved.write_bytes(stranger)
        assert "exists; add --force" in refused(capsys, saving(text, folder, 128))
        assert saved.read_bytes() == stranger
    assert main(saving(text, folder, 128, "--force")) == 0
    assert saved.read_bytes() not in (first, second)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
