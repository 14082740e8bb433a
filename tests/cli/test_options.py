"""The command line: flags, file and defaults, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from engine.config import DEFAULT_MODEL, EngineOptions
from engine.errors import ModelError
from engine.request import SamplingParams
from server import cli
from server.cli import COMMANDS, main, make_parser, parse
from server.commands.options import SAMPLING_HELP
from server.config import ServerOptions
from server.options import UsageError

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_default() -> None:
    command, (engine, server) = parse(["serve"])
    assert command.name == "serve"
    assert engine == EngineOptions()
    assert engine.model == DEFAULT_MODEL
    assert server == ServerOptions()


def test_flag_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "port: 9000\nmax-model-len: 512\noverlap: false\nmodel: from-file\n")
    _, (engine, server) = parse(["serve", "--config", file, "--port", "9001"])
    assert (server.port, engine.max_model_len, engine.overlap, engine.model) == (9001, 512, False, "from-file")
    _, (engine, _) = parse(["serve", "from-flag", "--config", file, "--overlap"])
    assert (engine.model, engine.overlap) == ("from-flag", True)
    assert engine.max_num_seqs is None


def test_every_option_has_a_flag_that_reaches_it() -> None:
    """All fields of the engine's and the server's options, each set to something else than its default."""
    _, (engine, server) = parse(["serve"])
    for options in (engine, server):
        for field in dataclasses.fields(options):
            flag = "--" + field.name.replace("_", "-")
            default = getattr(options, field.name)
            if "bool" in str(field.type):
                argv, want = [flag if not default else flag.replace("--", "--no-", 1)], not default
            elif "Literal" in str(field.type):
                want = next(value for value in reversed(_literals(type(options), field.name)) if value != default)
                argv = [flag, want]
            elif "tuple[str" in str(field.type):
                argv, want = [flag, "a=b", flag, "c=d"], ("a=b", "c=d")
            elif "str" in str(field.type):
                argv, want = [flag, "some"], "some"
            else:
                argv, want = [flag, "4096"], 4096
            _, parsed = parse(["serve", *argv])
            got = [getattr(part, field.name) for part in parsed if hasattr(part, field.name)]
            assert got == [want], field.name


def _literals(options: type, name: str) -> list[str]:
    """What an option of a Literal, or of one or None, may be."""
    hint = get_type_hints(options)[name]
    parts = [part for part in get_args(hint) if get_origin(part) is Literal] or [hint]
    return [value for part in parts for value in get_args(part)]


def test_spellings_of_other_engines() -> None:
    _, (engine, _) = parse(["serve", "m", "--block-size", "32", "--max-num-seqs", "8", "--no-enable-prefix-caching"])
    assert engine == EngineOptions(model="m", page_size=32, max_num_seqs=8, enable_prefix_caching=False)


def test_sampling_flags() -> None:
    argv = ["generate", "hello", "--temperature", "0", "--stop", "a", "--stop", "b", "--logit-bias", '{"5": -100}']
    _, (engine, generate, params) = parse([*argv, "--seed", "7", "--stop-token-ids", "3", "--no-skip-special-tokens"])
    assert generate.prompt == "hello"
    assert params == SamplingParams(
        temperature=0.0, stop=("a", "b"), logit_bias={5: -100}, seed=7, stop_token_ids=(3,), max_tokens=256,
        skip_special_tokens=False,
    )  # fmt: skip
    assert engine.seed == 7


def test_sampling_params_from_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "stop: [x, y]\nlogit_bias: {7: 1.5}\nmax_tokens: 3\nmin_p: 0.1\n")
    _, (_, _, params) = parse(["generate", "p", "--config", file])
    assert params == SamplingParams(stop=("x", "y"), logit_bias={7: 1.5}, max_tokens=3, min_p=0.1)


def test_sampling_help_names_real_fields() -> None:
    assert set(SAMPLING_HELP) <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--max-modl-len", "5"], "unknown option --max-modl-len; did you mean --max-model-len?"),
        (["serve", "--blok-size=5"], "unknown option --blok-size; did you mean --block-size?"),
        (["serve", "--max-model", "5"], "unknown option --max-model; did you mean --max-model-len?"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["serve", "a", "--model", "b"], "model is given twice: 'a' and --model 'b'"),
        (["serve", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["serve", "--port", "70000"], "--port: must be at most 65535, got 70000"),
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs: must be a positive integer, got 0"),
        (["serve", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["serve", "--config", "/nonexistent.yaml"], "--config /nonexistent.yaml: "),
        (["srve"], "invalid choice: 'srve'"),
        ([], "name a command: serve, generate"),
        (["bench"], "name a command: bench "),
        (["bench", "srve"], "invalid choice: 'srve'"),
        (["bench", "serve", "--sweep"], "--sweep: needs --slo"),
        (["bench", "serve", "--rate", "2", "--concurrency", "1,4"], "--max-concurrency: is for a closed loop"),
        (["bench", "serve", "--concurrency", "1,x"], "argument --max-concurrency/--concurrency: invalid"),
        (["bench", "serve", "--burstiness", "2"], "--burstiness: is for an open loop"),
        (["bench", "serve", "--peer", "other"], "--peer: 'other' is not NAME=URL"),
        (["bench", "startup", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["generate"], "--prompt: must not be empty"),
        (["generate", "p", "--top-p", "nan"], "--top-p: must be between 0.0 and 1.0, got nan"),
        (["generate", "p", "--logit-bias", "[1]"], "argument --logit-bias: invalid"),
        (["batch"], "--input: name a file"),
        (["batch", "-i", "a"], "--output: name a file"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("octavo: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_modl_len: 5", "unknown option max_modl_len; did you mean max_model_len?"),
        ("port: '8000'", "port must be an integer, got '8000'"),
        ("port: true", "port must be an integer, got True"),
        ("overlap: 1", "overlap must be true or false, got 1"),
        ("dtype: int8", "dtype must be one of auto, bfloat16, float32, got 'int8'"),
        ("max_num_seqs: 0", "--max-num-seqs: must be a positive integer, got 0"),
        ("port: 1\nport: 2\nPort: 3", "unknown option Port"),
        ("max-model-len: 1\nmax_model_len: 2", "max_model_len is given twice"),
        ("[1, 2]", "must hold 'name: value' lines"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", write(tmp_path / "a.yaml", text)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_one_file_for_several_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.yaml", "port: 9000\nmax_num_seqs: 4\n")
    _, (engine, _, _) = parse(["generate", "p", "--config", file])
    assert engine.max_num_seqs == 4
    assert "port is for octavo serve; not used here" in capsys.readouterr().err


def test_empty_file(tmp_path: Path) -> None:
    _, (engine, _) = parse(["serve", "--config", write(tmp_path / "a.yaml", "")])
    assert engine == EngineOptions()


def test_shipped_files_are_valid() -> None:
    files = sorted((ROOT / "configs" / "serve").glob("*.yaml"))
    assert files
    for file in files:
        parse(["serve", "--config", str(file)])


def test_error_of_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*options: object) -> int:
        raise ModelError("model.gguf: truncated\nat byte 7")

    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(COMMANDS[0], run=f"{__name__}:ignored"),))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: type("Module", (), {"ignored": fails}))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "octavo: error: model.gguf: truncated at byte 7\n"


def test_the_table_leads_to_modules_that_exist() -> None:
    """By file, not by import: importing them would load JAX."""
    for command in COMMANDS:
        module, function = command.run.split(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert f"def {function}(" in source, command.run


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([*command.name.split(), "--help"])
        assert stop.value.code == 0
        assert command.help in " ".join(capsys.readouterr().out.split())
    assert make_parser().prog == "octavo"


def test_light_commands_load_no_jax() -> None:
    """`octavo --help`, a misspelt option and `octavo models` answer at once."""
    code = (
        "import sys; from server.cli import main; main(['serve', '--prt', '1']); main(['models', '--json']);"
        "main(['version']);"
        "print(sorted(m for m in sys.modules if m in ('jax', 'jaxlib', 'fastapi', 'numpy', 'orbax')))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert time.perf_counter() - started < 10  # far below in practice; a loaded machine is not a failure


def test_models_lists_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert DEFAULT_MODEL in [row["name"] for row in rows]


def test_usage_error_is_an_octavo_error() -> None:
    with pytest.raises(UsageError, match="unknown option --x"):
        parse(["serve", "--x"])
