"""The demo: the report from recorded events, the views, and one whole run of a tiny model."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from fastft.errors import ConfigError, FastftError
from fastft.train import demo
from fastft.train.demo import STEPS, DemoSettings, SideRecord, run_demo, shell_command, side_config
from fastft.train.report import make_report, render_html, write_report
from fastft.train.view import LiveView, PlainView, human_bytes, human_seconds, summary

LOSSES = {"peft": [4.0, 3.0, 2.0, 1.0], "fastft": [4.0, 3.0, 2.002, 1.0]}
SECONDS = {"peft": [9.0, 2.0, 2.0, 2.0], "fastft": [9.0, 1.0, 1.0, 1.0]}


def record(side):
    """Events of a run of four steps, as a worker sends them."""
    events = [
        {
            "event": "loaded",
            "device": "a CPU",
            "device_type": "cpu",
            "dtype": "float32",
            "trainable": 10,
            "parameters": 1000,
            "train_examples": 20,
            "eval_examples": 3,
            "notes": ["train: 1 of 20 left out"],
        }
    ]
    for i, (loss, seconds) in enumerate(zip(LOSSES[side], SECONDS[side]), start=1):
        events.append(
            {
                "event": "step",
                "step": i,
                "max_steps": 4,
                "loss": loss,
                "learning_rate": 1e-3,
                "tokens": 100,
                "seconds": seconds,
                "batch_sha256": f"{i}",
                "extra_bytes": 2**20 * i,
            }
        )
    fused = side == "fastft"
    modules = [
        {"name": "a", "kind": "lora", "fused": True, "reason": None},
        {"name": "b", "kind": "loss", "fused": False, "reason": "<why & not>"},
    ]
    explanation = {"modules": modules, "calls": {"fused": 4, "fallback": {"eval": 2}}}
    events += [
        {
            "event": "trained",
            "seconds": sum(SECONDS[side]),
            "extra_bytes": (1 if fused else 4) * 2**20,
            "memory_method": "VmHWM",
            "explanation": explanation if fused else None,
        },
        {"event": "saved", "adapter": "x", "reload_max_diff": 0.0},
        {"event": "evaluated", "after": 1.5, **({"before": 2.5} if fused else {})},
    ]
    if fused:
        texts = {"prompt": "def f(): {{facts}}", "reference": "<b>", "before": "", "after": "y"}
        events.append({"event": "sampled", **texts})
    return SideRecord(side, events)


@pytest.fixture
def records():
    return [record("peft"), record("fastft")]


@pytest.fixture
def report(records):
    return make_report(records, DemoSettings(steps=4, command="fastft demo --steps 4"), 12.5)


class TestReport:
    def test_figures(self, report):
        # The median after three warm-up steps is the fourth step.
        assert report["tokens_per_s"] == {"peft": 50.0, "fastft": 100.0}
        assert report["peak_extra_bytes"] == {"peft": 4 * 2**20, "fastft": 2**20}
        assert report["loss"] == LOSSES
        assert report["loss_max_rel_diff"] == pytest.approx(0.001)
        assert report["eval_loss"] == {"before": 2.5, "after": 1.5, "after_peft": 1.5}
        assert report["perplexity"]["before"] == pytest.approx(math.exp(2.5))
        assert report["adapter_reload_max_diff"] == 0.0
        assert (report["fused_modules"], report["fallback_modules"]) == (1, 1)
        assert report["fallback_reasons"] == {"<why & not>": 1}
        assert report["fallback_calls"] == {"eval": 2}
        assert report["same_batches"] is True
        assert report["versions"]["torch"]
        json.dumps(report, allow_nan=False)

    def test_other_batches_are_noticed(self, records):
        records[1].steps[2]["batch_sha256"] = "other"
        report = make_report(records, DemoSettings(), 1.0)
        assert report["same_batches"] is False
        assert "DIFFERENT batches" in render_html(report)

    def test_half_a_run_is_no_report(self, records):
        records[1].events = records[1].events[:3]
        with pytest.raises(FastftError, match="fastft: expected the events of a whole run"):
            make_report(records, DemoSettings(), 1.0)

    def test_without_held_out_data(self, records):
        for one in records:
            one.find("evaluated").update(after=None, before=None)
        records[1].events.pop()
        page = render_html(make_report(records, DemoSettings(), 1.0))
        assert "not measured" in page
        assert "no held-out example" in page

    def test_page_is_whole_and_stands_alone(self, report):
        page = render_html(report)
        images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
        assert len(images) == 3
        for image in images:
            assert base64.b64decode(image).rstrip().endswith(b"</svg>")
        text = re.sub(r'src="data:[^"]*"', "", page)
        assert not re.search(r"(src|href)=|https?://|url\(|<script|@import", text)
        # Marks are all filled, and one inside someone's code stays as it was.
        assert re.findall(r"\{\{\w+\}\}", text) == ["{{facts}}"]
        assert "&lt;why &amp; not&gt;" in text
        assert "&lt;b&gt;" in text
        assert "fastft demo --steps 4" in text
        assert "2.00 times the speed" in text
        assert "0.25 times its extra memory" in text

        class Balance(HTMLParser):
            def __init__(self):
                super().__init__()
                self.stack = []

            def handle_starttag(self, tag, attrs):
                if tag not in ("meta", "img", "br"):
                    self.stack.append(tag)

            def handle_endtag(self, tag):
                assert self.stack.pop() == tag

        parser = Balance()
        parser.feed(page)
        assert parser.stack == []

    def test_files(self, records, tmp_path):
        page = write_report(records, DemoSettings(out=tmp_path), 1.0)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
        assert json.loads((tmp_path / "report.json").read_text())["loss"] == LOSSES
        assert page.read_text() == render_html(json.loads((tmp_path / "report.json").read_text()))

    def test_charts_are_the_same_for_the_same_data(self, report):
        assert render_html(report) == render_html(report)


class TestViews:
    def show(self, view, records):
        with view:
            view.notice("hello")
            for one in records:
                view.event(one.name, {"event": "start"})
                for event in one.events:
                    view.event(one.name, event)
                view.event(one.name, {"event": "end"})

    def console(self, **kwargs):
        from rich.console import Console

        return Console(file=io.StringIO(), width=100, height=40, **kwargs)

    def test_plain_lines(self, records):
        console = self.console()
        self.show(PlainView(console, 4), records)
        lines = console.file.getvalue().splitlines()
        steps = [line for line in lines if " step " in line]
        assert len(steps) == 8
        assert re.search(
            r"PEFT +step +2/4 +loss 3\.0000 +50\.0 tokens/s +extra memory 2 MB", steps[1]
        )
        assert re.search(r"about 0:12 left$", steps[1])
        assert "\x1b" not in console.file.getvalue()

    def test_time_left_knows_the_limit(self, records):
        console = self.console()
        # 30 steps of 9 s would be minutes; the limit ends either side after 20 s and a step.
        self.show(PlainView(console, 30, limit=20.0), records[:1])
        first = next(line for line in console.file.getvalue().splitlines() if " step " in line)
        assert first.endswith("about 0:49 left")

    def test_live_table(self, records):
        console = self.console(force_terminal=True)
        self.show(LiveView(console, 4), records)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
        for part in ("2.0020", "2.0000", "tokens/s", "extra memory", "100%", "4 MB"):
            assert part in text

    def test_summary(self, report):
        console = self.console()
        console.print(summary(report, "out/demo/report.html", 75.0))
        text = console.file.getvalue()
        for part in ("2.00x", "0.25x", "1:15 in all", "out/demo/report.html", "1.0e-03"):
            assert part in text

    @pytest.mark.parametrize(
        ("count", "text"), [(0, "0 MB"), (2**20 * 1023, "1023 MB"), (3 * 2**29, "1.50 GB")]
    )
    def test_bytes(self, count, text):
        assert human_bytes(count) == text

    def test_seconds(self):
        assert [human_seconds(s) for s in (0, 59.6, 61, -1)] == ["0:00", "1:00", "1:01", "0:00"]


class TestDemo:
    def test_sides_differ_in_nothing_else(self):
        sides = [side_config(DemoSettings(), side, "m", {"data": "d"}).to_dict()
                 for side in ("peft", "fastft")]  # fmt: skip
        assert {key for key in sides[0] if sides[0][key] != sides[1][key]} == {
            "fused",
            "output_dir",
        }

    def test_command(self):
        assert shell_command(["demo", "--out", "a b"]) == "fastft demo --out 'a b'"

    def test_too_few_steps_and_unwritable(self, tmp_path):
        view = PlainView(TestViews().console(), 1)
        with pytest.raises(ConfigError, match="at least 2"):
            run_demo(DemoSettings(steps=1, out=tmp_path), view)
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match="a folder that can be written"):
            run_demo(DemoSettings(out=tmp_path / "file"), view)

    def test_an_error_in_a_worker_comes_out_clean(self, tmp_path, data_file):
        settings = DemoSettings(model="/no/such", data=str(data_file), out=tmp_path, steps=2)
        with pytest.raises(FastftError, match=r"peft: .*the hub id or the folder.*peft\.log"):
            run_demo(settings, PlainView(TestViews().console(), 2))

    def test_fastft_takes_as_many_steps_as_plain_peft_did(
        self, tmp_path, monkeypatch, data_file, records
    ):
        tasks = []

        def side(task, name, out):
            tasks.append(task)
            yield from next(one for one in records if one.name == name).events

        monkeypatch.setattr(demo, "run_side", side)
        settings = DemoSettings(model="m", data=str(data_file), out=tmp_path, train_seconds=9.0)
        assert run_demo(settings, PlainView(TestViews().console(), 30)).is_file()
        limits = [(task["stop_steps"], task["stop_seconds"], task["sample"]) for task in tasks]
        assert limits == [(None, 9.0, False), (4, None, True)]
        assert [task["config"]["max_steps"] for task in tasks] == [STEPS, STEPS]

    def test_end_to_end(self, tmp_path, model_folder, data_file):
        arguments = ["--model", model_folder, "--data", data_file, "--out", tmp_path]
        arguments += ["--steps", 5, "--batch", 4, "--length", 64, "--dtype", "float32"]
        done = subprocess.run(
            [sys.executable, "-m", "fastft.cli", "demo", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["same_batches"]
        assert report["loss_max_rel_diff"] < 1e-4
        assert report["adapter_reload_max_diff"] == 0.0
        assert len(report["loss"]["peft"]) == len(report["loss"]["fastft"]) == 5
        assert report["fused_modules"] >= 14
        assert all(rate > 0 for rate in report["tokens_per_s"].values())
        assert report["eval_loss"]["after"] < report["eval_loss"]["before"]
        assert set(report["sample"]) == {"prompt", "reference", "before", "after"}
        assert done.stderr == ""
        assert "report.html" in done.stdout
        assert "\x1b" not in done.stdout
