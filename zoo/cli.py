"""The `kzoo` command.

Only what a command needs is imported, and only when it runs, so that `kzoo --help`
answers at once.
"""

import argparse
import ast
import contextlib
import inspect
import json
import math
import os
import re
import sys
from pathlib import Path

from .._version import __version__
from . import placing
from .interruption import INTERRUPTED, insistent_interrupts, leave
from .native_log import native_log_to

EXAMPLES = """\
examples:
  kzoo list 'resnet8*'
  kzoo train resnet8_batch_ensemble_digits --epochs 20 width=32
  kzoo evaluate runs/resnet8_batch_ensemble_digits --split validation
  kzoo export runs/resnet8_batch_ensemble_digits --to models
  kzoo predict models/resnet8_batch_ensemble_digits --input digits.npy --json
  kzoo serve models/resnet8_batch_ensemble_digits --port 8501
  kzoo download resnet8_digits --from https://mirror.example/saved_models
"""

FIGURES = ("accuracy", "nll", "brier", "ece", "predictive_entropy")
MAX_MESSAGE = 600


def main(argv=None):
    """Runs the command line.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C. Errors
        are one line on standard error.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        arguments = _arguments(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return stop.code or 0
    try:
        log = contextlib.nullcontext() if arguments.traceback else native_log_to()
        with insistent_interrupts(), log:
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `kzoo list | head -1`. Nothing more can be said
        # there, not even by the interpreter's own flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nkzoo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"kzoo {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def command():
    """The `kzoo` command: runs it and ends the process."""
    leave(main())


def _arguments(argv):
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes all of KEY=VALUE ... from one place; here they may stand anywhere.
    if hasattr(arguments, "overrides"):
        arguments.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _parser():
    parser = argparse.ArgumentParser(
        prog="kzoo",
        description="Research models for Keras 3: train, measure, export, serve.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kzoo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, name, text, **options):
        sub = commands.add_parser(name, help=text, description=f"{text}.", **options)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--traceback",
            action="store_true",
            help="show where an error comes from, and TensorFlow's log",
        )
        return sub

    def as_json(sub):
        sub.add_argument("--json", action="store_true", help="print JSON")

    def data(sub, dataset, split):
        sub.add_argument("--dataset", help=f"data set; default: {dataset}")
        sub.add_argument("--split", default=split, help="default: %(default)s")
        sub.add_argument("--data-dir", help="folder of prepared data sets")

    sub = command(_list, "list", "List models")
    sub.add_argument("pattern", nargs="?", default="*", help="as in a shell")
    as_json(sub)

    sub = command(_info, "info", "Describe a model")
    sub.add_argument("name")
    as_json(sub)

    sub = command(_train, "train", "Train a model; the same command again resumes")
    sub.add_argument("name")
    sub.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="arguments of the model"
    )
    sub.add_argument("--dataset", help="default: the model's own")
    sub.add_argument("--data-dir", help="folder of prepared data sets")
    sub.add_argument("--epochs", type=_positive)
    sub.add_argument("--batch-size", type=_positive)
    sub.add_argument("--learning-rate", type=float)
    sub.add_argument("--members", choices=("split", "tile"))
    sub.add_argument("--max-shift", type=_natural)
    sub.add_argument("--flip", action=argparse.BooleanOptionalAction, default=None)
    sub.add_argument("--recipe", help="such as cifar; default: the model's own")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--run-dir", type=Path, help="default: runs/NAME")
    sub.add_argument("--fresh", action="store_true", help="remove an earlier run first")

    sub = command(_evaluate, "evaluate", "Measure a model on a data set")
    sub.add_argument("model", help="a run's folder, a .keras file, or as for predict")
    data(sub, "the one it was trained on", "validation")
    sub.add_argument(
        "--samples", type=_positive, help="draws of a Bayesian model; default: its mean"
    )
    sub.add_argument(
        "--diversity", action="store_true", help="and how an ensemble's members differ"
    )
    as_json(sub)

    sub = command(_export, "export", "Write a SavedModel for TensorFlow Serving")
    sub.add_argument("model", help="a run's folder or a .keras file")
    sub.add_argument(
        "--to",
        type=Path,
        default="models",
        metavar="DIR",
        help="where NAME/VERSION is written; default: %(default)s",
    )
    sub.add_argument("--name", help="default: the model's name")
    sub.add_argument("--version", type=int, help="default: the next one")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument("--no-xla", action="store_true", help="no signature serving_xla")

    sub = command(_predict, "predict", "Ask a model")
    sub.add_argument(
        "model", help="a carried or downloaded model's name, or a SavedModel's path"
    )
    sub.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help=".npy, .npz of named inputs, or .json as for TensorFlow Serving's REST; "
        "default: examples of a data set",
    )
    data(sub, "the model's own", "test")
    sub.add_argument("--examples", type=_positive, default=8, help="default: 8")
    as_json(sub)

    sub = command(_serve, "serve", "Serve models over REST and gRPC until Ctrl-C")
    sub.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="a model's name, or the path of a folder of versions or of one version",
    )
    sub.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    sub.add_argument("--port", type=_port, default=8501, help="REST; default: 8501")
    sub.add_argument("--grpc-port", type=_port, help="gRPC; default: none")
    sub.add_argument("--config", type=Path, help="TensorFlow Serving's model config")
    sub.add_argument("--xla", action="store_true", help="serve serving_xla too")

    sub = command(_download, "download", "Fetch a model, verify it, place it")
    sub.add_argument("name")
    sub.add_argument(
        "--from",
        dest="source",
        metavar="MIRROR",
        help="http(s) URL, file URL or folder; default: the installed package",
    )
    sub.add_argument("--to", metavar="DIR", help="default: ~/.cache/kzoo or $KZOO_HOME")
    sub.add_argument("--version", type=int, help="require this version")
    sub.add_argument(
        "--force", action="store_true", help="replace a folder that differs"
    )
    return parser


# The commands.


def _list(arguments):
    from . import hub, registry

    names = registry.list_models(arguments.pattern)
    rows = []
    for name in names:
        model = registry.info(name)
        rows.append(
            {
                "name": name,
                "dataset": model.dataset,
                "saved": _saved(hub, name),
                "description": model.description,
            }
        )
    if arguments.json:
        _print_json(rows)
        return
    if not rows:
        raise ValueError(
            f"Expected a pattern that one of {registry.list_models()} matches. "
            f"Received: {arguments.pattern!r}"
        )
    _print_table(
        ["model", "data set", "SavedModel", "description"],
        [
            [
                row["name"],
                row["dataset"],
                ", ".join(f"v{v['version']} ({v['where']})" for v in row["saved"])
                or "none",
                row["description"],
            ]
            for row in rows
        ],
    )


def _info(arguments):
    from . import hub, registry

    model = registry.info(arguments.name)
    saved = _saved(hub, model.name)
    facts = {
        "name": model.name,
        "description": model.description,
        "task": model.task,
        "dataset": model.dataset,
        "input_shape": list(model.input_shape),
        "parameters": registry.build(model.name).count_params(),
        "paper": model.paper,
        "backends": list(model.backends),
        "recipe": model.recipe,
        "saved": saved,
    }
    card = saved and Path(saved[-1]["path"]).parent / hub.CARD
    text = card.read_text() if card and card.is_file() else None
    if arguments.json:
        _print_json({**facts, "card": text})
        return
    rows = [
        [key.replace("_", " "), _plain(value)]
        for key, value in facts.items()
        if key != "saved" and value not in (None, {}, [])
    ]
    rows += [["SavedModel", f"{v['path']} ({v['where']})"] for v in saved]
    _print_table(None, rows)
    if text:
        print(f"\n{text.rstrip()}")


def _train(arguments):
    import keras

    from . import registry
    from .training import train

    model = registry.info(arguments.name)
    overrides = _overrides(arguments.overrides)
    if "num_examples" in inspect.signature(model.entry_point).parameters:
        overrides.setdefault("num_examples", None)  # `train` counts them.
    asked = {
        "dataset": arguments.dataset,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "members": arguments.members,
        "max_shift": arguments.max_shift,
        "flip": arguments.flip,
        "recipe": arguments.recipe,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    recipe = {} if arguments.recipe else model.recipe
    # As `train` builds a model of that name, but with the overrides.
    keras.utils.set_random_seed(arguments.seed)
    with _to_stderr():
        result = train(
            registry.build(model.name, **overrides),
            **{"dataset": model.dataset, **recipe, **given},
            seed=arguments.seed,
            run_dir=arguments.run_dir or Path("runs") / model.name,
            resume=not arguments.fresh,
            data_dir=arguments.data_dir,
        )
    history = {key: values[-1] for key, values in result.history.items()}
    if result.reused:
        print("This run was finished already; --fresh trains anew.")
    _print_table(None, [[key, f"{value:.4f}"] for key, value in history.items()])
    print(f"{result.seconds:.1f} s of training. {result.run_dir}")


def _evaluate(arguments):
    from .training import evaluate

    model, dataset = _open(arguments.model)
    dataset = _dataset(arguments, dataset)
    where = {"dataset": dataset, "split": arguments.split}
    options = {"samples": arguments.samples, "data_dir": arguments.data_dir}
    report = None
    with _to_stderr():
        figures = evaluate(model, **where, **options)
        if arguments.diversity:
            from .diversity import diversity_report

            report = diversity_report(model, **where, **options)
    figures = {**where, **figures}
    if arguments.json:
        _print_json({**figures, **({"diversity": report.figures()} if report else {})})
        return
    _print_table(None, [[key, _plain(value)] for key, value in figures.items()])
    if report:
        print(f"\n{report}")


def _export(arguments):
    from .export import export

    with _to_stderr():
        path = export(
            _keras_model(Path(arguments.model).expanduser()),
            arguments.to,
            arguments.version,
            name=arguments.name,
            xla=not arguments.no_xla,
            overwrite=arguments.overwrite,
        )
    print(path)


def _predict(arguments):
    model, dataset = _servable(arguments.model)
    labels, signature = None, ""
    if arguments.input:
        inputs, signature = _read_inputs(arguments.input, model)
    else:
        from .datasets import load

        name = _dataset(arguments, dataset)
        with _to_stderr():
            examples, _ = load(name, arguments.split, data_dir=arguments.data_dir)
        batch = next(examples.batch(arguments.examples).as_numpy_iterator())
        wanted = model.signature().inputs
        if isinstance(batch[0], dict):  # A translator takes no targets.
            batch = {name: batch[0][name] for name in wanted}, batch[1]
        inputs, labels = _typed(batch[0], wanted), batch[1]
    _print_answer(model.predict(inputs, signature), labels, arguments.json)


def _serve(arguments):
    from .serving.models import ModelConfig
    from .serving.server import Server, read_model_config

    models = read_model_config(arguments.config) if arguments.config else {}
    for text in arguments.models:
        name, equals, model = text.partition("=")
        path = _resolve(model if equals else text)
        version = placing.version_of(path.name)
        if version is None:
            raise ValueError(
                "Expected a folder of integer versions, or one of these versions. "
                f"Received: {str(path)!r}"
            )
        # The folder of one version means that version; anything else, the newest.
        one = Path(model if equals else text).expanduser().absolute() == path
        versions = (version,) if one else None
        name = name if equals else path.parent.name
        if name in models:
            raise ValueError(f"Expected different names. Received: {name!r} twice")
        models[name] = ModelConfig(path.parent, versions)
    if not models:
        raise ValueError("Expected a model, or --config. Received: neither")
    server = Server(
        models,
        host=arguments.host,
        rest_port=arguments.port,
        grpc_port=arguments.grpc_port,
        xla=arguments.xla,
    )
    server.run()


def _download(arguments):
    from . import hub

    print(
        hub.download(
            arguments.name,
            arguments.source,
            arguments.to,
            arguments.version,
            arguments.force,
        )
    )


# Models.


def _saved(hub, name):
    """The SavedModels of a model on this machine, newest last."""
    return [
        {"version": version, "where": where, "path": str(place / name / str(version))}
        for version, where, place in sorted(
            (version, where, place)
            for where, place in (("carried", hub.PACKAGED), ("downloaded", hub.home()))
            for version in hub.versions(place / name)
        )
    ]


def _resolve(model):
    from . import hub

    return hub.resolve(model).absolute()


def _keras_model(path):
    """Loads a .keras file, or the trained model of a run's folder."""
    import keras

    from . import models  # noqa: F401  registers the layers

    file = path / "model.keras" if path.is_dir() else path
    if file.suffix != ".keras" or not file.is_file():
        raise ValueError(
            "Expected a .keras file, or the folder of a finished run. Received: "
            f"{str(path)!r}"
        )
    return keras.saving.load_model(file, compile=False)


def _open(text):
    """(model, name of its data set or None): a Keras model or a Servable."""
    path = Path(text).expanduser()
    if path.suffix == ".keras" or (path / "config.json").is_file():
        from .training.run_folder import read_config

        dataset = None
        if (path / "config.json").is_file():
            # name/version, or name/config/version
            dataset = read_config(path / "config.json").get("dataset")
            dataset = str(dataset or "").rpartition("/")[0]
        return _keras_model(path), dataset
    return _servable(text)


def _servable(text):
    """(SavedModel, name of its data set or None)."""
    from . import registry
    from .serving.servable import Servable

    path = _resolve(text)
    name = path.parent.name
    known = name in registry.list_models()
    return Servable(path), registry.info(name).dataset if known else None


def _dataset(arguments, dataset):
    if arguments.dataset or dataset:
        return arguments.dataset or dataset
    raise ValueError(f"Expected --dataset: {arguments.model!r} does not say its own")


# Input and output.


def _to_stderr():
    """Keeps what libraries print out of the command's own output."""
    return contextlib.redirect_stdout(sys.stderr)


def _read_inputs(path, servable):
    """(the inputs, the signature's name) that a file holds."""
    import numpy as np

    from .serving import predict_json, tensors

    if path.suffix in (".npy", ".npz"):
        with open(path, "rb") as handle:
            content = np.load(handle, allow_pickle=False)
            content = dict(content) if path.suffix == ".npz" else content
            return _typed(content, servable.signature().inputs), ""
    if path.suffix != ".json":
        raise ValueError(f"Expected .npy, .npz or .json. Received: {str(path)!r}")
    text = path.read_bytes().strip()
    if text.startswith(b"["):  # the rows alone
        json.loads(text)  # Nothing follows them.
        text = b'{"instances": %b}' % text
    return predict_json.read(*tensors.parse(text), servable)[:2]


def _typed(content, infos):
    """{input: array of its type} of one array-like, or of a dict of them."""
    from tensorflow.core.framework.types_pb2 import DataType

    from .serving import tensors

    if not isinstance(content, dict):
        content = dict.fromkeys(infos, content)
    if content.keys() != infos.keys():
        raise ValueError(
            f"Expected the inputs {sorted(infos)}. Received: {sorted(content)}"
        )
    return {
        name: tensors.typed(name, value, DataType.Name(infos[name].dtype))
        for name, value in content.items()
    }


def _print_answer(outputs, labels, as_json):
    """Prints an answer as a table or, row by row, as TensorFlow Serving's JSON."""
    import numpy as np

    if as_json or np.ndim(outputs.get("probabilities")) != 2:
        from .serving import tensors

        columns = {key: tensors.to_json(a, key) for key, a in outputs.items()}
        if labels is not None:
            columns["label"] = labels.tolist()
        sizes = {array.shape[:1] for array in outputs.values()}
        if len(sizes) == 1 and sizes != {()}:
            rows = zip(*columns.values(), strict=True)
            answer = {"predictions": [dict(zip(columns, r, strict=True)) for r in rows]}
        else:
            answer = {"outputs": columns}
        print(json.dumps(answer))
        return
    probabilities = outputs["probabilities"]
    said = probabilities.argmax(axis=1)
    table = []
    for i in range(len(said)):
        row = [str(i)] + ([str(labels[i])] if labels is not None else [])
        row += [str(said[i]), f"{probabilities[i, said[i]]:.4f}"]
        row += [
            f"{outputs[key][i]:.4f}"
            for key in ("predictive_entropy", "mutual_information")
            if key in outputs
        ]
        table.append(row)
    header = ["example", "label", "class", "probability", "entropy", "mutual inf."]
    if labels is None:
        header.remove("label")
    _print_table(header[: len(table[0])], table)


def _overrides(texts):
    """{key: value} of KEY=VALUE texts; a value is Python's, or else a text."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"Expected KEY=VALUE. Received: {text!r}")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key] = value
    return overrides


def _integer(name, least, most=math.inf):
    """A type for argparse, which gives its name in messages."""

    def parse(text):
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    parse.__name__ = name
    return parse


_positive = _integer("positive integer", 1)
_natural = _integer("integer >= 0", 0)
_port = _integer("port, 0 to 65535,", 0, 65535)


def _print_json(value):
    print(json.dumps(value, indent=2))


def _print_table(header, rows):
    """Prints columns, aligned; numbers to the right."""
    lines = ([header] if header else []) + rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first = 1 if header else 0
    numeric = [
        all(map(_is_number, column[first:])) for column in zip(*lines, strict=True)
    ]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _is_number(text):
    return re.fullmatch(r"-?[0-9][0-9.,]*", text) is not None


def _plain(value):
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={v}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _one_line(error):
    """An error's message; the kind too where the message alone would not say much."""
    from .serving.status import ServingError

    says = error.message if isinstance(error, ServingError) else str(error)
    text = " ".join(says.split())
    expected = (ValueError, OSError, EOFError, RuntimeError, ImportError, ServingError)
    if not text or not isinstance(error, expected):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


if __name__ == "__main__":
    command()
