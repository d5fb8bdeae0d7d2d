"""The built book in a real browser: it loads, shows its mathematics, moves, fits a phone, and can be read by everyone.

Chromium is spoken to in its own protocol, over a pipe, so that nothing else need be installed. Every page is opened
once, without a network; what it showed is then looked at from all sides. axe-core comes from npm, if npm is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PACKAGES = {"axe-core": "4.14.1"}  # what npm gives
PAGE_LIMIT, NOTEBOOK_LIMIT = 3_000_000, 2_000_000  # bytes

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the pages are not looked at in a browser"),
    pytest.mark.skipif(not HTML.is_dir(), reason="no built book here: make book"),
]


def pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(page["file"] for c in chapters for page in (c, *c.get("sections", [])))]


PAGES = pages()
CLOSELY = [PAGES[0], PAGES[4], "book/reference/measures", "book/scorecard"]  # in the dark too, and all colours of code
CHAPTERS = [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()]


# --- the browser ------------------------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, driven over a pipe by its DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
        ]
        flags.append(f"--user-data-dir={profile}")
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", CHROMIUM, *flags],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.ids, self.rest, self.events, self.session = itertools.count(1), b"", [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.session = None
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def _read(self, deadline: float) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0, deadline - time.monotonic()))
            if not ready or not (data := os.read(self.into, 1 << 20)):
                raise TimeoutError("the browser does not answer")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, *, seconds: float = 60, **params) -> dict:
        message = {"id": next(self.ids), "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        deadline = time.monotonic() + seconds
        while (answer := self._read(deadline)).get("id") != message["id"]:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        self.events.clear()
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read(deadline))

    def run(self, script: str, *arguments):
        """What a function of JavaScript returns, awaited."""
        call = f"({script})({', '.join(map(json.dumps, arguments))})"
        answer = self.send("Runtime.evaluate", expression=call, awaitPromise=True, returnByValue=True, seconds=120)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "an exception"))
        return answer["result"].get("value")

    def width(self, pixels: int) -> None:
        facts = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 500}
        self.send("Emulation.setDeviceMetricsOverride", **facts)

    def complaints(self) -> list[str]:
        """Errors of the console and requests that failed since the page was opened: there is no network."""
        found, urls = [], {}
        for event in self.events:
            params = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    details = params["exceptionDetails"]
                    found.append(details.get("exception", {}).get("description") or details["text"])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                    found.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
                case "Log.entryAdded" if params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
                    found.append(params["entry"]["text"])
                case "Network.requestWillBeSent":
                    urls[params["requestId"]] = params["request"]["url"]
                case "Network.responseReceived" if params["response"]["status"] >= 400:
                    found.append(f"{params['response']['status']} {params['response']['url']}")
                case "Network.loadingFailed" if not params.get("canceled"):
                    url = urls.get(params["requestId"], "?")
                    found.append(f"{params['errorText']} {url[:200]}")
        return found


class Site(http.server.SimpleHTTPRequestHandler):
    """The built book."""

    def log_message(self, *args) -> None:
        pass


def npm_modules() -> Path | None:
    """The folder with the packages of npm, installed beside the environment; None when that is not possible."""
    home = ROOT / ".venv" / "npm"
    if not (ROOT / ".venv").is_dir():
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "teleport-lite-npm"
    modules = home / "node_modules"

    def there() -> bool:
        versions = {n: modules / n / "package.json" for n in PACKAGES}
        return all(p.is_file() and json.loads(p.read_text())["version"] == PACKAGES[n] for n, p in versions.items())

    if not there() and (npm := shutil.which("npm")):
        home.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--prefix", home]
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run([*command, *wanted], check=True, capture_output=True, timeout=180, cwd=home)
    return modules if there() else None


# --- what a page shows ------------------------------------------------------------------------------------------------

LOOK = r"""
async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await new Promise(done => setTimeout(done, 50));
  const article = document.querySelector("article") || document.body, all = s => [...article.querySelectorAll(s)];
  const hidden = "pre, code, script, style, mjx-container, .math, svg, textarea, .tl-player script, .output";
  const texts = [], walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) if (!walker.currentNode.parentElement.closest(hidden)) texts.push(walker.currentNode.data);
  const picture = box => { const i = box.querySelector("img"); return i.src.length + i.src.slice(-400); };
  const players = await Promise.all([...document.querySelectorAll(".tl-player")].map(async box => {
    const sliders = [...box.querySelectorAll("input[type=range]")], seen = [];
    for (const slider of sliders) {
      const start = slider.value, before = picture(box);
      for (const value of [slider.min, slider.max]) {
        slider.value = value;
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        if (picture(box) != before) break;
      }
      await box.querySelector("img").decode();
      seen.push({ label: slider.getAttribute("aria-label"), text: slider.getAttribute("aria-valuetext"),
                  moved: picture(box) != before, keys: slider.tabIndex >= 0 && !slider.disabled });
      slider.value = start;
      slider.dispatchEvent(new Event("input", { bubbles: true }));
    }
    return seen;
  }));
  return {
    title: document.title, players,
    texts: texts.filter(t => t.trim()),
    math: all("span.math, div.math").length,
    rendered: all("mjx-container").length,
    failures: all("mjx-merror, .merror, [data-mjx-error]").map(e => e.textContent.slice(0, 100)),
    images: [...document.images].map(i => ({ src: i.src.slice(0, 120), alt: i.getAttribute("alt"),
      loaded: i.complete && i.naturalWidth > 0, inside: !!i.closest("article") })),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    statements: all(".admonition.statement").map(e => e.id),
    wide: document.documentElement.scrollWidth,
    clipped: all(".cell_input pre, .cell_output pre").filter(e => e.scrollWidth > e.clientWidth + 1)
      .map(e => e.textContent.slice(0, 60)),
    drawings: all("svg.tl-d, .tl-live > svg").map(e => e.getAttribute("aria-label") || ""),
  };
}"""
NARROW = r"""
async () => {
  await new Promise(done => setTimeout(done, 150));
  const wide = document.documentElement.scrollWidth, limit = innerWidth, found = [];
  if (wide > limit) for (const e of document.querySelectorAll("article *")) {
    const box = e.getBoundingClientRect();
    if (box.right > limit + 1 && found.length < 5) found.push(`${e.tagName}.${e.className} ${Math.round(box.right)}`);
  }
  return { wide, limit, found };
}"""
SETTLED = """
async () => {  // the theme lets code that scrolls be reached by keys, a while after the width changed
  const scrolls = e => e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight;
  const ready = () => [...document.querySelectorAll("pre")].every(e => !scrolls(e) || e.tabIndex == 0);
  for (let i = 0; i < 40 && !ready(); i++) await new Promise(done => setTimeout(done, 100));
}"""
SIMPLER = r"""
(closely) => {  // axe looks at every element: formulas are not its business, and code is coloured alike everywhere
  document.querySelectorAll("mjx-container").forEach(e => e.replaceChildren());
  if (!closely) document.querySelectorAll(".highlight pre").forEach(e => { e.textContent = e.textContent; });
}"""
AXE = r"""
async (rules) => {
  const off = { "label-content-name-mismatch": { enabled: false } };  // the theme's search button shows its keys too
  const options = rules
    ? { runOnly: { type: "rule", values: rules } }
    : { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], rules: off };
  const context = { include: [["body"]], exclude: [["mjx-container"]] };
  const { violations } = await axe.run(context, { ...options, resultTypes: ["violations"] });
  return violations.filter(v => ["serious", "critical"].includes(v.impact)).map(v =>
    v.id + " (" + v.nodes.length + "): " + v.nodes.slice(0, 3).map(n => n.target.join(" ") + " " + n.html.slice(0, 160)
      + ((n.any[0] || {}).message || "")).join(" | "));
}"""


@pytest.fixture(scope="module")
def modules():
    return npm_modules()


@pytest.fixture(scope="module")
def site():
    handler = functools.partial(Site, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def seen(site, browser, modules):
    """Of every page what a visitor sees: on a desk, on a phone, and through axe."""
    axe = (modules / "axe-core" / "axe.min.js").read_text("utf8") if modules else None
    found = {}
    for page in PAGES:
        browser.width(1440)
        browser.open(f"{site}/{page}.html")
        facts = browser.run(LOOK)
        browser.width(390)
        facts["phone"] = browser.run(NARROW)
        browser.width(1440)
        browser.run(SETTLED)
        if axe:
            browser.run(SIMPLER, page in CLOSELY)
            browser.send("Runtime.evaluate", expression=axe)
            facts["axe"] = browser.run(AXE, None)
            if page in CLOSELY:
                browser.run("() => { document.documentElement.dataset.theme = 'dark'; }")
                facts["axe, dark"] = browser.run(AXE, ["color-contrast"])
        facts["complaints"] = browser.complaints()
        found[page] = facts
    return found


every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_it_loads_without_an_error(seen, page):
    assert seen[page]["title"]
    assert seen[page]["complaints"] == []


@every_page
def test_its_mathematics_is_rendered(seen, page):
    assert seen[page]["rendered"] >= seen[page]["math"]
    assert seen[page]["failures"] == []


@every_page
def test_no_code_is_clipped(seen, page):
    # the setup cell has one line that installs from an address, and no break in it
    assert [code for code in seen[page]["clipped"] if not code.startswith("try:\n    import teleport_lite")] == []


@every_page
def test_its_drawings_say_what_they_show(seen, page):
    assert all(len(words) > 20 for words in seen[page]["drawings"])


RAW = re.compile(r"\$|```|~~~|:::|\{[a-z]+(?::[a-z]+)?\}`|\\(?:begin|end|tag|frac|lVert)\b|\]\(\S+\)|\*\*\w|^> ")


@every_page
def test_no_markup_is_visible(seen, page):
    assert [text.strip()[:100] for text in seen[page]["texts"] if RAW.search(text)] == []


@every_page
def test_its_images_are_there_and_say_what_they_show(seen, page):
    assert [i["src"] for i in seen[page]["images"] if not i["loaded"]] == []
    assert [i["src"] for i in seen[page]["images"] if i["inside"] and not (i["alt"] or "").strip()] == []


@every_page
def test_it_fits_a_phone(seen, page):
    phone = seen[page]["phone"]
    assert phone["limit"] == 390
    assert phone["wide"] <= 390, phone["found"]


@pytest.mark.parametrize(("page", "check"), [*((p, "axe") for p in PAGES), *((p, "axe, dark") for p in CLOSELY)])
def test_everyone_can_read_it(seen, page, check):
    if check not in seen[page]:
        pytest.skip("npm gave no axe-core here")
    assert seen[page][check] == []


@pytest.mark.parametrize("page", CHAPTERS)
def test_its_explorers_move(seen, page):
    players = seen[page]["players"]
    assert players, "a chapter has an explorer"
    for slider in itertools.chain(*players):
        assert slider["moved"], f"the slider {slider['label']!r} changes nothing"
        assert slider["keys"] and slider["label"] and slider["text"]


@pytest.mark.parametrize("page", CHAPTERS)
def test_its_statements_are_boxes(seen, page):
    notebook = json.loads((ROOT / f"{page}.ipynb").read_text("utf8"))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    kinds = "Definition|Theorem|Proposition|Lemma|Corollary|Example|Remark|Algorithm"
    written = [f"{k.lower()}-{n.replace('.', '-')}" for k, n in re.findall(rf"^> \*\*({kinds}) (\d+\.\d+)", text, re.M)]
    assert seen[page]["statements"] == written


def test_links_between_pages_lead_somewhere(seen, site):
    ids = {f"{site}/{page}.html": set(facts["ids"]) for page, facts in seen.items()}
    dead = set()
    for page, facts in seen.items():
        for link in facts["links"]:
            if not link.startswith(site):
                continue
            target, fragment = urldefrag(link)
            target = urldefrag(urljoin(f"{site}/{page}.html", target))[0].split("?")[0]
            if target in ids:
                if fragment and unquote(fragment) not in ids[target]:
                    dead.add((page, link.removeprefix(site)))
            elif not (HTML / unquote(urlparse(target).path).lstrip("/")).exists():
                dead.add((page, link.removeprefix(site)))
    assert sorted(dead) == []


@every_page
def test_no_two_places_share_an_anchor(seen, page):
    counts = Counter(i for i in seen[page]["ids"] if not i.startswith(("MJX", "pst-", "mjx")))
    assert [i for i, n in counts.items() if n > 1] == []


DEMONSTRATION = r"""
async () => {
  const box = document.querySelector("#tl-demo"), [place, rate] = box.querySelectorAll("input");
  const numbers = kind => box.querySelector(kind).getAttribute("d").match(/-?[\d.]+/g).map(Number);
  const pairs = list => list.map((x, i) => i % 2 ? null : [x, list[i + 1]]).filter(Boolean);
  const seen = [];
  for (const [where, size] of [[-120, 12], [-40, 12], [0, 12], [60, 12], [120, 12], [120, 60]]) {
    place.value = where; rate.value = size;
    for (const slider of [place, rate]) slider.dispatchEvent(new Event("input"));
    const screen = box.querySelector("svg").getScreenCTM();
    seen.push({ arrow: pairs(numbers(".tl-slope")), orbit: pairs(numbers(".tl-orbit")),
                walk: pairs(numbers(".tl-walk")),
                point: ["cx", "cy"].map(a => +box.querySelector(".tl-point").getAttribute(a)),
                head: !!box.querySelector(".tl-head"), scales: [screen.a, screen.d],
                text: box.querySelector("output").value });
  }
  return seen;
}"""


def test_the_demonstration_on_the_first_page_tells_no_lie(site, browser):
    browser.width(1280)
    browser.open(f"{site}/book/intro.html")
    seen = browser.run(DEMONSTRATION)
    lengths = []
    for facts in seen:
        (x, y), (u, v) = facts["arrow"]
        near = sorted(facts["orbit"], key=lambda p: math.dist(p, facts["point"]))[:2]
        along = [near[1][0] - near[0][0], near[1][1] - near[0][1]]
        cosine = ((u - x) * along[0] + (v - y) * along[1]) / (math.dist((x, y), (u, v)) * math.hypot(*along))
        assert abs(cosine) < 0.06, "the arrow stands on its level set at a right angle, as gradients do"
        assert math.dist(near[0], facts["point"]) < 4, "the point is on the orbit"
        assert facts["scales"][0] == pytest.approx(facts["scales"][1]), "both axes have the same scale"
        assert facts["head"] and "loss 0.18" in facts["text"] and "NaN" not in facts["text"]
        lengths.append(float(re.search(r"gradient norm ([\d.]+)", facts["text"])[1]))
        reach = max(math.dist(facts["walk"][0], p) for p in facts["walk"])
        assert reach > 15, "one sees the path"
    assert lengths[2] == min(lengths) and lengths[0] > 2 * lengths[2] < lengths[4]
    across = [max(x * (330 - y) / 110**2 for x, y in facts["walk"]) for facts in seen]
    assert across[4] < 1.1 and across[5] > 1.5, "with a large rate the path jumps across the minima, uv = 1"


def test_the_explorer_of_corners_agrees_with_the_chapter(site, browser):
    browser.width(1280)
    browser.open(f"{site}/book/02-teleportation/teleporting.html")
    said = browser.run(
        r"""() => ["identity", "set the first", "set the second", "highest corner", "set the second"].map(name => {
             const box = document.querySelector("#tl-corner");
             [...box.querySelectorAll("button")].find(b => b.textContent == name).click();
             return box.querySelector("output").value;
           })"""
    )
    found = [float(re.search(r"norm ([\d.]+)", text)[1]) for text in said]
    assert found[0] == 2.5 and found[2] == 14.8 and found[3] == found[4] == 27.6, "as printed by the cell above it"
    assert said[4].endswith("this is the best corner") and said[2].endswith("the best corner has 27.6")


def test_search_finds_teleportation(site, browser):
    browser.width(1280)
    browser.open(f"{site}/search.html?q=teleportation")
    found = browser.run(
        """async () => {
             for (let i = 0; i < 100; i++) {
               const links = [...document.querySelectorAll("#search-results li a")].map(a => a.getAttribute("href"));
               if (links.length > 2) return links;
               await new Promise(done => setTimeout(done, 100));
             }
             return [];
           }"""
    )
    assert any("teleport" in link for link in found), found
    assert browser.complaints() == []


@every_page
def test_a_link_to_it_has_a_picture(page):
    soup = BeautifulSoup((HTML / f"{page}.html").read_text("utf8"), "html.parser")
    found = {tag["property"]: tag["content"] for tag in soup.find_all("meta", property=True)}
    assert found["og:image"].endswith("/_static/card.png") and found["og:url"].endswith(f"/{page}.html")
    assert not found["og:description"].startswith("Open in Colab")
    assert (HTML / "_static" / "card.png").stat().st_size < 200_000


@every_page
def test_it_is_light(page):
    path = HTML / f"{page}.html"
    soup = BeautifulSoup(path.read_text("utf8"), "html.parser")
    files = {image["src"] for image in soup.find_all("img") if not image["src"].startswith(("data:", "http"))}
    weight = path.stat().st_size + sum((path.parent / name).resolve().stat().st_size for name in files)
    assert weight < PAGE_LIMIT, f"{weight / 1e6:.2f} MB with its images"
    if page in CHAPTERS:
        assert (ROOT / f"{page}.ipynb").stat().st_size < NOTEBOOK_LIMIT
