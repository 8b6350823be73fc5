"""The page: two models answer side by side, whatever is uploaded; driven by gradio's own client and by a browser."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import llavakd
from hostile_pictures import HOSTILE
from llavakd.shapes.world import examples

TRAINED = Path(llavakd.__file__).parent / "assets" / "shapes" / "teacher"
DEMO = [sys.executable, "-m", "llavakd", "demo"]


def test_without_gradio_one_line_says_what_to_install():
    program = "import sys; sys.modules['gradio'] = None; sys.argv = ['llava-kd', 'demo', 'x']; import llavakd.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the demo needs gradio")
    assert done.stderr.endswith("install it: pip install 'llava-kd[demo]'\n")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A drawn picture, a question and its true answer."""
    picture, question = examples(2)[1]
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    picture.save(file)
    return file, question.text, question.answer


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """name -> file, one larger than may be uploaded among them."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in HOSTILE.items():
        (folder / name).write_bytes(make())
    (folder / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2 * 2**20))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    """Address of a page with a trained and an untrained model, served by the command."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'llava-kd[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    with log.open("w") as file:
        argv = [*DEMO, TRAINED, tiny.teacher, "--port", str(port), "--max-upload", "1"]
        server = subprocess.Popen(argv, stdout=file, stderr=file)
        address = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            if address in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.2)
        assert f"The page is at {address}; Ctrl-C ends it." in log.read_text()
        yield address
        assert server.poll() is None, log.read_text()
        server.terminate()
        server.wait()
    assert log.read_text().count("Traceback") <= 1  # gradio's own, of the file that was never uploaded


@pytest.fixture(scope="module")
def client(page):
    """gradio's own client."""
    from gradio_client import Client

    return Client(page, verbose=False)


def ask(client, picture, question):
    from gradio_client import handle_file

    return client.submit(picture and handle_file(str(picture)), question, api_name="/ask")


def test_both_models_answer_token_by_token_with_their_speed(client, scene):
    picture, question, truth = scene
    job = ask(client, picture, question)
    last = job.result()
    assert last[0]["value"] == truth
    assert last[1]["value"] != truth
    for update in last:
        first, tokens, rate = re.fullmatch(r"(\S+) s to first token, (\d+) tokens, (\d+)/s", update["info"]).groups()
        assert float(first) > 0
        assert int(tokens) >= 2
        assert int(rate) > 0
    seen = [tuple(update["value"] for update in output) for output in job.outputs()]
    assert len(seen) >= 4
    assert (truth, "") in seen  # one model after the other


@pytest.mark.parametrize("name", [*HOSTILE, "large.png"])
def test_a_hostile_upload_has_a_message_and_the_next_question_an_answer(client, scene, hostile, name):
    said = "exceeds the maximum file size" if name == "large.png" else re.escape(HOSTILE[name][1])
    with pytest.raises(Exception, match=said):
        ask(client, hostile[name], "what is in the south?").result()
    picture, question, truth = scene
    assert ask(client, picture, question).result()[0]["value"] == truth


def test_a_question_without_picture_or_words_has_a_message(client, scene):
    for picture, question in ((None, "what is in the south?"), (scene[0], "  ")):
        with pytest.raises(Exception, match="choose a picture and ask a question"):
            ask(client, picture, question).result()
    with pytest.raises(Exception, match="begin a new one"):
        ask(client, scene[0], "why " * 3000).result()


def test_a_file_of_the_server_is_not_to_be_had(page, scene):
    file = {"path": str(scene[0]), "meta": {"_type": "gradio.FileData"}}  # a good picture, but never uploaded
    body = json.dumps({"data": [file, scene[1]]}).encode()
    request = urllib.request.Request(f"{page}gradio_api/call/ask", body, {"Content-Type": "application/json"})
    call = json.load(urllib.request.urlopen(request))["event_id"]
    events = urllib.request.urlopen(f"{page}gradio_api/call/ask/{call}").read().decode()
    assert "event: error" in events
    assert scene[2] not in events


def test_the_server_itself_refuses_a_large_upload(page, hostile):
    import httpx

    for name, status in (("bomb.png", 200), ("large.png", 413)):
        answer = httpx.post(f"{page}gradio_api/upload", files={"files": hostile[name].read_bytes()})
        assert answer.status_code == status


def test_only_this_machine_is_served(page):
    port = int(page.rstrip("/").rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {
        place.partition(":")[0]
        for _, place, _, state, *_ in listening
        if place.endswith(f":{port:04X}") and state == "0A"
    }
    assert hosts == {"0100007F"}


def test_too_many_models_and_a_taken_port_are_refused(page, command):
    port = page.rstrip("/").rpartition(":")[2]
    refused = command("demo", TRAINED, TRAINED, TRAINED, TRAINED)
    assert (refused.code, refused.err) == (1, "error: got 4 models, expected at most 3\n")
    taken = command("demo", TRAINED, "--port", port)
    assert taken.code == 1
    assert taken.err.startswith(f"error: cannot serve on 127.0.0.1:{port}")
    assert "Traceback" not in taken.err
    assert command("demo").code == 2


@pytest.fixture(scope="module")
def browser(page):
    """Headless Chromium on the page."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium or chromedriver is not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.upload = self.until(lambda: self.find("#picture input[type=file]"))[0]
        self.question, *self.answers = self.until(lambda: self.find("textarea"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, see, seconds=60):
        end = time.monotonic() + seconds
        while not (seen := see()):
            assert time.monotonic() < end, self.browser.find_element("css selector", "body").text
            time.sleep(0.1)
        return seen

    def choose(self, file):
        self.upload.send_keys(str(file))

    def ask(self, question):
        self.question.send_keys(question)
        next(button for button in self.find("button") if button.text == "Ask").click()

    def message(self):
        return " ".join(toast.text for toast in self.find(".toast-body"))


@pytest.mark.slow
def test_a_person_uploads_asks_and_reads_two_answers(browser, page, scene):
    picture, question, truth = scene
    seen = Page(browser, page)
    seen.choose(picture)
    seen.until(lambda: seen.find("#picture img"))
    seen.ask(question)
    seen.until(lambda: seen.answers[0].get_attribute("value") == truth)
    seen.until(lambda: seen.answers[1].get_attribute("value"))
    text = browser.find_element("css selector", "body").text
    assert text.count("s to first token, ") == 2
    assert str(TRAINED) in text
    assert seen.message() == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HOSTILE, "large.png"])
def test_a_person_who_uploads_a_hostile_file_reads_why_not(browser, page, hostile, name):
    if name.endswith((".eps", ".ppm")):
        pytest.skip("the page's file dialog takes no such file")
    seen = Page(browser, page)
    seen.choose(hostile[name])
    if name != "large.png":
        seen.until(lambda: seen.find("#picture img"))
        seen.ask("what is in the south?")
    said = "exceed the maximum allowed size of 1.0 Mb" if name == "large.png" else HOSTILE[name][1]
    seen.until(lambda: said in seen.message())


@pytest.mark.slow
def test_an_example_fills_in_picture_and_question_and_a_narrow_page_has_no_sideways_scroll(browser, page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    seen = Page(browser, page)
    _, question = examples(1)[0]
    seen.until(lambda: seen.find("table img"))[0].click()
    seen.until(lambda: seen.question.get_attribute("value") == question.text)
    seen.until(lambda: seen.find("#picture img"))
    next(button for button in seen.find("button") if button.text == "Ask").click()
    seen.until(lambda: seen.answers[0].get_attribute("value") == question.answer)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
