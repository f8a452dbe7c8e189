"""The VLM's states of training rows, kept on disk. The VLM is frozen, so what it makes of a row is computed once, for
all epochs, stages and runs that are given the same folder (--states).

    FOLDER/KEY.safetensors   h_TD of one row, in the VLM's own dtype: nothing is rounded

KEY is a hash of all that h depends on: the VLM's weights and configuration, the row's token ids, the patches of its
images. So no file is ever out of date: another checkpoint, picture, --max-length or --max-pixels has other keys.

A row is read alone and without padding, so its states are the same to the last bit whatever batch it stands in. Against
states of a padded batch they differ by rounding: below 1e-4 in float32 (the tiny VLM's), as a test checks.

A file is filled under another name, then renamed: it is whole or not there, also after a kill, and any number of
processes may share a folder. Delete the folder when no run needs it any more.
"""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import checkpoint
from common import Everywhere, log_option, option, say, world_size


@dataclass
class KeepsStates(Everywhere):
    """Settings of the stages that read rows with the frozen VLM."""

    log: str = log_option()
    workers: int = option(0, "processes that read each file ahead of time, pictures included; 0: none")
    states: str = option("", "folder that keeps the VLM's states of the rows, for all stages and runs; '': none")
    states_gib: float = option(4.0, "GiB that this folder may take; rows beyond it are computed each time", above=0.0)


def reader(vlm, cfg):
    """-> function: Batch -> h_BTD, with the attribute `head`: the VLM itself, or with --states a KeptStates."""
    return KeptStates(vlm, cfg.states, cfg.states_gib) if cfg.states else vlm


def fingerprint(vlm):
    """-> sha256 over the configuration and every weight of a VLM, their dtype among them."""
    found = hashlib.sha256(vlm.model.config.to_json_string().encode())
    for name, p in vlm.model.state_dict().items():
        found.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        found.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    return found.digest()


class KeptStates:
    """Stands in a loss where the VLM stands: h_BTD of a batch of training rows, and the LM head."""

    def __init__(self, vlm, folder, gib):
        """gib: GiB that the folder may take. Each rank takes its part of what is left; two runs do not share it."""
        checkpoint.open_folder(folder, "--states")
        self.vlm, self.head, self.folder, self.model = vlm, vlm.head, Path(folder), fingerprint(vlm)
        there = 0
        for file in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                there += file.stat().st_size
        self.room, self.full = (gib * 2**30 - there) / world_size(), False

    @torch.no_grad()
    def __call__(self, batch):
        """-> h_BTD without gradient, 0 at padding, which must stand behind the rows."""
        B, T = batch.ids_BT.shape
        rows = [self.row(batch.rows(slice(b, b + 1))) for b in range(B)]
        h_BTD = rows[0].new_zeros(B, T, rows[0].shape[-1])
        for b, h_TD in enumerate(rows):
            h_BTD[b, : len(h_TD)] = h_TD
        return h_BTD

    def row(self, one):
        """-> h_TD of a batch of one row, T its own length: from its file if there is one, else computed and kept."""
        real = slice(0, int(one.mask_BT.sum()))
        ids, mask, response = one.ids_BT[:, real], one.mask_BT[:, real], one.response_BT[:, real]
        one = replace(one, ids_BT=ids, mask_BT=mask, response_BT=response)
        path = self.folder / f"{self.key(one)}.safetensors"
        try:
            return load_file(path)["h"].to(ids.device)
        except (OSError, SafetensorError, KeyError):
            h_TD = self.vlm(one)[0]
        self.keep(path, h_TD)
        return h_TD

    def key(self, one):
        found = hashlib.sha256(self.model)
        for x in (one.ids_BT, one.grids, one.pixels):
            if x is not None:
                found.update(str(tuple(x.shape)).encode())
                found.update(x.cpu().contiguous().numpy())
        return found.hexdigest()[:40]

    def keep(self, path, h_TD):
        """Write a row's file. Without room, or where it cannot be written, nothing more is kept; the run goes on."""
        data = save({"h": h_TD.contiguous().cpu()})
        if self.full or len(data) > self.room:
            return self.stop(f"--states-gib is reached; raise it, or delete what no run needs in {self.folder}")
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as new:
                new.write(data)
            os.replace(new.name, path)
            self.room -= len(data)
        except OSError as e:
            self.stop(f"{self.folder} cannot be written ({checkpoint.first_line(e)})")

    def stop(self, why):
        if not self.full:
            say(f"the states of further rows are computed each time: {why}")
        self.full = True
