"""Fetches SavedModels and verifies them: the one way a model comes to a machine.

A mirror is a `saved_models/` folder as this repository has one, on a disk or behind
any static http(s) server:

    index.json                  names, versions, sizes and SHA-256 sums
    <name>/README.md            the model card
    <name>/<version>/...        the SavedModel, in TF Serving's layout

There are no archives to unpack. Every file is checked against the index while it
arrives, in a folder that no server looks at, and the whole is then renamed into
place, so that a servable name never holds half a model.
"""

import hashlib
import io
import json
import os
import re
import shutil
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path

from . import placing

INDEX = "index.json"
CARD = "README.md"
# What the installed package carries.
PACKAGED = Path(__file__).resolve().parent.parent / "saved_models"

CHUNK = 1 << 16
CONNECT_SECONDS, SILENCE_SECONDS = 10, 30
GRACE_SECONDS, SLOWEST_BYTES_PER_SECOND = 60, 1 << 14
REDIRECTS = 5
ATTEMPTS, BACKOFF_SECONDS = 3, 0.5
MAX_INDEX_BYTES = 1 << 20
MAX_MODEL_BYTES = 1 << 34
MAX_FILES = 1000
MAX_DEPTH = 8

SHA256 = re.compile(r"[0-9a-f]{64}")


class DownloadError(RuntimeError):
    """A source did not deliver what its index, or this package's, promises."""


class _Transient(DownloadError):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True)
class File:
    """One file of an index: its relative path, size and SHA-256 sum."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """One model of an index: its version, its card and the SavedModel's files."""

    name: str
    version: int
    card: File
    files: tuple[File, ...]

    @property
    def bytes(self):
        """The size of the SavedModel."""
        return sum(file.bytes for file in self.files)


def home():
    """Returns the folder of downloaded models: `KZOO_HOME`, or `~/.cache/kzoo`."""
    return Path(os.environ.get("KZOO_HOME") or "~/.cache/kzoo").expanduser()


def packaged():
    """Returns the models carried inside the installed package, as {name: Model}."""
    if not (PACKAGED / INDEX).exists():
        return {}
    return _index(_Folder(PACKAGED))


def versions(model_dir):
    """Returns the versions in a model's folder, smallest first.

    Version folders are named as TF Serving names them: by an integer. A name with a
    sign, a leading zero or anything else is not a version.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        return []
    found = (
        placing.version_of(entry.name)
        for entry in model_dir.iterdir()
        if (entry / "saved_model.pb").is_file()
    )
    return sorted(version for version in found if version is not None)


def resolve(name_or_path):
    """Returns the folder of a model's newest version.

    Args:
        name_or_path: The name of a model that the package carries or that was
            downloaded, or the path of a folder: a SavedModel, or a folder of
            integer versions of it. A bare name means a model before it means a
            folder of the working directory; `./name` is always a path.

    Returns:
        Path of a folder that holds `saved_model.pb`. Of a carried and a downloaded
        version the newer one is taken.

    Raises:
        ValueError: There is no such model.

    Example:

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model" / "3"
    >>> folder.mkdir(parents=True)
    >>> _ = (folder / "saved_model.pb").write_bytes(b"")
    >>> resolve(folder.parent).name
    '3'
    """
    text = os.fspath(name_or_path)
    if placing.is_model_name(name_or_path):
        found = [
            (version, place == PACKAGED, place / text / str(version))
            for place in (PACKAGED, home())
            for version in versions(place / text)
        ]
        if found:
            return max(found)[2]
    path = Path(text).expanduser()
    if (path / "saved_model.pb").is_file():
        return path
    if versions(path):
        return path / str(versions(path)[-1])
    known = sorted(
        set(packaged()) | {p.name for p in _subfolders(home()) if versions(p)}
    )
    raise ValueError(
        "Expected the name of a carried or downloaded model, or the path of a "
        f"SavedModel or of a folder of its versions. Known models: {known}. "
        f"Received: {text!r}"
    )


def download(name, source=None, directory=None, version=None, force=False):
    """Fetches one model, checks it, and places it at `directory/name/version/`.

    Where the package's own index knows the name and version, a mirror must offer
    exactly that; for others the mirror's index is what files are checked against. A
    SavedModel is a program: one that this package does not know is refused when it
    has operations that reach files or the network, and should come only from a mirror
    you trust.

    A model that is there and intact is not fetched again. Downloads of the same
    model into the same folder wait for each other.

    Args:
        name: The model's name.
        source: None for the models carried inside the package; otherwise a mirror:
            an http(s) URL, a file URL or the path of a folder.
        directory: Where to place it. Defaults to `home()`.
        version: The version expected; None takes what the source offers.
        force: Whether to replace a folder that is already in the place and differs
            from the index.

    Returns:
        Path of the version's folder.

    Raises:
        ValueError: The source has no such model or version, or is none.
        DownloadError: The source did not deliver what the index promises, or the
            place holds something else. Nothing was placed then.
    """
    if not placing.is_model_name(name):
        raise ValueError(f"Expected the name of a model. Received: {name!r}")
    mirror = _source(source)
    model = _offer(mirror, name, version)
    folder = Path(directory or home()).expanduser() / name
    target = folder / str(model.version)
    folder.mkdir(parents=True, exist_ok=True)
    with placing.locked(folder):
        partial = folder / f".{model.version}.partial"
        card = folder / CARD
        card_missing = _difference(folder, (model.card,)) is not None
        missing = not os.path.lexists(target)
        if not missing:
            difference = _difference(target, model.files, whole=True)
            if difference and not force:
                raise DownloadError(
                    f"{target} is already there and differs from the index: "
                    f"{difference}. Move it away, or replace it with force "
                    "(kzoo download --force)."
                )
            missing = difference is not None
        if not (missing or card_missing):
            return target
        wanted = [(f"{model.version}/", file) for file in model.files if missing]
        wanted += [("", model.card)] if card_missing else []
        try:
            partial.mkdir()
            _fetch(mirror, name, wanted, partial)
            if missing and packaged().get(name) != model:
                _check_program(partial / str(model.version), mirror.shown(name))
            if card_missing:
                placing.place(partial / CARD, card)
            if missing:
                placing.place(partial / str(model.version), target)
        finally:
            placing.remove(partial)
    return target


def write_index(saved_models_dir):
    """Writes the index.json of a folder of models, with the newest version of each.

    Args:
        saved_models_dir: A folder of `<name>/README.md` and
            `<name>/<version>/saved_model.pb` with what belongs to it.

    Returns:
        Path of the index.

    Raises:
        ValueError: A model has no card, or a name that no index may hold.
    """
    root = Path(saved_models_dir)
    models = {}
    for folder in sorted(_subfolders(root)):
        if not versions(folder):
            continue
        if not (folder / CARD).is_file():
            raise ValueError(f"Expected a model card. Received: no {folder / CARD}")
        version = versions(folder)[-1]
        base = folder / str(version)
        models[folder.name] = {
            "version": version,
            "card": asdict(_measured(folder, CARD)),
            "files": [asdict(_measured(base, path)) for path in _files(base)],
        }
    text = json.dumps({"models": models}, indent=2, sort_keys=True) + "\n"
    try:
        _parse(text, root / INDEX)
    except DownloadError as error:
        raise ValueError(str(error)) from None
    placing.write(root / INDEX, text)
    return root / INDEX


# The index.


def _index(mirror):
    """Reads and validates a mirror's index."""
    out = io.BytesIO()
    _patiently(lambda: _copy(mirror, INDEX, MAX_INDEX_BYTES, _rewound(out)))
    return _parse(out.getvalue(), mirror.shown(INDEX))


def _offer(mirror, name, version):
    """The model as both the mirror and, where it knows it, this package promise."""
    models = _index(mirror)
    if name not in models:
        raise ValueError(
            f"Expected one of the models that {mirror.shown()} offers: "
            f"{sorted(models)}. Received: {name!r}"
        )
    model = models[name]
    if version is not None and version != model.version:
        raise ValueError(
            f"Expected version {model.version}, which is what {mirror.shown()} "
            f"offers of {name!r}. Received: {version!r}"
        )
    known = packaged().get(name)
    if known and known.version == model.version and known != model:
        raise DownloadError(
            f"{mirror.shown()} offers {name!r} version {model.version} with other "
            "files than this package's own index has. Refused: one of the two "
            "is not the published model."
        )
    return model


def _parse(text, where):
    """Returns {name: Model} of an index, or refuses it whole."""

    def require(truth, expected, received):
        if not truth:
            raise DownloadError(
                f"{where} is not a valid index: expected {expected}. "
                f"Received: {str(received)[:100]!r}"
            )

    def field(mapping, key, kind, what):
        require(isinstance(mapping, dict), f"{what} to be an object", mapping)
        value = mapping.get(key)
        # bool is an int in Python, not in an index.
        require(type(value) is kind, f"{key!r} of {what}: {kind.__name__}", value)
        return value

    def file(entry, what):
        path = field(entry, "path", str, what)
        parts = path.split("/")
        require(
            len(parts) <= MAX_DEPTH and all(map(placing.NAME.fullmatch, parts)),
            f"plain relative paths in {what}",
            path,
        )
        size = field(entry, "bytes", int, what)
        require(0 <= size <= MAX_MODEL_BYTES, f"a size in {what}", size)
        digest = field(entry, "sha256", str, what)
        require(SHA256.fullmatch(digest), f"a SHA-256 sum in {what}", digest)
        return File(path, size, digest)

    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DownloadError(f"{where} is not a valid index: {error}") from None
    models = {}
    for name, entry in field(document, "models", dict, "the index").items():
        require(placing.is_model_name(name), "plain model names", name)
        version = field(entry, "version", int, name)
        require(0 <= version <= placing.MAX_VERSION, f"a version of {name}", version)
        card = file(field(entry, "card", dict, name), f"the card of {name}")
        require(card.path == CARD, f"the card of {name} to be {CARD}", card.path)
        listed = field(entry, "files", list, name)
        require(0 < len(listed) <= MAX_FILES, f"files of {name}", len(listed))
        files = tuple(file(item, f"the files of {name}") for item in listed)
        # Some file systems take two spellings for one file.
        paths = {item.path.casefold() for item in files}
        require(len(paths) == len(files), f"each path of {name} once", sorted(paths))
        folders = {path[: m.start()] for path in paths for m in re.finditer("/", path)}
        require(
            not paths & folders,
            f"no path of {name} to be both a file and a folder",
            sorted(paths & folders),
        )
        require(
            "saved_model.pb" in {item.path for item in files},
            f"a saved_model.pb in {name}",
            sorted(paths),
        )
        model = Model(name, version, card, tuple(sorted(files, key=lambda f: f.path)))
        require(
            model.bytes <= MAX_MODEL_BYTES,
            f"{name} to hold at most {MAX_MODEL_BYTES} bytes",
            model.bytes,
        )
        models[name] = model
    return models


# Sources.


def _source(source):
    if source is None:
        if not (PACKAGED / INDEX).exists():
            raise ValueError(
                "This installation carries no models: expected a mirror as the source."
            )
        return _Folder(PACKAGED)
    text = os.fspath(source)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not scheme:
        return _Folder(Path(text).expanduser())
    url = urllib.parse.urlsplit(text)
    if url.scheme in ("http", "https") and url.netloc and not url.query + url.fragment:
        return _Web(text.rstrip("/"))
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return _Folder(Path(urllib.parse.unquote(url.path)))
    raise ValueError(
        "Expected a mirror: an http(s) URL without query, a file URL or the path of "
        f"a folder. Received: {text!r}"
    )


class _Folder:
    """A mirror on a disk."""

    def __init__(self, root):
        self.root = root

    def shown(self, path=""):
        return str(self.root / path)

    def chunks(self, path, limit):
        place = self.root / path
        # A link may lead out of the folder, and a pipe would keep us waiting.
        if not place.is_file() or not place.resolve().is_relative_to(
            self.root.resolve()
        ):
            raise DownloadError(f"{place} is not a file of the mirror")
        with open(place, "rb") as handle:
            while chunk := handle.read(CHUNK):
                yield chunk


class _Web:
    """A mirror behind a static http(s) server."""

    def __init__(self, url):
        import requests

        self.url = url
        self.session = requests.Session()
        self.session.max_redirects = REDIRECTS
        self.session.headers["Accept-Encoding"] = "identity"
        self.session.hooks["response"].append(self.stay_on_the_web)

    def shown(self, path=""):
        return _without_login(f"{self.url}/{path}".rstrip("/"))

    def stay_on_the_web(self, response, *args, **kwargs):
        """Refuses a redirect to another scheme or to no URL, before it is followed."""
        import requests

        if not response.is_redirect:
            return
        response.raw.close()  # requests would read all that comes with it
        target = response.headers["location"]
        before = urllib.parse.urlsplit(response.url).scheme
        try:
            target = self.session.get_redirect_target(response)
            url = urllib.parse.urljoin(response.url, target)
            after = urllib.parse.urlsplit(url).scheme
            requests.Request("GET", url).prepare()
        except ValueError:
            after = "no valid URL"
        if after != before and (before, after) != ("http", "https"):
            expected = "an https URL" if before == "https" else "an http or https URL"
            raise DownloadError(
                f"{_without_login(response.url)} redirects from {before} to {after}. "
                f"Expected: {expected}. Received: {target[:200]!r}"
            )

    def chunks(self, path, limit):
        import requests
        import urllib3

        deadline = time.monotonic() + GRACE_SECONDS + limit / SLOWEST_BYTES_PER_SECOND
        try:
            response = self.session.get(
                f"{self.url}/{urllib.parse.quote(path)}",
                stream=True,
                timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
            )
            with response:
                if response.status_code != 200:
                    again = response.status_code == 429 or response.status_code >= 500
                    raise (_Transient if again else DownloadError)(
                        f"{self.shown(path)} answered {response.status_code} "
                        f"{response.reason}"
                    )
                # read1 returns what has come, so that a server which drips is
                # noticed; read would wait for a full chunk. The index's sizes and
                # sums are those of the files as they are stored.
                while chunk := response.raw.read1(CHUNK, decode_content=False):
                    yield chunk
                    if time.monotonic() > deadline:
                        raise DownloadError(f"{self.shown(path)} comes too slowly")
        except (requests.TooManyRedirects, requests.exceptions.InvalidURL) as error:
            raise DownloadError(f"{self.shown(path)}: {error}") from None
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise _Transient(f"{self.shown(path)} does not answer") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Transient(f"{self.shown(path)}: {_reason(error)}") from None


def _without_login(url):
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _reason(error):
    """The innermost reason of a chain of network errors."""
    for argument in (getattr(error, "reason", None), *error.args):
        if isinstance(argument, Exception):
            return _reason(argument)
    return str(error).rpartition(": ")[2] or type(error).__name__


# Files.


def _fetch(mirror, name, wanted, partial):
    """Fetches (folder, File) pairs of one model into `partial`, each checked."""
    from tqdm.auto import tqdm

    total = sum(file.bytes for _, file in wanted)
    free = shutil.disk_usage(partial).free
    if total > free:
        raise DownloadError(f"{name} takes {total} bytes; {partial} has {free} left")
    with tqdm(
        total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        for folder, file in wanted:
            place = partial / folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            path = f"{name}/{folder}{file.path}"
            with open(place, "xb") as out:
                digest = _patiently(
                    lambda path=path, file=file, out=out: _copy(
                        mirror, path, file.bytes, _rewound(out), bar, exact=True
                    )
                )
            if digest != file.sha256:
                raise DownloadError(
                    f"{mirror.shown(path)} has the SHA-256 sum {digest}; the index "
                    f"says {file.sha256}"
                )


def _check_program(folder, shown):
    """Refuses a SavedModel that could do more than compute."""
    from .serving import graph

    try:
        forbidden = graph.forbidden_ops(graph.read(folder))
    except ValueError as error:
        raise DownloadError(f"{shown} is no SavedModel: {error}") from None
    if forbidden:
        raise DownloadError(
            f"{shown} has operations that no model needs to compute: {forbidden}. "
            "Refused."
        )


def _copy(mirror, path, limit, out, bar=None, exact=False):
    """Streams a file, never past `limit` bytes; returns its SHA-256 sum."""
    digest, received = hashlib.sha256(), 0
    try:
        for chunk in mirror.chunks(path, limit):
            received += len(chunk)
            if received > limit:
                raise DownloadError(
                    f"{mirror.shown(path)} is larger than {limit} bytes: refused"
                )
            digest.update(chunk)
            out.write(chunk)
            if bar is not None:
                bar.update(len(chunk))
        if exact and received < limit:
            raise _Transient(
                f"{mirror.shown(path)} ended after {received} of {limit} bytes"
            )
    except _Transient:
        if bar is not None:
            bar.update(-received)
        raise
    return digest.hexdigest()


def _patiently(attempt):
    """Calls `attempt` again after a failure that may pass."""
    for failures in range(ATTEMPTS):
        try:
            return attempt()
        except _Transient:
            if failures + 1 == ATTEMPTS:
                raise
            time.sleep(BACKOFF_SECONDS * 2**failures)


def _rewound(out):
    out.seek(0)
    out.truncate()
    return out


def _difference(folder, files, whole=False):
    """What keeps `folder` from holding exactly these files, or None.

    With `whole`, nothing else may be in it.
    """
    if not folder.is_dir():
        return f"{folder} is not a folder"
    for file in files:
        place = folder / file.path
        if not place.is_file() or place.is_symlink():
            return f"{file.path} is missing"
        if place.stat().st_size != file.bytes or _measured(folder, file.path) != file:
            return f"{file.path} has other content"
    extra = set(_files(folder)) - {file.path for file in files} if whole else ()
    return f"{min(extra)} is not part of the model" if extra else None


def _measured(folder, path):
    with open(folder / path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
        return File(path, handle.tell(), digest.hexdigest())


def _files(folder):
    return sorted(
        entry.relative_to(folder).as_posix()
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir()
    )


def _subfolders(folder):
    return [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
