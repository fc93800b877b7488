import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from tensorflow.core.protobuf import saved_model_pb2

from kzoo.zoo import hub


def graph(*ops):
    """A SavedModel with one node of each kind of operation."""
    saved_model = saved_model_pb2.SavedModel()
    meta_graph = saved_model.meta_graphs.add()
    meta_graph.meta_info_def.tags.append("serve")
    for i, op in enumerate(ops):
        meta_graph.graph_def.node.add(name=f"a_node_of_some_length_{i}", op=op)
    return saved_model.SerializeToString()


GRAPH = graph(*["MatMul"] * 200)
CONTENT = {
    "saved_model.pb": GRAPH,
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": bytes(range(256)) * 2000,
    "assets.extra/tf_serving_warmup_requests": b"",
}


@pytest.fixture(autouse=True)
def quiet_home(tmp_path, monkeypatch):
    """Nothing is carried, the cache is empty, and retries do not wait."""
    monkeypatch.setenv("KZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(hub, "BACKOFF_SECONDS", 0)


def write_model(root, name="net", version=1, content=CONTENT, card="# card\n"):
    for path, data in content.items():
        place = root / name / str(version) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    (root / name / "README.md").write_text(card)
    return hub.write_index(root)


@pytest.fixture
def mirror(tmp_path):
    root = tmp_path / "mirror"
    write_model(root)
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        behave = self.server.behaviour.get(self.path.rpartition("/")[2])
        if behave:
            behave(self)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(mirror):
    """Serves the mirror; `web.behaviour[file name]` misbehaves for one file."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(mirror))
    )
    server.daemon_threads = True
    server.behaviour, server.asked = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def servable(folder):
    """What TF Serving would see under a folder of models."""
    return sorted(
        f"{p.parent.name}/{p.name}" for p in folder.glob("*/*") if p.name.isdigit()
    )


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if "partial" in p.name]


def edit_index(root, change):
    index = json.loads((root / "index.json").read_text())
    change(index["models"]["net"])
    (root / "index.json").write_text(json.dumps(index))


# What is fetched, and where it goes.


@pytest.mark.parametrize("kind", ["http", "folder", "file url"])
def test_a_model_arrives_whole(kind, mirror, web, tmp_path):
    source = {"http": web.url + "/", "folder": mirror, "file url": mirror.as_uri()}
    place = hub.download("net", source[kind], tmp_path / "models")
    assert place == tmp_path / "models/net/1"
    assert contents(place) == CONTENT
    assert (place.parent / "README.md").read_text() == "# card\n"
    assert servable(tmp_path / "models") == ["net/1"]
    assert not leftovers(tmp_path / "models")


def test_the_packages_own_models_need_no_network(tmp_path):
    write_model(hub.PACKAGED)
    place = hub.download("net")
    assert place == tmp_path / "home/net/1" == hub.home() / "net/1"
    assert contents(place) == CONTENT


def test_an_intact_model_is_not_fetched_again(web, tmp_path):
    place = hub.download("net", web.url)
    assert len(web.asked) == 2 + len(CONTENT)
    stamps = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    del web.asked[:]
    assert hub.download("net", web.url) == place
    assert web.asked == ["/index.json"]
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == stamps


def test_a_lost_card_is_fetched_alone(web):
    place = hub.download("net", web.url)
    (place.parent / "README.md").unlink()
    del web.asked[:]
    hub.download("net", web.url)
    assert web.asked == ["/index.json", "/net/README.md"]
    assert (place.parent / "README.md").read_text() == "# card\n"


def damage_content(place):
    (place / "saved_model.pb").write_bytes(GRAPH[:-1] + b"?")


def damage_size(place):
    (place / "variables/variables.index").write_bytes(b"inde")


def damage_missing(place):
    (place / "variables/variables.index").unlink()


def damage_extra(place):
    (place / "variables/other").write_bytes(b"x")


def damage_link(place):
    (place / "saved_model.pb").rename(place.parent / "graph")
    (place / "saved_model.pb").symlink_to(place.parent / "graph")


@pytest.mark.parametrize(
    "damage",
    [damage_content, damage_size, damage_missing, damage_extra, damage_link],
)
def test_a_damaged_model_is_named_and_replaced_only_by_force(damage, mirror):
    place = hub.download("net", mirror)
    damage(place)
    before = contents(place)
    with pytest.raises(hub.DownloadError, match="already there and differs"):
        hub.download("net", mirror)
    assert contents(place) == before
    assert hub.download("net", mirror, force=True) == place
    assert contents(place) == CONTENT
    assert servable(hub.home()) == ["net/1"]


def test_something_else_in_the_place_is_replaced_only_by_force(mirror):
    (hub.home() / "net").mkdir(parents=True)
    (hub.home() / "net/1").write_text("a note")
    with pytest.raises(hub.DownloadError, match="is not a folder"):
        hub.download("net", mirror)
    assert (hub.home() / "net/1").read_text() == "a note"
    assert contents(hub.download("net", mirror, force=True)) == CONTENT


def test_other_versions_stay(mirror):
    hub.download("net", mirror)
    write_model(mirror, version=2, content={**CONTENT, "saved_model.pb": graph("Add")})
    with pytest.raises(ValueError, match="Expected version 2.*Received: 1"):
        hub.download("net", mirror, version=1)
    hub.download("net", mirror, version=2)
    assert servable(hub.home()) == ["net/1", "net/2"]
    assert hub.resolve("net") == hub.home() / "net/2"


# Sources that misbehave. Nothing may be placed, and the reason is said.


def answer(body, status=200, length=None, headers=()):
    def behave(handler):
        handler.send_response(status)
        for key, value in headers:
            handler.send_header(key, value)
        if length is not False:
            handler.send_header("Content-Length", str(length or len(body)))
        handler.send_header("Connection", "close")
        handler.close_connection = True
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def redirect(target):
    return answer(b"", 302, headers=[("Location", target)])


DATA = CONTENT["variables/variables.data-00000-of-00001"]
BAD = {
    "wrong bytes": (answer(DATA[::-1]), "has the SHA-256 sum"),
    "truncated": (answer(DATA[:5000], length=len(DATA)), "IncompleteRead|ended after"),
    "truncated without a length": (answer(DATA[:5000], length=False), "ended after"),
    "too long": (answer(DATA + b"x"), "larger than 512000 bytes"),
    "not found": (answer(b"no", 404), "answered 404"),
    "server error": (answer(b"no", 503), "answered 503"),
    "redirect to a file": (
        redirect("file:///etc/passwd"),
        "data-00000-of-00001 redirects from http to file. Expected: an http or https "
        "URL. Received: 'file:///etc/passwd'",
    ),
    "redirect to ftp": (redirect("ftp://127.0.0.1/x"), "from http to ftp"),
    "redirect to no address": (redirect("http://[::1"), r"Received: 'http://\[::1'"),
    "redirect to no port": (redirect("http://h:99999/"), "Received: 'http://h:99999/'"),
    "redirect to no host": (
        redirect("https://"),
        "to no valid URL.*Received: 'https://'",
    ),
    "redirect to no text": (redirect("/\xff"), "to no valid URL"),
    "redirect to itself": (redirect("variables.data-00000-of-00001"), "redirects"),
    "gzip bomb": (
        answer(
            gzip.compress(b"0" * (1 << 22)),
            headers=[("Content-Encoding", "gzip")],
        ),
        "ended after",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_misbehaving_server_places_nothing(kind, web):
    behave, reason = BAD[kind]
    web.behaviour["variables.data-00000-of-00001"] = behave
    with pytest.raises(hub.DownloadError, match=reason) as caught:
        hub.download("net", web.url)
    assert "\n" not in str(caught.value)
    assert servable(hub.home()) == []
    assert not leftovers(hub.home())
    assert not (hub.home() / "net/README.md").exists()
    web.behaviour.clear()
    assert contents(hub.download("net", web.url)) == CONTENT


def test_what_comes_compressed_is_checked_as_it_is_stored(mirror, web):
    content = CONTENT | {"assets/words.gz": gzip.compress(b"words")}
    write_model(mirror, content=content)
    stored = answer(content["assets/words.gz"], headers=[("Content-Encoding", "gzip")])
    web.behaviour["words.gz"] = stored
    assert contents(hub.download("net", web.url)) == content


def test_what_comes_with_a_redirect_is_not_read(mirror, web):
    (mirror / "elsewhere").write_bytes(b"index")
    sent = []

    def move(handler):
        answer(b"", 302, length=False, headers=[("Location", "/elsewhere")])(handler)
        with contextlib.suppress(OSError):
            while len(sent) < 1000:
                handler.wfile.write(b"0" * (1 << 16))
                sent.append(1)

    web.behaviour["variables.index"] = move
    assert contents(hub.download("net", web.url)) == CONTENT
    assert len(sent) < 1000


def test_attempts_are_bounded_and_only_for_what_may_pass(web):
    name = "variables.data-00000-of-00001"
    for kind, times in (
        ("server error", 3),
        ("truncated", 3),
        ("wrong bytes", 1),
        ("redirect to a file", 1),
        ("redirect to no address", 1),
    ):
        web.behaviour[name] = BAD[kind][0]
        del web.asked[:]
        with pytest.raises(hub.DownloadError):
            hub.download("net", web.url)
        assert sum(path.endswith(name) for path in web.asked) == times


def test_a_passing_failure_is_survived(web):
    def once(handler):
        web.behaviour.clear()
        answer(DATA[:300], length=len(DATA))(handler)

    web.behaviour["variables.data-00000-of-00001"] = once
    assert contents(hub.download("net", web.url)) == CONTENT


def test_a_silent_server_is_given_up(web, monkeypatch):
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.2)
    web.behaviour["saved_model.pb"] = lambda handler: time.sleep(1)
    with pytest.raises(hub.DownloadError, match="does not answer"):
        hub.download("net", web.url)
    assert servable(hub.home()) == []


def test_a_dripping_server_is_given_up(web, monkeypatch):
    monkeypatch.setattr(hub, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(hub, "SLOWEST_BYTES_PER_SECOND", 1 << 30)

    def drip(handler):
        answer(b"", length=len(GRAPH))(handler)
        for _ in range(100):
            handler.wfile.write(b"g")
            time.sleep(0.05)

    web.behaviour["saved_model.pb"] = drip
    start = time.monotonic()
    with pytest.raises(hub.DownloadError, match="too slowly"):
        hub.download("net", web.url)
    assert time.monotonic() - start < 3
    assert servable(hub.home()) == []


def test_nobody_listens(tmp_path):
    with pytest.raises(hub.DownloadError, match="(?i)refused") as caught:
        hub.download("net", "http://user:secret@127.0.0.1:9/saved_models")
    assert "secret" not in str(caught.value)


def test_an_endless_index_is_not_read_to_its_end(web, monkeypatch):
    monkeypatch.setattr(hub, "MAX_INDEX_BYTES", 100)
    with pytest.raises(hub.DownloadError, match="larger than 100 bytes"):
        hub.download("net", web.url)


@pytest.mark.parametrize(
    "source", ["ftp://host/x", "s3://bucket", "http://", "http://h/x?token=1"]
)
def test_no_mirror(source):
    with pytest.raises(ValueError, match="Expected a mirror.*Received"):
        hub.download("net", source)


def test_no_such_model(mirror):
    with pytest.raises(ValueError, match=r"\['net'\]. Received: 'nett'"):
        hub.download("nett", mirror)
    with pytest.raises(ValueError, match="carries no models"):
        hub.download("net")
    with pytest.raises(hub.DownloadError, match="not a file of the mirror"):
        hub.download("net", mirror / "nowhere")
    assert not hub.home().exists()


@pytest.mark.parametrize(
    "name", ["../net", "/net", "", ".net", "a b", "net\n", None, "7", "n" * 129]
)
def test_no_models_name(name, mirror):
    with pytest.raises(ValueError, match="Expected the name of a model"):
        hub.download(name, mirror)


def test_a_file_mirror_is_not_led_out_of_its_folder(mirror, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(mirror / "net/1/saved_model.pb", outside)
    (mirror / "net/1/saved_model.pb").symlink_to(outside)
    with pytest.raises(hub.DownloadError, match="not a file of the mirror"):
        hub.download("net", mirror)
    (mirror / "net/1/saved_model.pb").unlink()
    os.mkfifo(mirror / "net/1/saved_model.pb")
    with pytest.raises(hub.DownloadError, match="not a file of the mirror"):
        hub.download("net", mirror)
    assert servable(hub.home()) == []


def test_no_room(mirror, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(hub.DownloadError, match="has 10 left"):
        hub.download("net", mirror)
    assert servable(hub.home()) == []


# Indexes that lie.

SUM = hashlib.sha256(b"").hexdigest()
PATHS = [
    "../../evil",
    "/etc/passwd",
    "a/../b",
    "./a",
    "a//b",
    "a\\b",
    "C:evil",
    "a\nb",
    "a\x00b",
    "é",
    ".hidden",
    "variables/",
    "",
    "a/" * 8 + "b",
    "a" * 129,
    "SAVED_model.pb",
    "saved_model.pb",
    "saved_model.pb/x",
    "Variables",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leads_elsewhere(path, mirror):
    entry = {"path": path, "bytes": 0, "sha256": SUM}
    edit_index(mirror, lambda net: net["files"].append(entry))
    with pytest.raises(hub.DownloadError, match="not a valid index"):
        hub.download("net", mirror)
    assert not hub.home().exists()


WRONG = {
    "negative size": lambda net: net["files"][0].update(bytes=-1),
    "true size": lambda net: net["files"][0].update(bytes=True),
    "huge size": lambda net: net["files"][0].update(bytes=1 << 40),
    "text size": lambda net: net["files"][0].update(bytes="5"),
    "huge sum": lambda net: [f.update(bytes=1 << 33) for f in net["files"]],
    "short hash": lambda net: net["files"][0].update(sha256="ab"),
    "upper-case hash": lambda net: net["files"][0].update(sha256="A" * 64),
    "no hash": lambda net: net["files"][0].pop("sha256"),
    "no files": lambda net: net.update(files=[]),
    "files object": lambda net: net.update(files={}),
    "too many files": lambda net: net.update(files=net["files"] * 1000),
    "no graph": lambda net: net.update(files=net["files"][:1]),
    "version text": lambda net: net.update(version="1"),
    "version path": lambda net: net.update(version="../1"),
    "version negative": lambda net: net.update(version=-1),
    "version huge": lambda net: net.update(version=2**63),
    "card elsewhere": lambda net: net["card"].update(path="../README.md"),
    "card in the version": lambda net: net["card"].update(path="1/saved_model.pb"),
    "no card": lambda net: net.pop("card"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_index_with_a_wrong_field(what, mirror):
    edit_index(mirror, WRONG[what])
    with pytest.raises(hub.DownloadError, match="not a valid index") as caught:
        hub.download("net", mirror)
    assert "\n" not in str(caught.value)
    assert not hub.home().exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"models": []}', '{"models": {"..": {}}}', "[" * 100000, "\xff"],
)
def test_no_index(text, mirror):
    (mirror / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(hub.DownloadError, match="not a valid index"):
        hub.download("net", mirror)


def test_a_mirror_may_not_change_what_the_package_knows(tmp_path):
    write_model(hub.PACKAGED)
    evil = tmp_path / "evil"
    write_model(evil, content={**CONTENT, "saved_model.pb": b"evil"})
    with pytest.raises(hub.DownloadError, match="other files than this package's own"):
        hub.download("net", evil)
    assert not hub.home().exists()
    # The same index, but other bytes behind it.
    shutil.copy(hub.PACKAGED / "index.json", evil / "index.json")
    with pytest.raises(hub.DownloadError, match="SHA-256|ended after"):
        hub.download("net", evil)
    assert servable(hub.home()) == []
    # A version it does not know is the mirror's to describe.
    shutil.rmtree(evil / "net/1")
    write_model(evil, version=2, content={**CONTENT, "saved_model.pb": graph("Add")})
    assert hub.download("net", evil).name == "2"


@pytest.mark.parametrize(
    "data, reason",
    [
        (graph("MatMul", "ReadFile"), r"\['ReadFile'\]. Refused"),
        (graph("PyFunc", "WriteFile"), r"\['PyFunc', 'WriteFile'\]. Refused"),
        (b"no protocol buffer", "is no SavedModel"),
        (b"", "is no SavedModel"),
    ],
)
def test_a_foreign_program_that_does_more_than_compute(data, reason, mirror):
    write_model(mirror, content={**CONTENT, "saved_model.pb": data})
    with pytest.raises(hub.DownloadError, match=reason):
        hub.download("net", mirror)
    assert servable(hub.home()) == []
    assert not leftovers(hub.home())


# Interruptions and company.


def test_an_interruption_leaves_nothing(web):
    def interrupt(handler):
        answer(GRAPH[:100], length=len(GRAPH))(handler)
        # As Ctrl-C does, while the download waits for the rest.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.5)

    web.behaviour["saved_model.pb"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        hub.download("net", web.url)
    assert servable(hub.home()) == []
    assert not leftovers(hub.home())


def test_a_killed_download_leaves_no_model_and_the_next_completes(web, tmp_path):
    reached = threading.Event()

    def stall(handler):
        answer(DATA[:100000], length=len(DATA))(handler)
        reached.set()
        time.sleep(5)

    web.behaviour["variables.data-00000-of-00001"] = stall
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from kzoo.zoo import hub; hub.download(*sys.argv[1:])",
            "net",
            web.url,
        ]
    )
    assert reached.wait(60)
    time.sleep(0.2)
    assert leftovers(hub.home())
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert servable(hub.home()) == []
    with pytest.raises(ValueError, match="Known models"):
        hub.resolve("net")
    web.behaviour.clear()
    assert contents(hub.download("net", web.url)) == CONTENT
    assert not leftovers(hub.home())


def test_downloads_at_the_same_time_fetch_once(web):
    places, errors = [], []

    def fetch():
        try:
            places.append(hub.download("net", web.url))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(places)) == 1
    assert contents(places[0]) == CONTENT
    assert sum(path.endswith("saved_model.pb") for path in web.asked) == 1


# Finding a model.


def test_resolve_takes_paths_and_names(mirror, tmp_path, monkeypatch):
    assert hub.resolve(mirror / "net/1") == mirror / "net/1"
    assert hub.resolve(mirror / "net") == mirror / "net/1"
    assert hub.resolve(str(mirror / "net")) == mirror / "net/1"
    with pytest.raises(ValueError, match=r"Known models: \[\]. Received: 'net'"):
        hub.resolve("net")
    monkeypatch.chdir(mirror)
    assert hub.resolve("net").samefile(mirror / "net/1")
    write_model(hub.PACKAGED)
    assert hub.resolve("net") == hub.PACKAGED / "net/1"
    assert hub.resolve("./net").samefile(mirror / "net/1")
    hub.download("net")
    assert hub.resolve("net") == hub.PACKAGED / "net/1"
    write_model(mirror, version=10)
    hub.download("net", mirror)
    assert hub.resolve("net") == hub.home() / "net/10"
    with pytest.raises(ValueError, match=r"Known models: \['net'\]"):
        hub.resolve("other")


def test_versions_are_read_as_tf_serving_reads_them(tmp_path):
    for name in ("1", "2", "10", "02", "-3", "+4", "5.partial", ".6", "７", "8"):
        (tmp_path / name).mkdir()
        if name != "8":
            (tmp_path / name / "saved_model.pb").touch()
    assert hub.versions(tmp_path) == [1, 2, 10]
    assert hub.versions(tmp_path / "nowhere") == []


def test_write_index_lists_the_newest_version_exactly(tmp_path):
    write_model(tmp_path)
    write_model(tmp_path, version=2, content={"saved_model.pb": b"abc"})
    (tmp_path / "notes").mkdir()
    path = hub.write_index(tmp_path)
    assert json.loads(path.read_text()) == {
        "models": {
            "net": {
                "version": 2,
                "card": {
                    "path": "README.md",
                    "bytes": 7,
                    "sha256": hashlib.sha256(b"# card\n").hexdigest(),
                },
                "files": [
                    {
                        "path": "saved_model.pb",
                        "bytes": 3,
                        "sha256": hashlib.sha256(b"abc").hexdigest(),
                    }
                ],
            }
        }
    }
    assert not leftovers(tmp_path)


def test_write_index_refuses_what_nobody_could_read(tmp_path):
    write_model(tmp_path)
    before = (tmp_path / "index.json").read_text()
    (tmp_path / "net/1/.hidden").touch()
    with pytest.raises(ValueError, match="plain relative paths"):
        hub.write_index(tmp_path)
    (tmp_path / "net/1/.hidden").unlink()
    (tmp_path / "net/README.md").unlink()
    with pytest.raises(ValueError, match="Expected a model card"):
        hub.write_index(tmp_path)
    assert (tmp_path / "index.json").read_text() == before
