"""The parts of studies/smol.py's report as Markdown: numbers -> tables and text."""

from studies.memory import markdown


def table(title, head, rows):
    """rows: [(name, number, text or None, ...)] -> a heading and a table."""
    return f"## {title}\n\n" + markdown(head, [[row[0], *map(cell, row[1:])] for row in rows])


def cell(value):
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def words(tokens):
    """Tokens as words in a table's cell."""
    return " ".join(f"`{t.strip() or '␣'}`" for t in tokens).replace("|", "\\|").replace("\n", "↵")


def losses(found):
    names = {"vlm": "bare VLM", "inferred": "inferred codes", "random": "random codes"}
    kinds = [k for k in ("paired", "text") if k in found]
    head = ["held-out rows", *(f"{kind}, {unit}" for kind in kinds for unit in ("nats a token", "bits a byte"))]
    rows = [(label, *(x for kind in kinds for x in found[kind][name])) for name, label in names.items()]
    numbers = [(k.replace("_", ", "), v) for part in ("codes", "clone") for k, v in found[part].items()]
    return table("Losses", head, rows) + "\n\n" + table("Codes and clone", ["number", "value"], numbers)


def projector(found):
    head = ["run", "error of P", "of the identity", "there and back", "mean square of e^T", "shift by the picture"]
    rows = [(run, r["mse"], r["identity"], r["cycle"], r["square"], r["shift"]) for run, r in found.items()]
    return table("Projector, squared error a dimension", head, rows)


def picture(found):
    rows = [
        (f"{name} picture", found[key]) for name, key in (("right", "right"), ("another", "another"), ("no", "none"))
    ]
    return table(f"The picture, {found['records']} records", ["seen", "nats a token, bare VLM"], rows)


def speech(found):
    head = ["model", "temperature", "repeated 4-grams", "nats a token, bare VLM", "tokens", "judge ratio", "likeness"]
    names = ("repeated 4-grams", "nats", "length", "ratio", "likeness")
    rows = [(model, t, *(row.get(n) for n in names)) for model, by in found.items() for t, row in by.items()]
    return table("Speech", head, rows)


def exposure(found):
    rows = [
        ("true answers" if t == "references" else f"its own, temperature {t}", r["agree"], r["bc"])
        for t, r in found.items()
    ]
    return table("Exposure of the cloned policy", ["answers", "arg max is the inferred code", "L_bc, nats"], rows)


def go_on(found):
    head = ["model", "code", "says the VLM's token", "context alone", "some code does"]
    rows = [(model, r["code"], r["share"], r["context"], r["any code"]) for model, r in found.items()]
    return table("The code that changes least", head, rows)


def meanings(found):
    rows = [[str(r["code"]), f"{r['share']:.3f}", *(words(r[k]) for k in ("raised", "lowered", "said"))] for r in found]
    head = ["code", "share", "raised", "lowered", "stood for"]
    return "## What the most used codes do\n\n" + markdown(head, rows)


def curves(found):
    sides = {name: r for name, r in found.items() if name != "peak_gib"}
    rows = [(name, *point) for name, r in sides.items() for point in r["fixed"]]
    text = table("Reward on the validation part", ["side", "step", "reward", "KL", "entropy"], rows)
    seconds = [(name, r.get("s_rollout"), r.get("s_update")) for name, r in sides.items()]
    text += "\n\n" + table("Seconds of a step, median", ["side", "rollout", "update"], seconds)
    return text + "\n\n" + table("Memory at its peak", ["run", "GiB"], list(found["peak_gib"].items()))


def learnt(found):
    head = ["side", "when", "step", "reward", "reward of the best answer", "gain", "standard error of the gain"]
    names = ("step", "reward", "top", "gain", "error")
    rows = [(side, when, *(row[n] for n in names)) for side, by in found.items() for when, row in by.items()]
    return table("What RL has learnt, on the validation part", head, rows)


def dialogues(found):
    lines = ["## Six dialogues"]
    for r in found:
        lines += ["", f"### {r['test']}: {r['id']}", "", f"Picture: {', '.join(r['images']) or 'none'}", "", "```"]
        lines += [r["asked"], "```", "", f"- *reference*: {one_line(r['reference'])}"]
        lines += [f"- *{model}, {t}*: {one_line(text)}" for model, by in r["said"].items() for t, text in by.items()]
    return "\n".join(lines)


def one_line(text):
    return " ".join(text.split())


def ablations(found):
    names = ("vlm", "inferred", "random")
    head = ["stage 2", *(f"{kind}, {n}" for kind in ("paired", "text") for n in names)]
    rows = [(v, *(val[kind][f"val_{n}"] for kind in ("paired", "text") for n in names)) for v, val in found.items()]
    return table("Held-out losses, nats a token", head, rows)


PAGES = {
    "losses": losses,
    "projector": projector,
    "picture": picture,
    "speech": speech,
    "exposure": exposure,
    "go on": go_on,
    "meanings": meanings,
    "curves": curves,
    "learnt": learnt,
    "dialogues": dialogues,
    "ablations": ablations,
}
