"""The commands: ``fastft train``, ``plan``, ``demo``, ``doctor``. Nothing heavy is imported
before a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(
    name="fastft",
    help="LoRA fine-tuning with fused kernels: PEFT's adapters and files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BAD_INPUT, INTERRUPTED = 2, 130


@contextmanager
def clean_errors() -> Iterator[None]:
    """Errors fastft raises on purpose become one line and exit code 2; Ctrl-C becomes 130."""
    from fastft.errors import FastftError
    from fastft.train.processes import first_process, process_prefix

    try:
        yield
    except FastftError as error:
        typer.echo(f"{process_prefix()}error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        # Ctrl-C during training carries the checkpoint it left.
        checkpoint = getattr(error, "checkpoint", None)
        text = f"{error}" if str(error) else "interrupted"
        if checkpoint:
            text += f"; {checkpoint} is whole. To go on: fastft train CONFIG --resume last"
        if first_process():
            typer.echo(text, err=True)
        raise typer.Exit(INTERRUPTED) from error


def _quiet_libraries() -> None:
    """Without the libraries' own notices: fastft says what matters. PYTHONWARNINGS brings the
    warnings back."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)


@app.command(short_help="Fine-tune LoRA adapters as YAML files say.")
def train(
    configs: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG",
            help="YAML file; its keys are those of TrainConfig. Several train as many adapters of "
            "one model in one job.",
        ),
    ],
    resume: Annotated[
        str | None,
        typer.Option(help="'last' or a checkpoint folder; overrides resume_from_checkpoint."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even where the plan says it does not fit.")
    ] = False,
) -> None:
    """Fine-tune LoRA adapters as CONFIG says and save them to OUTPUT_DIR/adapter."""
    with clean_errors():
        # The configuration is checked before torch is imported: its errors come at once.
        from fastft.train.config import load_config

        cfgs = [load_config(config) for config in configs]
        if resume is not None:
            cfgs = [cfg.replace(resume_from_checkpoint=resume) for cfg in cfgs]
        _quiet_libraries()
        from fastft.train.console import TrainView
        from fastft.train.processes import end_processes

        if len(cfgs) > 1:
            from fastft.train.together import train_together

            with TrainView() as view:
                results = train_together(
                    cfgs, report=view.together, notice=view.notice, force=force
                )
            for cfg, each in zip(cfgs, results, strict=True):
                view.notice(f"{cfg.output_dir}:")
                view.finish(each)
            return
        from fastft.train.run import train as run

        with TrainView() as view:
            result = run(cfgs[0], report=view.step, notice=view.notice, force=force)
        view.finish(result)
        end_processes()


@app.command(short_help="Plain PEFT and fastft side by side, and a report.")
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder; default: SmolLM2-135M-Instruct.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=".jsonl, .json or .csv; default: docstrings of Python's own library."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each side.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens an example is padded to.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, float32 or float16: of the frozen model.")
    ] = "auto",
) -> None:
    """Fine-tune with plain PEFT and with fastft side by side, and write OUT/report.html."""
    with clean_errors():
        _quiet_libraries()
        import time

        from rich.console import Console

        from fastft.train.demo import DemoSettings, read_report, run_demo, shell_command
        from fastft.train.view import demo_view, summary

        given: dict[str, Any] = {
            "model": model,
            "data": data,
            "steps": steps,
            "batch": batch,
            "length": length,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if steps is not None:
            # Who asks for a number of steps gets it, however long it takes.
            chosen["train_seconds"] = None
        settings = DemoSettings(
            out=out,
            dtype=dtype,
            command=shell_command(sys.argv[1:]),
            **chosen,
        )
        console = Console()
        started = time.perf_counter()
        with demo_view(console, settings.steps, settings.train_seconds) as view:
            page = run_demo(settings, view)
        console.print(summary(read_report(page), str(page), time.perf_counter() - started))


@app.command(short_help="Memory and speed of a run before its first step.")
def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder or config.json of a causal language model, or a YAML file of "
            "`fastft train`; several files are the adapters of one job. Default: "
            "smollm2-135m-instruct.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="lora, qlora or full.")] = "lora",
    r: Annotated[int | None, typer.Option("--rank", "--r", help="Rank of the adapters.")] = None,
    optim: Annotated[
        str | None,
        typer.Option(
            help="AdamW, AdamW8bit, AdamWBF16, Lion, Lion8bit, SGD (with momentum), "
            "ScheduleFreeAdamW, Adafactor or Muon (AdamW for what is no matrix)."
        ),
    ] = None,
    optim_states: Annotated[
        str | None, typer.Option(help="device, host or paged: where the optimizer's states are.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32 or auto.")] = None,
    device: Annotated[
        str,
        typer.Option(help="cpu or cuda (this machine's), or a GPU's name: H100, A100, L4, ..."),
    ] = "auto",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model (FSDP).")] = 1,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Sequences of all data: says the run's hours.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write a stacked bar for each policy to this SVG.")
    ] = None,
) -> None:
    """Predict memory and speed of a run before its first step; needs no GPU and no weights."""
    with clean_errors():
        from fastft.train.config import TrainConfig, load_config

        models = models or ["smollm2-135m-instruct"]
        from_file = [model.endswith((".yaml", ".yml")) for model in models]
        if len(models) > 1 and not all(from_file):
            raise typer.BadParameter("several are YAML files of `fastft train`", param_hint="MODEL")
        cfgs = [
            load_config(model) if is_file else TrainConfig(model=model)
            for model, is_file in zip(models, from_file, strict=True)
        ]
        given = {
            "r": r,
            "optim_states": optim_states,
            "per_device_train_batch_size": batch,
            "max_length": length,
            "dtype": dtype,
        }
        given = {name: value for name, value in given.items() if value is not None}
        cfg, *others = (cfg.replace(**given) for cfg in cfgs)
        _quiet_libraries()
        from fastft.train import plan_report
        from fastft.train.plan_device import ceilings_of, device_of
        from fastft.train.plan_model import check_request

        request = check_request(cfg, method, gpus, others, optim)
        where = device_of(device)
        found = plan_report.report(
            request, where, ceilings_of(where, cfg), examples=examples, epochs=epochs
        )
        if picture is not None:
            plan_report.picture(found, picture)
        if json_output:
            import json

            typer.echo(json.dumps(found.to_dict(), indent=2))
        else:
            plan_report.show(found)


@app.command(short_help="What this machine and installation can do.")
def doctor(
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of a table.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure products, copies and attention here first; `fastft plan` uses them.",
        ),
    ] = False,
) -> None:
    """Say what this machine and installation can do, and what to change."""
    with clean_errors():
        if measure:
            from fastft.train.plan_device import measure_here

            for line in measure_here():
                typer.echo(line, err=True)
        from fastft.doctor import examine, show

        findings = examine()
        if json_output:
            import json

            typer.echo(json.dumps(findings, indent=2))
        else:
            show(findings)


def _version(wanted: bool) -> None:
    if wanted:
        from fastft._version import __version__

        typer.echo(f"fastft {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LoRA fine-tuning with fused kernels: PEFT's adapters and files."""
