"""The demo's server: the page opens, files of the machine stay closed, uploads are checked, and programs can call it."""

import importlib.util
import io
import json
import socket
import urllib.error
import urllib.request

import pytest
from demo_fixtures import write_mllm
from PIL import Image

from demo.models import Models
from encoder.errors import DataError

if importlib.util.find_spec("gradio") is None:
    pytest.skip("gradio is not installed (the extra `demo`); the page itself is not tested", allow_module_level=True)

from demo.page import build_page, serve


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_folder) -> Models:
    return Models([write_mllm(tmp_path_factory.mktemp("world"))], tiny_folder)


@pytest.fixture(scope="module")
def served(models):
    """The page, and its address on a free port of this machine."""
    page = build_page(models, 0.15)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve(page, "127.0.0.1", port)
    yield page, page.local_url.rstrip("/")
    page.close()


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    return Client(served[1], verbose=False)


@pytest.fixture()
def grey(tmp_path):
    from gradio_client import handle_file

    Image.new("RGB", (80, 40), (120, 120, 120)).save(tmp_path / "grey.png")
    return handle_file(str(tmp_path / "grey.png"))


def test_the_page_opens_and_no_file_of_the_server_can_be_read(served, tmp_path):
    page, address = served
    assert address.startswith("http://127.0.0.1:") and page.share_url is None
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert answer.status == 200 and b"Open CLOC" in answer.read()
    (tmp_path / "secret.txt").write_text("secret")
    for path in ("/etc/passwd", "pyproject.toml", __file__, tmp_path / "secret.txt", "demo/board.js"):
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=60)


def test_a_picture_comes_in_by_upload_only(served, tmp_path):
    """The page's own upload works; the same event with a path of the server's instead is refused."""
    page, address = served
    Image.new("RGB", (50, 30)).save(tmp_path / "secret.png")
    buffer = io.BytesIO()
    Image.new("RGB", (60, 20), (0, 200, 0)).save(buffer, "PNG")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + buffer.getvalue() + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, kind), timeout=60) as answer:
        (uploaded,) = json.load(answer)
    taken, refused = (upload_event(page, address, str(path)) for path in (uploaded, tmp_path / "secret.png"))
    board = taken["output"]["data"][1]
    assert taken["success"] and (board["width"], board["height"]) == (60, 20) and board["picture"].startswith("data:image/png")
    assert not refused["success"] and str(tmp_path) not in json.dumps(refused)


def upload_event(page, address: str, path: str) -> dict:
    """What the server says to the page's event "this picture came in"."""
    index = next(index for index, fn in page.fns.items() if any(event == "input" for _, event in fn.targets))
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    return event(address, index, [None, file], path[-40:])


def event(address: str, index: int, data: list, session: str) -> dict:
    """What the server says to an event of the page, past all checks of a client."""
    body = json.dumps({"data": data, "fn_index": index, "session_hash": session}).encode()
    kind = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/queue/join", body, kind), timeout=60).read()
    stream = f"{address}/gradio_api/queue/data?session_hash={urllib.request.quote(session)}"
    with urllib.request.urlopen(stream, timeout=60) as lines:
        for line in lines:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the server said nothing")


def test_a_port_in_use_is_one_sentence(served, models):
    with pytest.raises(DataError, match="--port"):
        serve(build_page(models, 0.15), "127.0.0.1", served[0].server_port)


# --- programs that call it


def test_only_the_documented_functions_can_be_called(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/ask", "/rank", "/find"}


def test_a_program_asks_and_gets_boxes_in_pixels(client, grey, models):
    question, options = "What is [1], and [2]?", {"temperature": 0, "max_new_tokens": 24, "api_name": "/ask"}
    result = client.predict(grey, question, [[10, 5, 30, 25], [60, 20]], **options)
    (answer,) = result["answers"]
    regions = [(10, 5, 30, 25), (48, 8, 72, 32)]
    expected = models.speakers[0].chat.ask(
        Image.new("RGB", (80, 40), (120, 120, 120)), "What is <region:0>, and <region:1>?", regions, max_new_tokens=24
    )
    assert (answer["by"], answer["text"]) == (models.speakers[0].name, expected.text)
    assert [box["box"] for box in answer["boxes"]] == [[round(value, 2) for value in box] for box in expected.boxes]


def test_a_program_ranks_and_finds(client, grey, models):
    ranked = client.predict(grey, [[10, 5, 30, 25], [40, 5, 60, 25]], ["red square", "blue bar"], api_name="/rank")["ranking"]
    assert len(ranked) == 2 and {row["label"] for row in ranked[0]} == {"red square", "blue bar"}
    assert sum(row["share"] for row in ranked[1]) == pytest.approx(1, abs=1e-5)
    (found,) = client.predict(grey, ["red square"], api_name="/find")["found"]
    x1, y1, x2, y2 = found["box"]
    assert found["phrase"] == "red square" and 0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 40 and -1 <= found["cosine"] <= 1


@pytest.mark.parametrize(
    ("question", "regions", "said"),
    [
        ("", [], "empty"),
        ("What is [2]?", [[1, 2, 30, 40]], r"no mark \[2\]"),
        ("What is [1]?", [[1, 2, 1, 40]], "no area"),
        ("What is [1]?", [[1, 2, 3]], "x1, y1, x2, y2"),
        ("What is [1]?", "not json", "no JSON"),
        ("What is [1]?", [[1, 2]] * 31, "at most 30"),
    ],
)
def test_a_programs_mistake_is_said_to_it(client, grey, question, regions, said):
    with pytest.raises(Exception, match=said):
        client.predict(grey, question, regions, 0, 8, api_name="/ask")


def test_settings_have_limits(client, grey):
    for temperature, length, said in ((-1, 8, "temperature is -1"), (0, 10**9, "give 1 to 1024")):
        with pytest.raises(Exception, match=said):
            client.predict(grey, "Where is it?", [], temperature, length, api_name="/ask")


def test_a_program_cannot_name_a_file_of_the_server(served, client, tmp_path):
    page, address = served
    Image.new("RGB", (50, 30)).save(tmp_path / "secret.png")
    index = next(index for index, fn in page.fns.items() if fn.api_name == "ask")
    file = {"path": str(tmp_path / "secret.png"), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    refused = event(address, index, [file, "Where is it?", [], 0, 8], "program")
    assert not refused["success"] and str(tmp_path) not in json.dumps(refused)
    with pytest.raises(Exception, match="no picture"):
        client.predict(None, "Where is it?", [], 0, 8, api_name="/ask")
