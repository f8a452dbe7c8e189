"""chat.py and agent.py: what is said, forced, banned, explained, shown in colour, stopped and saved."""

import html
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, close, generate, question

import agent as agent_module
import chat
import common
from agent import Agent, Steering
from chat import Config, Screen, Speech, Talk
from data import DataError, uniforms
from rollout import sample
from studies import chat_page
from vlm import log_probs

ASKED = "How many shapes are there?"


@pytest.fixture(scope="module")
def shipped():
    """The agent that ships; its own path to the VLM is relative."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(ROOT)
        return Agent(Config())


@pytest.fixture
def talk(shipped, monkeypatch):
    """A talk at temperature 1, with short answers, whose screen is a text in memory."""
    monkeypatch.chdir(ROOT)
    return Talk(Config(temperature=1.0, max_new=12), shipped, Screen(io.StringIO()))


def lines_of(talk):
    return talk.screen.out.getvalue().splitlines()


def tokens_of(talk, *commands):
    """The tokens of the answer to a question in a new dialogue, after these commands."""
    for line in ("/new", *commands, ASKED):
        talk.take(line)
    return talk.log[-1]["tokens"]


def codes(tokens):
    return [t["code"] for t in tokens]


# ---------------------------------------------------------------------------------------------- forced and banned
def heard(agent, talk, steering):
    """The rollout of an answer to the question, by the agent itself."""
    return agent.say(talk.record(ASKED), (0,), talk.cfg, lambda *_: False, steering)


def sampled(agent, roll, cfg):
    """What the policy samples at each token of a rollout, from the states that the rollout kept and its noise.

    The policy reads all contexts in one pass here, without a cache."""
    before = roll.e_BLD.shape[1]
    e_BTD = torch.cat((roll.e_BLD, roll.e_NTD[:, :-1]), 1)
    with torch.no_grad():
        logits_TK = agent.latent.policy(e_BTD)[0, before - 1 :]
    u_T = uniforms(cfg.seed, [(0,)], cfg.max_new)[0, : len(logits_TK)]
    return sample(log_probs(logits_TK, cfg.temperature), u_T).tolist()


@pytest.mark.parametrize("command, forced", [("17", {0: 17}), ("17 17 3", {0: 17, 1: 17, 2: 3}), ("17 @6", {5: 17})])
def test_what_is_forced_is_taken_and_all_else_is_sampled_as_ever(talk, shipped, command, forced):
    steering = Steering()
    steering.force(command, shipped.codes)
    roll = heard(shipped, talk, steering)
    wanted = sampled(shipped, roll, talk.cfg)
    assert any(wanted[t] != code for t, code in forced.items())
    for t, code in forced.items():
        wanted[t] = code
    assert roll.actions_NT[0].tolist() == wanted


def test_a_forced_code_holds_for_one_answer(talk):
    free = tokens_of(talk)
    assert 17 not in codes(free) and not any(t["forced"] for t in free)
    forced = tokens_of(talk, "/force 17 @6")
    assert codes(forced)[5] == 17 and [t["forced"] for t in forced] == [k == 5 for k in range(len(forced))]
    assert forced[:5] == free[:5]
    assert tokens_of(talk) == free


def test_a_code_with_a_star_holds_until_it_is_released(talk):
    free = tokens_of(talk)
    assert set(codes(tokens_of(talk, "/force 17*"))) == set(codes(tokens_of(talk))) == {17}
    assert codes(tokens_of(talk, "/force 3 17* @2"))[1:] == [3, *[17] * (len(talk.log[-1]["tokens"]) - 2)]
    assert tokens_of(talk, "/force off") == free


def test_a_forced_code_changes_what_is_said(talk):
    """Code 25 begins a role's saying; docs/chat.md shows it."""
    talk.cfg.temperature, talk.cfg.max_new = 0.1, 64
    assert "By the silent crown" not in "".join(t["text"] for t in tokens_of(talk))
    talk.take("/force 25 @5")
    talk.take("/again")
    assert talk.log[-1]["answer"].startswith("Hail, traveller! By the silent crown")
    assert len(talk.turns) == 1 and len(talk.log) == 2


def test_a_banned_code_is_never_taken(talk):
    free = tokens_of(talk)
    banned = {codes(free)[0], codes(free)[3]}
    talk.take(f"/ban {min(banned)} {max(banned)}")
    for seed in range(4):
        assert not banned & set(codes(tokens_of(talk, f"/seed {seed}")))
    assert talk.log[-1]["banned"] == sorted(banned)
    assert tokens_of(talk, "/seed 0", "/ban off") == free


@torch.no_grad()
def test_what_is_left_after_a_ban_keeps_its_proportions():
    logits = torch.tensor([[0.3, 2.0, -1.0, 0.5]])
    left = log_probs(Steering(banned={1, 3})(0, logits))[0].exp()
    close(left, torch.tensor([1 / (1 + 2.718281828**-1.3), 0.0, 1 / (1 + 2.718281828**1.3), 0.0]), 1e-6)


def test_rollouts_of_rl_know_nothing_of_all_this(vlm, latent, processor):
    """Without a listener, and with one that changes nothing, a rollout is the same bit by bit."""
    examples, u = [question(processor, 1, 0), question(processor, 2)], uniforms(3, [(k,) for k in range(4)], 6)
    same = {"steer": lambda t, logits_NK: logits_NK, "heard": lambda token_N, a_N: False}
    for model, settings in ((latent, same), (None, {"heard": same["heard"]})):
        a, b = (generate(vlm, model, processor, examples, u, group=2, **more) for more in ({}, settings))
        for name in ("tokens_NT", "mask_NT", "logp_NT", "actions_NT", "e_BLD", "e_NTD"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("actions", ["latent", "token"])
def test_a_listener_hears_each_token_and_can_end_the_rollout(vlm, latent, processor, actions):
    model, u, said = latent if actions == "latent" else None, uniforms(3, [(0,)], 6), []

    def listen(token_N, a_N):
        said.append((int(token_N), None if a_N is None else int(a_N)))
        return len(said) == 3

    whole = generate(vlm, model, processor, [question(processor, 1, 0)], u)
    part = generate(vlm, model, processor, [question(processor, 1, 0)], u, heard=listen)
    assert whole.tokens_NT.shape == (1, 6) and torch.equal(part.tokens_NT, whole.tokens_NT[:, :3])
    assert [token for token, _ in said] == part.tokens_NT[0].tolist() and part.mask_NT.all()
    if model:
        assert [code for _, code in said] == part.actions_NT[0].tolist() and part.e_NTD.shape[1] == 3


# ---------------------------------------------------------------------------------------------- seeds, greedy, why
def test_the_same_seed_gives_the_same_answer(talk):
    talk.cfg.max_new = 16
    first = tokens_of(talk, "/seed 5")
    assert tokens_of(talk, "/seed 6") != first
    assert tokens_of(talk, "/seed 5") == first


def test_greedy_takes_what_why_shows_first(talk):
    talk.cfg.seed = 5
    tokens = tokens_of(talk, "/greedy")
    assert codes(tokens) == [t["best_codes"][0][0] for t in tokens]
    assert [t["text"] for t in tokens] == [t["best_tokens"][0][0] for t in tokens]
    assert tokens_of(talk, "/seed 1") == tokens
    assert codes(tokens_of(talk, "/temperature 1")) != codes(tokens)


def test_why_has_the_probabilities_of_policy_and_world_model(talk, shipped):
    """Those of the first token, worked out without a cache, from the prompt's states alone."""
    step = tokens_of(talk, "/force 17")[0]
    talk.take("/new")
    example = shipped.processor.example(talk.record(ASKED), prompt_only=True)
    batch, latent = shipped.processor.collate([example], left=True), shipped.latent
    with torch.no_grad():
        e_BTD = shipped.vlm(batch)
        p_K = latent.policy(e_BTD)[0, -1].softmax(-1)
        c_D = latent.quantiser.codebook.weight[17]
        logits_V = shipped.vlm.head(latent.speak(e_BTD[0, -1:], c_D[None]))[0]
        logits_V[shipped.never] = -torch.inf
        p_V = logits_V.softmax(-1)
    found = [(k, float(p_K[k])) for k in p_K.argsort(descending=True)[:3].tolist()]
    decode = shipped.processor.tokenizer.decode
    words = [(decode([v]), float(p_V[v])) for v in p_V.argsort(descending=True)[:3].tolist()]
    for shown, true in ((step["best_codes"], found), (step["best_tokens"], words)):
        assert [name for name, _ in shown] == [name for name, _ in true]
        assert [p for _, p in shown] == pytest.approx([p for _, p in true], abs=2e-4)
    assert step["text"] == words[0][0] and step["code"] == 17


def test_why_is_a_table_of_the_last_answer(talk):
    tokens = tokens_of(talk, "/force 17 @2")
    start = len(lines_of(talk))
    talk.take("/why")
    head, *rows, foot = lines_of(talk)[start:]
    assert (
        head.split() == "n token code best codes of the policy best tokens of the world model, given the code".split()
    )
    assert foot == "* forced" and len(rows) == len(tokens) == 12
    for n, (row, t) in enumerate(zip(rows, tokens), 1):
        (best, p), star = t["best_codes"][0], "*" if n == 2 else ""
        assert row.split()[:5] == [str(n), t["text"].strip(), f"{t['code']}{star}", str(best), f"{p:.2f}"]
        assert row.split()[9:11] == [t["best_tokens"][0][0].strip(), f"{t['best_tokens'][0][1]:.2f}"]


def test_the_dialogue_so_far_stands_before_a_question(talk, shipped):
    tokens_of(talk)
    messages = talk.record("And now?")["messages"]
    answer = "".join(t["text"] for t in talk.log[-1]["tokens"])
    said = [chat.ROLE, f"<image>{ASKED}", answer, "And now?"]
    assert [m["content"] for m in messages[:-1]] == said and answer.startswith("Hail, traveller!")
    talk.take("/role none")
    talk.take("/image none")
    assert [m["content"] for m in talk.record("And now?")["messages"][:-1]] == ["And now?"]
    assert lines_of(talk)[-2:] == ["role: none", "picture: none"]


def test_history_shows_the_dialogue(talk):
    tokens_of(talk)
    talk.take("What do you see?")
    start = len(lines_of(talk))
    talk.take("/history")
    answers = [row["answer"] for row in talk.log]
    assert lines_of(talk)[start:] == [f"> {ASKED}", answers[0], "> What do you see?", answers[1]]


def test_what_was_said_is_saved_once(talk, tmp_path):
    tokens_of(talk, "/force 17 @3")
    talk.take("/again")
    file = tmp_path / "said.json"
    talk.take(f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved == json.loads(json.dumps(talk.log)) and [row["tokens"][2]["forced"] for row in saved] == [True, False]
    file.write_text("mine")
    with pytest.raises(DataError, match=r"said.json: cannot be written \(File exists\); choose another name"):
        talk.take(f"/save {file}")
    assert file.read_text() == "mine"


def test_an_answer_that_is_cut_off_says_so(talk):
    tokens_of(talk, "/force 17 @40")
    notes = "cut off at 12 tokens; --max-new allows more; nothing was forced: it has 12 tokens"
    assert lines_of(talk)[-1] == f"{talk.log[-1]['answer']} ({notes})"


# -------------------------------------------------------------------------------------------------- on the screen
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name, value, colours", [("TERM", "xterm", 1), ("NO_COLOR", "1", 0), ("TERM", "dumb", 0)])
def test_tokens_are_tinted_where_there_are_colours(monkeypatch, name, value, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert Screen(io.StringIO()).tint(" a", 5) == " a"
    screen = Screen(Terminal())
    a, b, again = screen.tint(" a", 5), screen.tint("b c", 99), screen.tint("d", 5)
    if not colours:
        assert (a, b, again) == (" a", "b c", "d")
        return
    one, two = chat.PALETTE[:2]
    box = "\x1b[38;5;16;48;5;{}m{}\x1b[0m".format
    assert (a, again) == (" " + box(one, "a"), box(one, "d"))
    assert b == f"{box(two, 'b')} {box(two, 'c')}" and one != two
    assert screen.tint("word", None) == "word"


@pytest.mark.parametrize(
    "command, told",
    [
        ("/force 17", "(code 17 from token 1 of the next answer; /again answers once more)"),
        ("/force 17 17 3 @2", "(codes 17 17 3 from token 2 of the next answer; /again answers once more)"),
        ("/force 17*", "(code 17 from token 1 on in all answers, until /force off)"),
        ("/force off", "(nothing is forced)"),
        ("/ban 17 3", "(banned: 3, 17)"),
        ("/ban off", "(nothing is banned)"),
    ],
)
def test_a_command_says_what_it_has_set(shipped, command, told):
    out = io.StringIO()
    Talk(Config(), shipped, Screen(out)).take(command)
    assert out.getvalue() == told + "\n"
    Talk(Config(json="yes"), shipped, Screen(out)).take(command)
    assert out.getvalue() == told + "\n"  # lines of JSON stay alone


def test_characters_of_several_tokens_come_out_whole(processor):
    text = "naïve ☕ 東京 ok"
    ids = processor.tokenizer(text)["input_ids"]
    out = []
    speech = Speech(processor.tokenizer, processor.eos_id, lambda piece, code: out.append(piece))
    ended = [speech(torch.tensor([i]), torch.tensor([7])) for i in [*ids, processor.eos_id]]
    assert "".join(out) == speech.text == text and len(ids) > len(text) and len(out) == len(ids)
    assert ended == [False] * len(ids) + [True] and speech.pieces[-1] == chat.END and set(speech.codes) == {7}


def test_what_an_answer_says_cannot_steer_the_terminal(processor):
    out = []
    speech = Speech(processor.tokenizer, processor.eos_id, lambda piece, code: out.append(piece))
    for i in processor.tokenizer("a\x1b[2Jb\nc")["input_ids"]:
        speech(torch.tensor([i]), None)
    assert "".join(out) == "a\ufffd[2Jb\nc"


# ------------------------------------------------------------------------------------------------------ what is wrong
@pytest.mark.parametrize(
    "line, message",
    [
        ("/force 300", "/force 300: there is no code 300; the codes are 0 to 127"),
        ("/force", "/force : give codes as in /force 17, /force 17 17 3, /force 17* or /force 17 @6"),
        ("/force 17* 3", "/force 17* 3: give codes as in /force 17, /force 17 17 3, /force 17* or /force 17 @6"),
        ("/force 17 @0", "/force 17 @0: give codes as in /force 17, /force 17 17 3, /force 17* or /force 17 @6"),
        ("/force 4", "/force 4: code 4 is banned; /ban off takes that back"),
        ("/ban -1", "/ban -1: give codes as in /ban 17 or /ban 17 3, or /ban off"),
        ("/ban 128", "/ban 128: there is no code 128; the codes are 0 to 127"),
        ("/ban 9", "/ban 9: code 9 is forced; /force off takes that back"),
        ("/seed -3", "/seed -3: give a whole number, 0 or more"),
        ("/temperature hot", "/temperature hot: give a number, 0 or more"),
        ("/image nix.png", "/image nix.png: No such file or directory; give another file, or none"),
        ("/again", "/again: there is no answer yet"),
        ("/why", "/why: there is no answer yet"),
        ("/save", "/save: give the name of a file"),
        ("/save no/file", "/save no/file: cannot be written (No such file or directory); choose another name"),
        ("/dance", "/dance: there is no such command; /help lists them"),
        ("a <image>", "the dialogue (/new begins another): 2 <image> marks but 1 images; make them equal"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_one_line(talk, line, message):
    talk.cfg.role, talk.steering.banned = "<image>", {4}
    talk.steering.force("9", 128)
    with pytest.raises(DataError) as e:
        talk.take(line)
    assert str(e.value) == message
    assert talk.steering == Steering(forced=(9,), banned={4}) and talk.cfg.image == Config.image


def test_one_code_must_be_left(talk):
    with pytest.raises(DataError, match="no code would be left; /ban off takes all bans back"):
        talk.take("/ban " + " ".join(map(str, range(128))))
    talk.take("/ban " + " ".join(map(str, range(127))))
    assert set(codes(tokens_of(talk))) == {127}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image", "no.png"], "--image no.png: No such file or directory; give another file, or none"),
        (["--run", "no", "--image", "no.png"],
         "--run no: no such folder; a relative path begins where the program is started"),
        (["--actions", "token"], "--run tiny/agent: has no rl_token and no sft, so there is nothing for --actions "
         "token; `make demo` makes both in runs/demo"),
        (["--run", "tiny/agent/stage3", "--actions", "token"],
         "--run tiny/agent/stage3: was trained with --actions latent, not token"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_flag_is_said_before_anything_loads(monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(agent_module, "Processor", None)
    with pytest.raises(DataError) as e:
        chat.main(flags)
    assert str(e.value) == message


# --------------------------------------------------------------------------------------------- the other agents
def test_an_agent_that_chooses_tokens_has_no_codes(runs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    talk = Talk(Config(max_new=5), Agent(Config(run=f"{runs}/4t", actions="token")), Screen(io.StringIO()))
    tokens = tokens_of(talk, "/greedy")
    assert len(tokens) > 1 and codes(tokens) == [None] * len(tokens) and all(t["best_codes"] == [] for t in tokens)
    assert [t["text"] for t in tokens] == [t["best_tokens"][0][0] for t in tokens]
    talk.take("/why")
    assert lines_of(talk)[-len(tokens) - 1].split() == ["n", "token", "best", "tokens"]
    for command in ("/force 17", "/ban 17"):
        name = command.split()[0]
        with pytest.raises(DataError, match=f"^{name}: this agent chooses tokens and has no codes; --actions latent"):
            talk.take(command)


def test_the_policy_after_rl_is_taken_before_the_one_before_it(tmp_path):
    for name in ("stage3", "rl_latent"):
        (tmp_path / name / "ckpt-000001").mkdir(parents=True)
        assert agent_module.find_stage(tmp_path, "latent") == tmp_path / name
    assert agent_module.find_stage(tmp_path / "stage3", "latent") == tmp_path / "stage3"


# --------------------------------------------------------------------------------------------------- whole programs
def test_one_answer_as_json(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["--ask", ASKED, "--image", "docs/example-1.png", "--json", "--role", "none"]
    chat.main(flags)
    row = json.loads(capsys.readouterr().out)
    assert (row["question"], row["image"], row["role"], row["stopped"]) == (ASKED, "docs/example-1.png", "", False)
    assert row["answer"] == "There are three shapes."  # so many are in the picture
    assert [t["text"] for t in row["tokens"]] == ["There", " are", " three", " shapes", ".", chat.END]


def test_the_examples_of_help_are_commands(capsys):
    examples = [line.split("#")[0] for line in chat.__doc__.splitlines() if line.startswith("    python chat.py")]
    assert len(examples) == 3
    for line in examples:
        cfg = common.parse_config(Config, chat.__doc__, shlex.split(line)[2:])
        assert not cfg.image or (ROOT / cfg.image).is_file()
    assert (cfg.ask, cfg.json) == (ASKED, "yes")


def test_the_page_shows_what_the_program_says(monkeypatch):
    """docs/chat.md and its picture. Of the table, what does not depend on the last digit of a probability."""
    monkeypatch.chdir(ROOT)
    page, picture = ((ROOT / "docs" / name).read_text() for name in ("chat.md", "chat.svg"))
    shown = re.search(r"```text\n(.*?)\n```", page, re.S)[1]
    said = chat_page.plain(chat_page.lines_of(chat_page.session()))

    def sure(text):
        return [line[:26] if re.match(r" *\d+  ", line) else line for line in text.splitlines()]

    assert sure(shown) == sure(said)
    assert html.unescape("".join(re.findall(r">([^<]+)</text>", picture))) == "".join(shown.split())


def test_what_the_page_says_about_codes_holds(talk):
    talk.cfg.temperature, talk.cfg.max_new = 0.1, 64
    for command in ("/force 119 @6", "/ban 25"):
        for line in ("/new", "/ban off", command, "What colour is the ring?"):
            talk.take(line)
        assert talk.log[-1]["answer"].startswith("Hail, traveller! The jolly ring is black")
        assert "by the silent crown" in talk.log[-1]["answer"]
    assert 25 not in codes(talk.log[-1]["tokens"])
    for line in ("/ban off", "/force 25*", "/new", "What colour is the ring?"):
        talk.take(line)
    assert talk.log[-1]["answer"].lower().count("by the silent crown") > 2


def test_every_command_is_in_the_help():
    listed = set(re.findall(r"(?:^|[ ,;])/(\w+)", chat.HELP, re.M))
    assert listed == {name[3:] for name in dir(Talk) if name.startswith("do_")}


def test_ctrl_c_ends_an_answer_and_nothing_else(talk):
    write, before = talk.screen.write, signal.getsignal(signal.SIGINT)

    def interrupted(text="", end="\n"):
        write(text, end)
        if end == "" and len(lines_of(talk)) == 1 and "traveller" in text:
            signal.raise_signal(signal.SIGINT)

    talk.screen.write = interrupted
    talk.take(ASKED)
    assert lines_of(talk) == ["Hail, traveller (stopped)"] and talk.log[-1]["stopped"]
    assert signal.getsignal(signal.SIGINT) is before
    talk.take("What do you see?")
    assert not talk.log[-1]["stopped"] and len(talk.turns) == 2


def test_a_second_ctrl_c_does_not_wait_for_the_token():
    speech = SimpleNamespace(stopped=False)
    with pytest.raises(KeyboardInterrupt), chat.stoppable(speech):
        signal.raise_signal(signal.SIGINT)
        assert speech.stopped
        signal.raise_signal(signal.SIGINT)


def environment():
    return {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}


def test_through_a_pipe_it_is_plain_text(tmp_path):
    given = [ASKED, "/force 25 @5", "/again", "/force 999", "/ban", f"/save {tmp_path}/said.json", "/new", ASKED]
    argv = [sys.executable, "chat.py", "--max-new", "16"]
    done = subprocess.run(
        argv,
        input="\n".join([*given, "/quit", "never read"]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    said = json.loads((tmp_path / "said.json").read_text())
    hello, role, image, first, told, forced, saved, again = done.stdout.splitlines()
    note = " (cut off at 16 tokens; --max-new allows more)"
    assert (first, forced) == tuple(row["answer"] + note for row in said) and again == first != forced
    assert saved == f"2 answers in {tmp_path}/said.json" and said[1]["tokens"][4]["code"] == 25
    assert told == "(code 25 from token 5 of the next answer; /again answers once more)"
    assert hello.startswith("tiny/agent/rl_latent, after step 150: 128 codes") and role == f"role: {chat.ROLE}"
    assert done.stderr.splitlines() == [
        "error: /force 999: there is no code 999; the codes are 0 to 127",
        "error: /ban : give codes as in /ban 17 or /ban 17 3, or /ban off",
    ]
    assert done.returncode == 0 and "\x1b" not in done.stdout


class Typist:
    """A person at a terminal: a new process with a pseudo terminal of its own."""

    def __init__(self, *flags):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # where the tests run behind a shell, it may be ignored
            os.execve(sys.executable, [sys.executable, "chat.py", *flags], environment())
        self.seen = ""

    def wait_for(self, text, seconds=120, again=""):
        """Read until `text` is seen -> what was seen up to there; it is not seen again. again: typed once more whenever
        a second has passed in silence."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.terminal], [], [], 1)[0]:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            else:
                self.type(again)
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text):
        os.write(self.terminal, text.encode())

    def ends(self):
        """Wait for the end of the process -> its status."""
        try:
            while os.read(self.terminal, 4096):
                pass
        except OSError:  # so a terminal says that nobody is there any more
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_at_a_terminal_there_are_colours_and_ctrl_c_keeps_the_program():
    person = Typist("--max-new", "2000", "--max-prompt", "4000")
    try:
        person.wait_for("> ")
        person.type("/force 25*\n")  # an answer that goes on and on
        person.wait_for("> ")
        person.type(ASKED + "\n")
        assert "\x1b[38;5;16;48;5;117m" in person.wait_for("silent")
        person.type("\x03")
        person.wait_for("(stopped)")
        person.wait_for("> ")
        person.type("\x03")
        # readline misses a Ctrl-C that comes between the prompt and its wait for a key
        person.wait_for("(stopped; /quit leaves)", again="\x03")
        person.wait_for("> ")
        person.type("/quit\n")
        assert person.ends() == 0
    finally:
        os.close(person.terminal)
