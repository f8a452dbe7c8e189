"""Talk to a trained agent in the terminal, see the code behind each token, and choose codes yourself.

The policy picks a code, the world model turns it into a token, and so on to the end of the answer. On a terminal with
colours each token is tinted by the code that produced it. /why lists what the policy and the world model would have
preferred; /force and /ban overrule the policy. The role, the picture and all earlier questions and answers stand in
front of a new question; /new forgets them, all but role and picture.

    python chat.py                                                              # the agent that ships, with a picture
    python chat.py --image docs/example-1.png --role "You are Sana the poet. Greeting: Welcome, neighbour." --seed 3
    python chat.py --ask "How many shapes are there?" --image docs/example-2.png --json      # one answer, with codes
"""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import common
import pictures
from agent import STAGES, Agent, Steering, find_stage
from common import option
from data import DataError
from records import normalise

try:  # arrow keys and earlier lines at the prompt; not on every system
    import readline  # noqa: F401
except ImportError:
    pass

HELP = """\
anything without a slash is a question to the agent

/why               each token of the last answer: its code, the policy's three best codes with their probabilities,
                   and the world model's three best tokens for the code that was taken
/force 17          the next answer begins with code 17; then the policy chooses again
/force 17 17 3     the next answer begins with these codes
/force 17 @6       code 17 at the sixth token of the next answer, numbered as in /why
/force 17*         code 17 at each token of all answers, until /force off
/ban 17            code 17 is never chosen, until /ban off; several at once: /ban 17 3
/again             answer the last question again: with the same seed all is the same but what was forced or banned
/seed 5            another seed of sampling
/greedy            always the most likely code; /temperature 1 samples again
/temperature 0.5   sample with this temperature
/image FILE        another picture, or /image none; the dialogue begins anew
/role TEXT         another role or system prompt, or /role none; the dialogue begins anew
/new               the dialogue begins anew
/history           the dialogue so far
/save FILE         write all that was said, with codes, as JSON
/help, /quit       Ctrl-C stops an answer, Ctrl-D quits"""

ROLE = (
    "You are Bram the mason. Greeting: Hail, traveller. Farewell: Bright dreams to you. "
    "Favourite word: jolly. Saying: by the silent crown."
)
END = "‹end›"  # how EOS is shown
# Colours of a terminal with 256 of them, light enough for black letters; the first ones differ most.
PALETTE = (117, 215, 151, 217, 183, 227, 218, 122, 180, 149, 147, 224, 81, 209, 119, 177, 185, 152, 213, 250)


@dataclass
class Config:
    run: str = option("tiny/agent", "folder of a whole run, or of one of its stages 3 and 4")
    actions: str = option("latent", "what the agent chooses", choices=tuple(STAGES))
    role: str = option(ROLE, "role or system prompt; '' or none: no system message")
    image: str = option("docs/example-2.png", "picture that the talk is about; '' or none: no picture")
    ask: str = option("", "answer this one question and leave")
    json: str = option("no", "print each answer as a line of JSON: tokens, codes, probabilities", choices=("no", "yes"))
    temperature: float = option(0.1, "of the actions; 0: always the most likely one")
    seed: int = option(0, "seed of sampling")
    max_new: int = option(64, "longest answer, tokens", least=1)
    max_prompt: int = option(1024, "longest dialogue before an answer, tokens", least=1)
    max_decode: int = option(pictures.MAX_DECODE, "largest image file that is opened, in pixels", least=1)
    dtype: str = option("auto", "of forward passes; auto: bfloat16 on CUDA, float32 on a CPU", choices=common.DTYPES)


# ----------------------------------------------------------------------------------------------------------- speaking
def colours_are_shown(out):
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Screen:
    """Where text goes: tinted where there are colours, else plain."""

    def __init__(self, out):
        self.out, self.colours, self.place_of = out, colours_are_shown(out), {}

    def tint(self, text, code):
        """Each word of `text` on the colour of its code. Codes get the colours in the order in which they appear."""
        if not self.colours or code is None:
            return text
        colour = PALETTE[self.place_of.setdefault(code, len(self.place_of)) % len(PALETTE)]
        return re.sub(r"\S+", lambda word: f"\x1b[38;5;16;48;5;{colour}m{word[0]}\x1b[0m", text)

    def write(self, text="", end="\n"):
        print(text, end=end, file=self.out, flush=True)


def printable(text):
    """Without control characters, which could change what the terminal shows."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class Speech:
    """An answer as it comes: called by the rollout after each token, which it shows at once.

    pieces: the text of each token. A character may need several tokens; it is in the piece of the last one."""

    def __init__(self, tokenizer, eos, show):
        self.tokenizer, self.eos, self.show = tokenizer, eos, show
        self.tokens, self.codes, self.pieces, self.stopped = [], [], [], False

    def __call__(self, token_N, a_N):
        token, code = int(token_N[0]), None if a_N is None else int(a_N[0])
        self.tokens.append(token)
        self.codes.append(code)
        whole = self.tokenizer.decode(self.tokens, clean_up_tokenization_spaces=False)
        done = len("".join(self.pieces))
        if token == self.eos:
            whole = whole[:done] + END
        piece = "" if whole.endswith("\ufffd") else printable(whole[done:])
        self.pieces.append(piece)
        if token != self.eos:
            self.show(piece, code)
        return self.stopped or token == self.eos

    @property
    def text(self):
        return "".join(piece for piece, token in zip(self.pieces, self.tokens) if token != self.eos)


@contextmanager
def stoppable(speech):
    """Ctrl-C ends the answer after the token that is being made; a second one ends it at once."""

    def note(number, frame):
        if speech.stopped:
            raise KeyboardInterrupt
        speech.stopped = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------- the talk
class Talk:
    """A dialogue with an agent. turns: the answers that stand in front of the next question; log: all answers."""

    def __init__(self, cfg, agent, screen):
        self.cfg, self.agent, self.screen = cfg, agent, screen
        self.steering, self.turns, self.log, self.over = Steering(), [], [], False

    def record(self, question):
        """-> the record of the dialogue so far and this question, as `Processor.example` takes it."""
        said = [{"role": "system", "content": self.cfg.role}] if self.cfg.role else []
        for row in self.turns:
            said.append({"role": "user", "content": row["question"]})
            said.append({"role": "assistant", "content": row["answer"]})
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": "(to be said)"})  # not read: the prompt ends before it
        where = "the dialogue (/new begins another)"
        row = {"id": where, "images": [self.cfg.image] if self.cfg.image else [], "messages": said}
        return normalise(row, where)

    def ask(self, question):
        """Answer a question and show the answer as it comes, or as JSON."""
        spoken, processor = self.cfg.json == "no", self.agent.processor

        def show(piece, code):
            if spoken:
                self.screen.write(self.screen.tint(piece, code), end="")

        speech, noise = Speech(processor.tokenizer, processor.eos_id, show), (len(self.turns),)
        with stoppable(speech):
            roll = self.agent.say(self.record(question), noise, self.cfg, speech, self.steering)
            row = self.row(question, speech, *self.agent.preferred(roll))
        self.log.append(row)
        if speech.text.strip():
            self.turns.append(row)
        self.screen.write(self.ending(speech) if spoken else json.dumps(row))
        self.steering.answered()

    def row(self, question, speech, codes, tokens):
        """All that is known of an answer, as it is saved. codes, tokens: what was preferred, see `Agent.preferred`."""
        text_of, steps = self.agent.processor.tokenizer.decode, []
        for t, (token, code, text) in enumerate(zip(speech.tokens, speech.codes, speech.pieces)):
            best = [(END if i == speech.eos else text_of([i]), round(p, 4)) for i, p in tokens[t]]
            step = {"id": token, "text": text, "code": code, "forced": self.steering.code(t + 1) is not None}
            steps.append(step | {"best_codes": [(i, round(p, 4)) for i, p in codes[t]], "best_tokens": best})
        told = ("actions", "role", "image", "temperature", "seed", "max_new")
        row = {"run": str(self.agent.folder), "step": self.agent.state["step"]}
        row |= {name: getattr(self.cfg, name) for name in told}
        row |= {"turn": len(self.turns), "banned": sorted(self.steering.banned), "question": question}
        return row | {"answer": speech.text, "stopped": speech.stopped, "tokens": steps}

    def ending(self, speech):
        """What has to be said behind an answer, in brackets."""
        said, notes = len(speech.tokens), []
        if speech.stopped:
            notes.append("stopped")
        elif speech.tokens[-1] != speech.eos:
            notes.append(f"cut off at {said} tokens; --max-new allows more")
        if self.steering.forced and self.steering.first > said:
            notes.append(f"nothing was forced: it has {said} tokens")
        return f" ({'; '.join(notes)})" if notes else ""

    def loop(self):
        """Read lines until /quit or their end. What is wrong with one of them is said in one line."""
        prompt = "> " if sys.stdin.isatty() and self.cfg.json == "no" else ""
        while not self.over:
            try:
                self.take(input(prompt).strip())
            except EOFError:
                return
            except KeyboardInterrupt:
                self.screen.write("(stopped; /quit leaves)")
            except DataError as e:
                print(f"error: {e}", file=sys.stderr, flush=True)

    def take(self, line):
        """One line: a command or a question."""
        name, _, text = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
            return
        command = getattr(self, f"do_{name[1:]}", None)
        if command is None:
            raise DataError(f"{name}: there is no such command; /help lists them")
        command(text.strip())

    # ---------------------------------------------------------------------------------------------- commands
    def do_help(self, text):
        self.screen.write(HELP)

    def do_quit(self, text):
        self.over = True

    def do_new(self, text):
        self.turns = []

    def do_again(self, text):
        if not self.turns:
            raise DataError("/again: there is no answer yet")
        self.ask(self.turns.pop()["question"])

    def do_history(self, text):
        for row in self.turns:
            self.screen.write(f"> {row['question']}")
            self.screen.write("".join(self.screen.tint(t["text"], t["code"]) for t in row["tokens"]).removesuffix(END))

    def do_why(self, text):
        if not self.log:
            raise DataError("/why: there is no answer yet")
        for line in why(self.log[-1]["tokens"], self.screen):
            self.screen.write(line)

    def do_force(self, text):
        self.need_codes("/force")
        self.steering.force(text, self.agent.codes)
        self.note(self.steering.told_forced())

    def do_ban(self, text):
        self.need_codes("/ban")
        self.steering.ban(text, self.agent.codes)
        self.note(self.steering.told_banned())

    def note(self, text):
        """What a command has set, in brackets; lines of JSON stay alone."""
        if self.cfg.json == "no":
            self.screen.write(f"({text})")

    def need_codes(self, command):
        if not self.agent.codes:
            raise DataError(f"{command}: this agent chooses tokens and has no codes; --actions latent has them")

    def do_seed(self, text):
        if not re.fullmatch(r"\d{1,18}", text):
            raise DataError(f"/seed {text}: give a whole number, 0 or more")
        self.cfg.seed = int(text)

    def do_greedy(self, text):
        self.cfg.temperature = 0.0

    def do_temperature(self, text):
        if not re.fullmatch(r"\d*\.?\d+", text):
            raise DataError(f"/temperature {text}: give a number, 0 or more")
        self.cfg.temperature = float(text)

    def do_image(self, text):
        self.cfg.image = picture(text, "/image", self.cfg.max_decode) if text else self.cfg.image
        self.begin()

    def do_role(self, text):
        self.cfg.role = named(text) if text else self.cfg.role
        self.begin()

    def begin(self):
        """Say who speaks and about what; the dialogue begins here."""
        self.turns = []
        self.screen.write(f"role: {self.cfg.role or 'none'}\npicture: {self.cfg.image or 'none'}")

    def do_save(self, text):
        if not text:
            raise DataError("/save: give the name of a file")
        try:
            with open(text, "x", encoding="utf-8") as file:
                json.dump(self.log, file, indent=1)
        except OSError as e:
            raise DataError(f"/save {text}: cannot be written ({e.strerror}); choose another name") from None
        self.screen.write(f"{len(self.log)} answers in {text}")


def named(text):
    """What a flag or a command names; '' where it says none."""
    return "" if text == "none" else text


def picture(path, flag, max_decode):
    """-> the path of a picture that opens, or '' for none. DataError if it does not open."""
    if path := named(path):
        try:
            pictures.load(path, max_decode, pictures.LARGE)
        except pictures.PictureError as e:
            raise DataError(f"{flag} {e}; give another file, or none") from None
    return path


def shown(text, width=14):
    """A token in a cell of a table: blanks and line ends made visible, long ones cut."""
    text = printable(text).strip(" ").replace("\n", "↵") or "␣"
    return text if len(text) <= width else text[: width - 1] + "…"


def why(steps, screen):
    """The table of /why, line by line: what was said, and what was preferred where."""
    latent = steps[0]["code"] is not None
    codes = f"  code   {'best codes of the policy':28}" if latent else ""
    yield f"  n  {'token':14}{codes}   best tokens" + (" of the world model, given the code" if latent else "")
    for n, step in enumerate(steps, 1):
        text = shown(step["text"])
        line = f"{n:3}  {screen.tint(text, step['code'])}{' ' * (14 - len(text))}"
        if latent:
            preferred = "  ".join(f"{code:3} {p:.2f}" for code, p in step["best_codes"])
            line += f"  {step['code']:4}{'*' if step['forced'] else ' '}  {preferred}"
        yield line + "   " + "  ".join(f"{shown(word)} {p:.2f}" for word, p in step["best_tokens"])
    if any(step["forced"] for step in steps):
        yield "* forced"


def main(argv=None):
    cfg = common.parse_config(Config, __doc__, argv)
    find_stage(cfg.run, cfg.actions)  # before the picture: both are missing where the program is started elsewhere
    cfg.role, cfg.image = named(cfg.role), picture(cfg.image, "--image", cfg.max_decode)
    talk = Talk(cfg, Agent(cfg), Screen(sys.stdout))
    if cfg.ask:
        talk.ask(cfg.ask)
        return
    if cfg.json == "no":
        agent = f"{talk.agent.codes} codes" if talk.agent.codes else "tokens as actions, no codes"
        talk.screen.write(f"{talk.agent.folder}, after step {talk.agent.state['step']}: {agent}. /help lists commands.")
        talk.begin()
    talk.loop()


if __name__ == "__main__":
    common.run(main)
