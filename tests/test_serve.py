"""The local page of a run: what it answers, what it refuses, and how it is used in a browser."""

import http.client
import io
import json
import signal
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_tacl import AttentionEmbedder
from pml_tacl.cli.main import main
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex
from pml_tacl.serve import MAX_UPLOAD, RunSearcher, SearchServer
from pml_tacl.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "photos"
    (folder / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, cells in enumerate(rng.integers(0, 256, (14, 5, 4, 3), dtype=np.uint8)):
        path = folder / ("b" if number % 2 else "") / f"{number:02} & <b>.png"
        Image.fromarray(cells).resize((80, 100), Image.Resampling.BICUBIC).save(path)
    # Links and names that lead out: an index may hold them, and the page must not show them.
    Image.new("RGB", (30, 30), "red").save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


@pytest.fixture(scope="module")
def searcher(photos):
    torch.manual_seed(0)
    model = AttentionEmbedder("test_resnet", False, embedding_dim=8)
    images = ImageFiles(photos, transform=model.transform(image_size=32), progress=False)
    rows, _ = embed(model, images, progress=False)
    names = [*images.names, "../secret.png", str(photos.parent / "secret.png")]
    index = ImageIndex(torch.cat([rows, rows[:2] + 0.3]), names, photos)
    return RunSearcher(model, (32, 32), index, name="<my run>")


@pytest.fixture(scope="module")
def server(searcher):
    with SearchServer(searcher, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", body=None, **headers):
    """Status, headers and body of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def told(server, path, *arguments, **headers):
    status, _, content = ask(server, path, *arguments, **headers)
    return status, json.loads(content)


def row_of(server, name):
    return server.searcher.index.files.index(name)


def test_the_page_names_the_run_and_needs_nothing_from_elsewhere(server):
    status, headers, page = ask(server, "/")
    assert status == 200
    assert b"&lt;my run&gt;" in page
    assert b"<my run>" not in page
    for name in ("/", "/style.css", "/script.js"):
        content = ask(server, name)[2]
        assert not {b"http://", b"https://", b"//cdn"} & {
            word for word in (b"http://", b"https://", b"//cdn") if word in content
        }
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(server, "/", "HEAD")[::2] == (200, b"")


def test_neighbours_of_an_image_are_those_of_the_index_without_itself(server):
    index = server.searcher.index
    found = told(server, "/api/search?row=3&k=4")[1]
    rows = index.embeddings
    wanted = [row for row in np.argsort(-rows @ rows[3]).tolist() if row != 3][:4]
    assert [one["row"] for one in found["found"]] == wanted
    assert [one["file"] for one in found["found"]] == [index.files[row] for row in wanted]
    similarities = [one["similarity"] for one in found["found"]]
    np.testing.assert_allclose(similarities, (rows @ rows[3])[wanted], atol=1e-4)
    assert found["query"] == {"row": 3, "file": index.files[3]}
    assert len(told(server, "/api/search?row=0&k=500")[1]["found"]) == len(index) - 1


def test_neighbours_of_an_upload_begin_with_its_copy(server, photos):
    content = (photos / "b" / "05 & <b>.png").read_bytes()
    status, found = told(server, "/api/search?k=3", "POST", content)
    assert status == 200
    assert len(found["found"]) == 3
    assert found["found"][0]["file"] == "b/05 & <b>.png"
    assert found["found"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert found["query"]["seen"].startswith("data:image/webp;base64,")
    assert found["query"]["seen"] != found["query"]["attention"]


def test_many_at_once_get_what_one_gets(server, photos):
    content = (photos / "00 & <b>.png").read_bytes()

    def search(number):
        if number % 2:
            return told(server, "/api/search?k=5", "POST", content)[1]["found"]
        return told(server, "/api/search?row=4&k=5")[1]["found"]

    alone = [search(0), search(1)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(search, range(24)))
    assert answers == alone * 12


@pytest.mark.parametrize("kind", ["thumbnail", "image", "attention"])
def test_images_are_drawn(server, kind):
    status, headers, content = ask(server, f"/{kind}/0")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == ((320, 320) if kind == "attention" else (80, 100))
        assert np.asarray(image.convert("L")).std() > 5


def test_images_to_begin_with(server):
    found = told(server, "/api/images?count=5")[1]
    assert (found["all"], len(found["images"])) == (17, 5)
    other = told(server, "/api/images?count=5&seed=1")[1]["images"]
    assert other != found["images"]
    named = told(server, "/api/images?text=B%2F")[1]
    assert {one["file"][:2] for one in named["images"]} == {"b/"}
    assert named["all"] == 7


OUTSIDE = ["link.png", "../secret.png", "{parent}/secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["thumbnail", "image", "attention"])
def test_what_lies_outside_the_folders_is_never_shown(server, photos, name, kind):
    row = row_of(server, name.format(parent=photos.parent))
    status, _, content = ask(server, f"/{kind}/{row}")
    assert status == 404
    assert b"is outside the run's folder of images" in content


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.png",
        "/image/../../secret.png",
        "/thumbnail/..%2f..%2fsecret.png",
        "/thumbnail/%2e%2e/%2e%2e/secret.png",
        "/image/%2fetc%2fpasswd",
        "//etc/passwd",
        "/style.css/../page.html",
        "/__init__.py",
        "/image/-1",
        "/image/99",
        "/image/1e0",
        "/image/%D9%A3",
        "/image/0?x=../secret.png&file=/etc/passwd/../1%00/" + "a" * 3000,
    ],
)
def test_no_path_reaches_a_file(server, photos, path):
    status, _, content = ask(server, path)
    if "?" in path:
        assert (status, content) == (200, ask(server, "/image/0")[2])
    else:
        assert status == 404
        assert "error" in json.loads(content)


def test_folders_that_links_lead_to_can_be_allowed(searcher, photos):
    also = RunSearcher(searcher._model, (32, 32), searcher.index, [photos.parent])
    row = searcher.index.files.index("link.png")
    assert also.path(row) == (photos.parent / "secret.png").resolve()
    with pytest.raises(LookupError, match="outside"):
        searcher.path(row)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "127.0.0.1:{port}", "Origin": "http://evil.example"}, 403),
        ({"Host": "127.0.0.1:{port}", "Origin": "null"}, 403),
        ({"Host": "127.0.0.1:{port}", "Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "127.0.0.1:{port}", "Sec_Fetch_Site": "cross-site"}, 403),
        ({"Host": "127.0.0.1:{port}", "Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_names_and_pages_of_others_are_refused(server, headers, status):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    assert ask(server, "/api/images", **headers)[0] == status
    assert ask(server, "/thumbnail/0", **headers)[0] == status


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "says"),
    [
        ("/api/search", b"no image", {}, 415, "known format"),
        ("/api/search", b"", {}, 415, "cannot be read"),
        ("/api/search", None, {"Content_Length": str(MAX_UPLOAD + 1)}, 413, "at most 32 MB"),
        ("/api/search", None, {"Content_Length": "x"}, 411, "size"),
        ("/api/search?k=0", b"x", {}, 400, "k must be"),
        ("/api/images", b"x", {}, 404, "nothing here"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said(server, path, body, headers, status, says):
    answered, content = told(server, path, "POST", body, **headers)
    assert answered == status
    assert says in content["error"]
    assert told(server, "/api/search?row=0&k=1")[0] == 200  # it goes on


@pytest.mark.parametrize("query", ["row=-1", "row=x", "", "row=1&k=x", "row=999999999999"])
def test_wrong_searches_are_refused(server, query):
    assert told(server, f"/api/search?{query}")[0] in (400, 404)


def test_a_port_in_use_is_one_line(server, searcher):
    with pytest.raises(InputError, match=f"port={server.port} is in use: give another"):
        SearchServer(searcher, server.port)


@pytest.fixture(scope="module")
def run(photos):
    folder = photos.parent / "run"
    timm = ["--model=test_resnet", "--weights=none", "--image-size=32", "--workers=0", "--quiet"]
    main(["index", str(photos), *timm, "--run", str(folder)])
    return folder


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(warm, run, photos):
    words = ["-m", "pml_tacl", "serve", run]
    no_browser = {"DISPLAY": None, "WAYLAND_DISPLAY": None}
    process = warm.start([*words, "--port=0", "--json"], env=no_browser)
    try:
        while not process.output().endswith("\n"):
            assert process.poll(0.02) is None, process.errors()
        found = json.loads(process.output())
        assert found["images"] == 15
        with urllib.request.urlopen(f"{found['url']}api/search?row=0&k=2", timeout=60) as answer:
            assert len(json.load(answer)["found"]) == 2
        port = found["url"].rstrip("/").rpartition(":")[2]
        again = warm.run([*words, "--port", port], env=no_browser)
        assert again.returncode == 1
        assert again.stderr == f"error: --port {port} is in use: give another port, or 0 for any " \
            "free port\n"  # fmt: skip
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, process.errors()


@pytest.mark.parametrize("words", [["--port=65536"], ["--port=x"]])
def test_a_wrong_port_is_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "run", *words])
    assert stop.value.code == 2
    assert "--port: must be a whole number from 0 to 65535" in capsys.readouterr().err


def test_only_this_machine_is_served(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.family == socket.AF_INET


# In a browser, as tests/test_report.py.


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    from tests.test_report import browser_or_skip

    driver = browser_or_skip(tmp_path_factory.mktemp("browser"))
    driver.get(server.url)
    yield driver
    driver.quit()


def settled(driver, wanted=1):
    """Wait until images are shown and drawn; give their names."""
    return driver.execute_async_script(
        "const [wanted, done] = arguments, look = () => {"
        "  const all = [...document.querySelectorAll('#results button')];"
        "  const images = [...document.querySelectorAll('#results img')];"
        "  const waits = document.getElementById('results').classList.contains('waiting');"
        "  !waits && all.length >= wanted && images.every((i) => i.complete)"
        "    ? done(all.map((b) => b.title)) : setTimeout(look, 20); }; look();",
        wanted,
    )


def test_the_page_is_used_by_keyboard(page, server):
    from selenium.webdriver.common.keys import Keys

    shown = settled(page)
    assert sorted(shown) == sorted(server.searcher.index.files)
    first = page.find_element("css selector", "#results button")
    first.send_keys(Keys.ARROW_RIGHT)
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("title") == shown[1]
    page.switch_to.active_element.send_keys(Keys.ENTER)
    wanted = told(server, "/api/search?row=1&k=24")[1]["found"]
    page.execute_async_script(
        "const done = arguments[0], look = () => document.getElementById('query').hidden"
        " ? setTimeout(look, 20) : done(); look();"
    )
    assert settled(page) == [one["file"] for one in wanted]
    label = page.switch_to.active_element.get_attribute("aria-label")
    assert label.startswith(f"1: {wanted[0]['file']}, similarity ")
    assert page.find_element("id", "asked-name").text == shown[1]
    gone = page.find_elements("css selector", "#results .gone")
    assert len(gone) == 3  # those that lie outside


def test_an_upload_and_its_attention_in_the_page(page, server, photos):
    page.get_log("browser")
    page.find_element("id", "file").send_keys(str(photos / "b" / "03 & <b>.png"))
    page.execute_async_script(
        "const done = arguments[0], look = () => location.hash === '#file'"
        " ? done() : setTimeout(look, 20); look();"
    )
    assert settled(page)[0] == "b/03 & <b>.png"
    toggle = page.find_element("id", "attention")
    before = page.find_element("id", "asked").get_attribute("src")
    toggle.click()
    settled(page)
    assert toggle.get_attribute("aria-pressed") == "true"
    assert page.find_element("id", "asked").get_attribute("src") != before
    sources = page.execute_script(
        "return [...document.querySelectorAll('#results img')].map((i) => i.getAttribute('src'))"
    )
    assert {source.split("/")[1] for source in sources} == {"attention"}
    toggle.click()
    page.back()
    assert page.execute_script("return location.hash") == "#row=1"
    wide = page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert wide
    urls = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(url.startswith((server.url, "data:")) for url in urls)
    severe = [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]
    assert all("404" in line for line in severe)  # of those that lie outside


def test_what_goes_wrong_is_shown_and_announced(page, photos, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    page.find_element("id", "file").send_keys(str(tmp_path / "no.png"))
    text = page.execute_async_script(
        "const done = arguments[0], look = () => { const e = document.getElementById('error');"
        " e.hidden ? setTimeout(look, 20) : done(e.textContent); }; look();"
    )
    assert "cannot be read" in text
    assert page.find_element("id", "error").get_attribute("role") == "alert"
