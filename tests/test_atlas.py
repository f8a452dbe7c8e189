"""studies/atlas.py: its measures by hand on small made-up numbers, its page, and the page in a real browser."""

import json
import math
import re
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from helpers import CODES, CPU

import common
from data import DataError
from studies import atlas, atlas_measures, atlas_page
from studies.atlas_measures import Effects, Places

LN2, LN3 = math.log(2), math.log(3)
SMALL = ["--rows", "3", "--places", "12", "--answers", "4", "--dialogues", "2", "--forced", "1", "--batch", "4"]


# ---------------------------------------------------------------------------------------------------------- by hand
class Adding:
    """A latent model of two codes and two tokens. The state is the logits; code k adds log 3 to that of token k."""

    quantiser = SimpleNamespace(codes=2)

    def speaker(self):
        return lambda e, a: e + LN3 * torch.eye(2)[a]


def made_up():
    """-> (run, places). The bare VLM knows nothing: 1/2, 1/2. At the second place e prefers token 0, like code 0."""
    head = SimpleNamespace(weight=torch.eye(2))
    run = SimpleNamespace(place=CPU, vlm=SimpleNamespace(scorer=lambda: lambda y: y, head=head))
    e_MD = torch.tensor([[0.0, 0.0], [LN3, 0.0]])
    logpi_MK = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    zeros = torch.zeros(2, 2)
    return run, Places(zeros, e_MD, torch.tensor([0, 1]), torch.tensor([0, 1]), logpi_MK, torch.tensor([0, 0]))


def test_the_effects_of_two_codes_by_hand():
    """With code 0 token 0 has 3/4 at the first place and 9/10 at the second, with code 1 it has 1/4 and 1/2."""
    run, places = made_up()
    found = atlas_measures.effects(run, Adding(), places, torch.tensor([], dtype=torch.long))
    assert found.tokens_KM[0].tolist() == [0, 0] and found.tokens_KM[1, 0] == 1
    both = math.log(0.75 / 0.5), math.log(0.9 / 0.5)
    assert found.mean_KV[0, 0] == pytest.approx(sum(both) / 2, abs=1e-6)
    assert found.std_KV[0, 0] == pytest.approx((both[1] - both[0]) / 2, abs=1e-6)
    alike = (2 * math.sqrt(0.75 * 0.25) + math.sqrt(0.9 * 0.5) + math.sqrt(0.1 * 0.5)) / 2
    np.testing.assert_allclose(found.alike_KK, [[1, alike], [alike, 1]], atol=1e-6)
    # the tokens that came: 0 with code 0, then 1 with code 1
    np.testing.assert_allclose(found.nats["vlm"], [LN2, LN2], atol=1e-6)
    np.testing.assert_allclose(found.nats["code"], [-math.log(0.75), LN2], atol=1e-6)
    np.testing.assert_allclose(found.nats["any"], [LN2, -math.log(0.1)], atol=1e-6)  # pi: one half each; code 0 alone
    np.testing.assert_allclose(found.entropy["any"][0], LN2, atol=1e-6)
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    np.testing.assert_allclose(found.entropy["code"][0], quarter, atol=1e-6)
    assert found.right["code"][0] and not found.right["any"][1]


def test_what_codes_would_say_leaves_out_what_is_never_said():
    logits_KV = torch.tensor([[0.0, 1.0, 9.0], [2.0, 1.0, 9.0], [0.0, 3.0, 9.0]])
    rows = atlas_measures.would_say(logits_KV, torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([2]))
    assert [(token, codes) for token, _, codes in rows] == [(1, [2, 0]), (0, [1])]
    assert [p for _, p, _ in rows] == pytest.approx([0.7, 0.3])


TOKENS_KM = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 8, 8], [1, 2, 3, 4]])


def test_codes_agree_at_the_places_where_they_say_the_same():
    same = [[1, 0.75, 0.5, 1], [0.75, 1, 0.5, 0.75], [0.5, 0.5, 1, 0.5], [1, 0.75, 0.5, 1]]
    assert atlas_measures.agreement(TOKENS_KM).tolist() == same
    assert atlas_measures.agreement(TOKENS_KM[:, :0]).tolist() == np.ones((4, 4)).tolist()


@pytest.mark.parametrize(
    "order, least, groups",
    [
        ([0, 1, 2, 3], 0.9, [0, 1, 2, 0]),
        ([0, 1, 2, 3], 0.75, [0, 0, 1, 0]),
        ([2, 1, 0, 3], 0.5, [0, 0, 0, 0]),
        ([2, 3, 1, 0], 0.9, [1, 2, 0, 1]),
    ],
)
def test_a_code_joins_the_first_group_whose_first_code_says_the_same(order, least, groups):
    found = atlas_measures.groups(atlas_measures.agreement(TOKENS_KM), order, least)
    assert found.tolist() == groups


def test_the_map_keeps_distances_that_fit_a_plane():
    """Two codes that mean the same and one with alike 1/2: squared distances 0 and 2 - 2 / 2 = 1."""
    alike = np.array([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]])
    xy_K2, shown = atlas_measures.flat_map(alike)
    distance = np.linalg.norm(xy_K2[:, None] - xy_K2[None], axis=-1)
    np.testing.assert_allclose(distance, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(xy_K2.mean(0), 0, atol=1e-6)
    assert shown == pytest.approx(1)


def test_numbers_of_a_code_alone():
    assert atlas_measures.share([1, 1, 3], 4).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert atlas_measures.share([], 2).tolist() == [0, 0]
    assert atlas_measures.entropy_of([2, 0, 1, 1]) == pytest.approx(1.5 * LN2)
    assert atlas_measures.entropy_of([0, 0]) == 0
    assert atlas_measures.favourite(np.array([7, 5, 7, 7])) == (7, 0.75)


def test_typical_tokens_are_frequent_with_the_code_and_rare_without():
    """Token 0 is half of the code's tokens and half of all, so it says nothing; token 2 is rare and the code's own."""
    assert atlas_measures.typical(np.array([4, 3, 1, 0]), np.array([50, 44, 1, 5]), 2) == [2, 0]
    assert atlas_measures.typical(np.array([0, 0]), np.array([5, 5]), 3) == []


def test_tokens_that_are_raised_and_lowered_must_be_frequent():
    mean, std = np.array([2.0, -1.0, 9.0, 0.5, -3.0]), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    raised, lowered = atlas_measures.moved(mean, std, np.array([True, True, False, True, True]), 2)
    assert raised == [(0, 2.0, 0.1), (3, 0.5, 0.4)] and lowered == [(4, -3.0, 0.5), (1, -1.0, 0.2)]


def test_the_number_for_the_whole_by_hand():
    """38 places at which all codes agree, then the two at which they do not. At 37 of the 40 places the favourite of
    each code holds. Codes 0, 1, 2 are used; at the open places no two of them agree."""
    tokens_KM = np.concatenate((np.ones((4, 36), dtype=int), TOKENS_KM), 1)
    values = {way: np.array([1.0] * 19 + [3.0] * 19 + [5.0] * 2) for way in atlas_measures.WAYS}
    right = {way: np.array([True] * 19 + [False] * 19 + [True] * 2) for way in atlas_measures.WAYS}
    found = Effects(tokens_KM, None, None, None, values, values, right)
    kinds = {"paired": slice(0, 38), "text": slice(38, 40)}
    out = atlas_measures.numbers(found, kinds, np.array([9, 5, 1, 0]))
    assert out["paired"]["nats"]["vlm"] == 2 and out["text"]["entropy"]["code"] == 5
    assert (out["paired"]["right"]["any"], out["paired"]["places"]) == (0.5, 38)
    assert (out["paired"]["different"], out["text"]["different"]) == (1, 2.5)  # 3, 8 and 4, 9, 8
    assert (out["paired"]["open"], out["text"]["open"]) == (0, 1)
    assert out["codes"] == {"codes": 4, "used": 3, "groups": 1, "groups open": 3, "favourite": pytest.approx(37 / 40)}


def test_a_code_is_forced_at_one_step_alone():
    steer, logits = atlas.only(torch.tensor([2, 0]), 3), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert steer(2, logits) is logits
    assert steer(3, logits).softmax(-1).tolist() == [[0, 0, 1], [1, 0, 0]]


# -------------------------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """A finished run: stage 3, with a world model that listens to its codes, and the RL that began there."""
    out = tmp_path_factory.mktemp("atlas")
    for name, run in (("stage3", "loud"), ("rl_latent", "4")):
        (out / name).symlink_to(runs / run)
    return out


@pytest.fixture(scope="module")
def made(folder):
    """-> (path of the page, its text, its data, the numbers)"""
    page, numbers = folder / "atlas.html", folder / "atlas.json"
    also = ["--also", f"{folder}/stage3", "--numbers", str(numbers)]
    atlas.main(["--run", str(folder), "--out", str(page), *SMALL, *also])
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return page, text, json.loads(data), json.loads(numbers.read_text())


@pytest.fixture(scope="module")
def run(folder):
    return atlas.Agent(common.parse_config(atlas.Config, "", ["--run", str(folder), *SMALL]), CPU)


def test_the_page_is_one_file_without_a_network(made):
    page, text, _, _ = made
    assert not re.search(r"https?:|url\(|@import", text)
    assert {link[:5] for link in re.findall(r"""(?:src|href)=["']([^"']*)""", text)} == {"data:"}
    assert "default-src 'none'" in text and "{{" not in text
    assert page.stat().st_size < 4e6


def test_the_data_of_the_page_fit_together(made):
    data = made[2]
    assert len(data["codes"]) == CODES and data["path"]["steps"] == [1, 2]
    for kind in atlas.KINDS:
        steps = [s for d in data["dialogues"] if d["kind"] == kind for s in d["steps"]]
        shares = [c["share"][kind] for c in data["codes"]]
        assert shares == pytest.approx([sum(s[1] == k for s in steps) / len(steps) for k in range(CODES)], abs=1e-4)
    for c in data["codes"]:
        assert sum(c["about"].values()) == c["count"] >= c["turned"] >= sum(n for _, _, n in c["instead"])
    assert len(set(data["images"])) == len(data["images"]) and len(set(data["words"])) > 20
    assert all(url.startswith("data:image/") for url in data["images"])
    assert sum(bool(d["images"]) for d in data["dialogues"]) >= 3
    assert all("</" not in w for w in data["words"])


def test_the_path_through_rl_is_that_of_its_log(run, monkeypatch):
    """Three codes, five steps, three points: the last steps of 1 to 2, 3 to 4, and 5."""
    use = [[1, 0, 1], [3, 0, 3], [0, 5, 5], [0, 5, 5], [4, 0, 0]]
    rows = [{"step": step, "use": counts} for step, counts in enumerate(use, 1)]
    monkeypatch.setattr(atlas, "POINTS", 3)
    monkeypatch.setattr(common, "read_metrics", lambda folder: [{"step": 0}, *rows])
    path = atlas.path_of(run, {})
    assert path["steps"] == [2, 4, 5] and path["share"] == [[0.5, 0, 1], [0, 0.5, 0], [0.5, 0.5, 0]]
    monkeypatch.setattr(common, "read_metrics", lambda folder: [{"step": 1}])
    path = atlas.path_of(run, {"before": torch.tensor([0.25, 0.75]), "after": torch.tensor([1.0, 0.0])})
    assert path["steps"] == [0, 2] and path["share"] == [[0.25, 1.0], [0.75, 0.0]]


def test_answers_are_shown_as_they_were_said(made, run):
    """The turns of a dialogue hold all its steps, and the words of a held-out row are those of its record."""
    data, words = made[2], made[2]["words"]
    for d in data["dialogues"]:
        covered = [i for t in d["turns"] if t[0] == "agent" for i in range(t[1], t[2])]
        assert covered == list(range(len(d["steps"])))
    text = [d for d in data["dialogues"] if d["kind"] == "text"]
    for d, example in zip(text, run.examples("text")):
        answers = [m["content"] for m in example.record["messages"] if m["role"] == "assistant"]
        said = ["".join(words[s[0]] for s in d["steps"][t[1] : t[2]]) for t in d["turns"] if t[0] == "agent"]
        assert said == [a + "‹end›" for a in answers]


def test_the_code_of_a_token_is_among_those_that_would_have_said_it(made):
    """What the rollout said with its cache is what the world model says when the whole answer is read at once."""
    shown = [d for d in made[2]["dialogues"] if "others" in d]
    assert {kind: sum(d["kind"] == kind for d in shown) for kind in atlas.KINDS} == dict.fromkeys(atlas.KINDS, 2)
    for d in shown:
        for (word, code, *_), others in zip(d["steps"], d["others"]):
            assert sorted(k for _, _, codes in others for k in codes) == list(range(CODES))
            assert sum(p for _, p, _ in others) == pytest.approx(1, abs=0.01)
            if d["kind"] in ("before", "after"):
                assert next(w for w, _, codes in others if code in codes) == word


def test_a_forced_code_says_its_own_token_and_the_answer_goes_on_from_there(made, run):
    (found,), words = made[2]["forced"], made[2]["words"]
    latent, record = run.latent("rl_latent", *common.SPEAKING), run.prompts()[0]
    (said,) = atlas.answered(run, latent, [record], 0.0)
    decode = atlas_page.Words(run.processor.tokenizer, run.processor.eos_id)
    texts = [decode.texts[decode(t)] for t in said.tokens]
    assert [words[w] for w in found["free"]] == texts
    at = found["at"]
    assert [words[w] for w in found["with"][said.codes[at]]] == texts[at:]  # its own code changes nothing
    _, (places,) = atlas.said_places(run, latent, [record], [said])
    logits_KV = atlas_measures.every_code(run, latent)(places.e_MD[at])
    tokens_K = atlas_measures.greedy(logits_KV, run.speaker.never).tolist()
    firsts = [words[row[0]] for row in found["with"]]
    assert firsts == [decode.texts[decode(t)] for t in tokens_K]
    assert len(set(firsts)) > 1  # the codes do not all say the same there


def test_each_seed_has_its_numbers(made):
    first, again = made[3]["seeds"]
    assert first == again  # the same run, given twice
    assert first["codes"]["codes"] == CODES and first["text"]["places"] == 12


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--run", "nowhere"], "--run nowhere: has no folder stage3; give the folder of a finished run"),
        (["--paired", "no.jsonl"], "--paired: there is no no.jsonl; make runs/world/world.json draws the tiny world"),
    ],
)
def test_what_is_missing_is_named(folder, wrong, words):
    with pytest.raises(DataError, match=re.escape(words)):
        atlas.main(["--run", str(folder), *wrong])


def test_text_cannot_break_out_of_the_page(tmp_path):
    atlas_page.write(tmp_path / "a.html", {"run": "<b>&", "words": ["</script><script>alert(1)</script>"]})
    text = (tmp_path / "a.html").read_text()
    assert "alert(1)</script>" not in text and "&lt;b&gt;&amp;" in text


# --------------------------------------------------------------------------------------------------- in a real browser
@pytest.fixture(scope="module")
def opened(made, tmp_path_factory):
    """-> (the page in a browser, its data)"""
    if not browser.find():
        pytest.skip("no Chromium here; on Debian and Ubuntu: apt-get install chromium")
    found = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield found, made[2]
    found.close()


@pytest.fixture
def page(opened, made):
    """The page as it opens, in a wide window; nothing may complain while a test uses it."""
    window, _ = opened
    window.look(1280, 900)
    window.go("about:blank")
    window.go(made[0].as_uri())
    yield window
    assert window.faults == []


LISTED = "[...document.querySelectorAll('#rows tr')].map(r => +r.dataset.code)"
SHOWN = "document.querySelector('#code h2').textContent"


@pytest.mark.all
def test_the_list_is_sorted_by_a_column_both_ways(page, opened):
    codes = opened[1]["codes"]
    after = sorted(range(CODES), key=lambda k: (-codes[k]["share"]["after"], k))
    assert page.js(LISTED) == after and page.js(SHOWN) == f"code {after[0]}"
    page.click("th[data-key=code] button")
    assert page.js(LISTED) == list(range(CODES))
    page.click("th[data-key=code] button")
    assert page.js(LISTED) == list(range(CODES))[::-1]
    page.js("{ const s = document.getElementById('sort'); s.value = 'text'; s.dispatchEvent(new Event('change')); }")
    assert page.js(LISTED) == sorted(range(CODES), key=lambda k: (-codes[k]["share"]["text"], k))


@pytest.mark.all
def test_keys_search_choose_and_go_to_the_code(page):
    page.key("/")
    assert page.js("document.activeElement.id") == "search"
    page.key("5")
    assert page.js(LISTED) == [5]
    page.key("Enter")
    assert page.js("document.activeElement.id") == "code" and page.js(SHOWN) == "code 5"
    page.key("/")
    page.key("Escape")
    every = page.js(LISTED)
    assert len(every) == CODES
    page.click(f"#rows tr[data-code='{every[2]}']")
    page.key("ArrowDown")
    assert page.js(SHOWN) == f"code {every[3]}"
    page.key("ArrowUp")
    page.key("ArrowUp")
    assert page.js(SHOWN) == f"code {every[1]}" and page.js("location.hash") == f"#code-{every[1]}"


@pytest.mark.all
def test_a_word_is_searched(page, opened):
    data = opened[1]
    word = data["words"][data["codes"][page.js(LISTED)[0]]["stood"][0][0]].strip().lower()
    page.key("/")
    for letter in word:
        page.key(letter)

    def has(c):
        return any(word in data["words"][w].lower() for w, *_ in c["stood"] + c["instead"] + c["raised"])

    assert sorted(page.js(LISTED)) == [k for k, c in enumerate(data["codes"]) if has(c)]


@pytest.mark.all
def test_a_code_is_chosen_on_the_map_and_shown_whole(page):
    page.click("#map circle[data-code='7']")
    assert page.js(SHOWN) == "code 7"
    heads = page.js("[...document.querySelectorAll('#code h3')].map(h => h.textContent)")
    assert {"How often it is used", "Its path through RL", "Tokens it raises", "Tokens it lowers"} <= set(heads)
    assert {"Codes that say the same", "If code 7 is forced at one place"} <= set(heads)


@pytest.mark.all
def test_a_token_under_the_mouse_says_what_other_codes_would_have_said(page, opened):
    data = opened[1]
    page.click("#tab-talk")
    n = next(n for n, d in enumerate(data["dialogues"]) if d["kind"] == "after")
    steps, others = data["dialogues"][n]["steps"], data["dialogues"][n]["others"]
    for i in (3, 1):
        page.hover(f".said[data-step='{i}']")
        assert page.js("document.querySelector('#here h2 .code').textContent") == str(steps[i][1])
        said = page.js("[...document.querySelectorAll('#here .says .token')].map(t => t.textContent)")
        assert said == [data["words"][w].strip().replace("\n", "↵") or "␣" for w, _, _ in others[i][:14]]
    page.js("document.querySelector('.said.on').focus()")
    page.key("ArrowRight")
    assert page.js("document.activeElement.dataset.step") == "2"
    assert page.js("document.querySelector('#here h2 .code').textContent") == str(steps[2][1])


@pytest.mark.all
@pytest.mark.parametrize("tab", ["codes", "talk"])
def test_a_phone_needs_no_sideways_scrolling(page, made, tab):
    page.look(390, 844)
    page.go("about:blank")
    page.go(made[0].as_uri())
    page.click(f"#tab-{tab}")
    assert page.js("document.documentElement.scrollWidth") <= 390


# the colour of an element's text, and of what lies behind it, as red, green, blue from 0 to 255
SEEN = """(selector => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const paint = colour => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return [...document.querySelectorAll(selector)].map(e => {
    let behind = e;
    const back = () => getComputedStyle(behind).backgroundColor;
    while (/rgba\\(0, 0, 0, 0\\)|transparent/.test(back())) behind = behind.parentElement;
    return [paint(getComputedStyle(e).color), paint(back())];
  });
})"""


def contrast(colours):
    """The contrast ratio of two colours, as WCAG 2 defines it."""
    parts = np.array(colours) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    low, high = sorted((linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return high / low


@pytest.mark.all
@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark(page, dark):
    page.look(1280, 900, dark)
    found = {s: page.js(f"{SEEN}('{s}')") for s in ("body", ".soft", "td", ".code", "h3", "nav button", "summary")}
    page.click("#tab-talk")
    found[".said"] = page.js(f"{SEEN}('.said')")
    assert all(found.values())
    for selector, pairs in found.items():
        assert min(map(contrast, pairs)) >= 4.5, selector
    assert (np.mean(found["body"][0][1]) < 60) == dark
