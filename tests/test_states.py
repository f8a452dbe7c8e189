"""states.py: kept states are the VLM's, whatever they stand beside; they follow their row and their checkpoint; the
stages learn the same with them."""

import pytest
import torch
from helpers import TINY, close, cut_off, same_weights

import stage1_projector
import stage2_codebook
import stage3_bc
from common import read_metrics
from data import DataError, Records
from states import KeptStates
from vlm import VLM


class Counted:
    """A VLM that counts the rows it reads."""

    def __init__(self, vlm):
        self.vlm, self.model, self.head, self.rows = vlm, vlm.model, vlm.head, 0

    def __call__(self, batch):
        self.rows += len(batch.ids_BT)
        return self.vlm(batch)


@pytest.fixture
def counted(vlm):
    return Counted(vlm)


@pytest.fixture(scope="module")
def batch(world, processor):
    """Rows with and without an image, of different lengths."""
    records = [Records(world / f"{name}.jsonl")[i] for name in ("paired", "text") for i in range(2)]
    return processor.collate([processor.example(r) for r in records])


def test_kept_states_are_the_vlm_s(counted, batch, tmp_path):
    """Up to rounding, 0 at padding; the second time no row is read, and every bit is the same."""
    assert batch.padded
    kept = KeptStates(counted, tmp_path, 1)
    first, again = kept(batch), kept(batch)
    assert counted.rows == 4 and torch.equal(first, again) and kept.head is counted.head
    with torch.no_grad():
        want = counted.vlm(batch)
    close(first[batch.mask_BT], want[batch.mask_BT])
    assert (first[~batch.mask_BT] == 0).all()
    other_run = KeptStates(counted, tmp_path, 1)
    assert torch.equal(other_run(batch), first) and counted.rows == 4


def test_a_row_s_states_do_not_depend_on_the_rows_beside_it(counted, batch, world, processor, tmp_path):
    """Alone, without padding, it is the same row: found again to the last bit."""
    together, kept = KeptStates(counted, tmp_path, 1)(batch), KeptStates(counted, tmp_path, 1)
    alone = processor.collate([processor.example(batch.records[2])])
    assert alone.ids_BT.shape[1] < batch.ids_BT.shape[1]
    assert torch.equal(kept(alone)[0], together[2][: alone.ids_BT.shape[1]]) and counted.rows == 4


def test_what_the_states_depend_on_is_in_the_key(batch, tmp_path):
    """Another token, another pixel, another weight, another dtype: computed anew, and never taken for the old."""
    counted = Counted(VLM(TINY))
    row = batch.rows(slice(0, 1))
    h = KeptStates(counted, tmp_path, 1)(row)
    ids, pixels = row.ids_BT.clone(), row.pixels.clone()
    ids[0, 1], pixels[0, 0] = 5, 3.0
    kept = KeptStates(counted, tmp_path, 1)
    for name, value in (("ids_BT", ids), ("pixels", pixels)):
        before = getattr(row, name)
        setattr(row, name, value)
        assert not torch.equal(kept(row), h)
        setattr(row, name, before)
    assert counted.rows == 3 and torch.equal(kept(row), h)
    counted.vlm.text.norm.weight.mul_(2)
    close(KeptStates(counted, tmp_path, 1)(row), 2 * h)
    counted.vlm.model.bfloat16()
    assert KeptStates(counted, tmp_path, 1)(row).dtype == torch.bfloat16
    assert counted.rows == 5


def test_in_bfloat16_nothing_more_is_rounded(batch, tmp_path):
    counted = Counted(VLM(TINY, dtype=torch.bfloat16))
    kept = KeptStates(counted, tmp_path, 1)
    row = batch.rows(slice(3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        first, again = kept(row), kept(row)
        with torch.no_grad():
            alone = counted.vlm(row)[:, : first.shape[1]]
    assert counted.rows == 1 and first.dtype == torch.bfloat16 and torch.equal(first, again)
    close(first[row.mask_BT], alone[row.mask_BT], 0.1)


def test_a_file_that_was_cut_off_is_written_anew(counted, batch, tmp_path):
    kept = KeptStates(counted, tmp_path, 1)
    h = kept(batch)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    sizes = [f.stat().st_size for f in files]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    assert torch.equal(kept(batch), h) and counted.rows == 6
    assert [f.stat().st_size for f in files] == sizes


def test_the_folder_does_not_outgrow_its_limit(counted, batch, tmp_path, capsys):
    """Nothing more is written, the states are computed each time, and the console says so once."""
    h = KeptStates(counted, tmp_path / "all", 1)(batch)
    sizes = sorted(f.stat().st_size for f in (tmp_path / "all").iterdir())
    limit, folder = sum(sizes) - 1, tmp_path / "some"
    for _ in range(2):  # a second run finds what the first has left
        kept = KeptStates(counted, folder, limit / 2**30)
        assert torch.equal(kept(batch), h) and torch.equal(kept(batch), h)
        assert 0 < sum(f.stat().st_size for f in folder.iterdir()) <= limit
    assert capsys.readouterr().out.count("--states-gib") == 2


def test_a_folder_that_cannot_be_made_is_named(counted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--states .*file"):
        KeptStates(counted, tmp_path / "file", 1)


def test_sft_keeps_no_states(flags, tmp_path):
    with pytest.raises(DataError, match="--states: SFT trains the VLM"):
        stage3_bc.main([*flags.sft, "--states", str(tmp_path)])


def stages(flags, runs, out):
    """{stage: (main, flags)} of the stages that read rows, two or three steps each."""
    book = ["--projector", f"{runs}/1", "--steps-a", "1", "--steps-b", "2"]
    clone = ["--init", f"{runs}/2", "--steps-clone", "1", "--steps-adapt", "1"]
    return {
        "1": (stage1_projector.main, [*flags.paired, "--steps", "2", "--batch", "4", "--out", f"{out}/1"]),
        "2": (stage2_codebook.main, [*flags.book, *book, "--out", f"{out}/2"]),
        "3": (stage3_bc.main, [*flags.clone, *clone, "--out", f"{out}/3"]),
    }


def equal_up_to_rounding(a, b):
    """Two runs log the same losses."""
    a, b = read_metrics(a), read_metrics(b)
    assert len(a) == len(b) >= 2 and all(x.keys() == y.keys() for x, y in zip(a, b))
    for x, y in zip(a, b):
        assert {k: v for k, v in x.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in y.items() if k != "seconds"}, rel=1e-3, abs=1e-4
        )


def test_the_stages_learn_the_same_from_kept_states(flags, runs, tmp_path, monkeypatch):
    """All in one folder: up to rounding as without it, also in parts; to the last bit after an interruption."""
    keep = ["--states", str(tmp_path / "states"), "--save-every", "1"]
    for stage, (main, argv) in stages(flags, runs, tmp_path / "plain").items():
        main(argv)
        kept = stages(flags, runs, tmp_path / "kept")[stage][1]
        main([*kept, *keep])
        equal_up_to_rounding(tmp_path / "plain" / stage, tmp_path / "kept" / stage)
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "states").iterdir()}
    main, argv = stages(flags, runs, tmp_path / "again")["2"]
    cut_off(monkeypatch, main, [*argv, *keep], 2)
    main([*argv, *keep])
    assert same_weights(tmp_path / "again" / "2", tmp_path / "kept" / "2")
    main, argv = stages(flags, runs, tmp_path / "parts")["2"]
    main([*argv, *keep, "--micro", "2"])
    equal_up_to_rounding(tmp_path / "parts" / "2", tmp_path / "kept" / "2")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "states").iterdir()} == written
