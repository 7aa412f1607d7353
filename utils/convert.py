"""Models between the layouts: `python -m utils.convert IN OUT` turns single files into folders and back."""

from __future__ import annotations

import argparse
import errno
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_TRY_LATER, UserError, printable
from utils.files import rename, sync_folder, sync_tree
from utils.source import SINGLE_ENDINGS, Source, Wanted, read_source

if TYPE_CHECKING:
    import torch

    from utils.export import Weights


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def convert(
    source: str, target: Path, *, wanted: Wanted | None = None, fp32: bool = False, title: str | None = None
) -> str:
    """Write the model `source` as `target`: a single file if that ends in `.safetensors`, else a Diffusers folder.

    The result is read back, compared and on the disk before it gets its name. Returns the line on what was read.
    Raises `UserError` when `target` is there already or `source` cannot be read, `OSError` when the disk is full.
    """
    as_file = target.suffix.lower() == ".safetensors"
    if not as_file and target.suffix.lower() in SINGLE_ENDINGS:
        raise UserError(f"{printable(target)}: pickles are not written; end the name in .safetensors")
    if target.exists():
        raise UserError(f"{printable(target)} is there already; name a new one")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {printable(target.parent)} to write into")
    found = read_source(source, wanted, tokenizer=not as_file)
    beside = _yaml_beside(target, found) if as_file else None
    if beside is not None and beside.exists():
        raise UserError(f"{printable(beside)} is there already and would be written anew; name another target")
    # Beside the target, so that taking its name is one step on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if as_file:
            written = _write_file(scratch / target.name, found, fp32, title if title is not None else target.stem)
        else:
            written = [_write_folder(scratch / target.name, found, fp32)]
        sync_tree(scratch)
        for path in reversed(written):
            rename(path, target.parent / path.name)
        sync_folder(target.parent)
    except UserError as error:
        # What lay in the scratch folder is known to the user by the name it was to get.
        raise type(error)(str(error).replace(printable(scratch), printable(target.parent))) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found.told


def checked_weights(found: Source) -> Weights:
    """The tensors of `found` as views of its files, checked for names, shapes and finiteness as for training."""
    from utils.models import disk_names, empty_networks, fitted

    networks = empty_networks(found.files)
    parts = found.parts(disk_names(networks))
    return {part: fitted(part, network, parts[part], found.name) for part, network in networks.items()}


def _yaml_beside(target: Path, found: Source) -> Path | None:
    from utils.export import yaml_beside

    return yaml_beside(target, found.files)


def _precision(fp32: bool) -> torch.dtype:
    import torch

    return torch.float32 if fp32 else torch.float16


def _write_file(path: Path, found: Source, fp32: bool, title: str) -> list[Path]:
    from utils.export import check_single_file, write_single_file
    from utils.modelspec import modelspec

    weights, dtype = checked_weights(found), _precision(fp32)
    side = 8 * int(found.files.unet.get("sample_size", 64))
    spec = modelspec(found.files, title=title, date=datetime.now(UTC), resolution=side)
    written = write_single_file(path, weights, found.files, dtype=dtype, metadata=spec)
    check_single_file(path, weights, found.files, dtype)
    return written


def _write_folder(folder: Path, found: Source, fp32: bool) -> Path:
    from utils.export import check_folder, write_folder
    from utils.models import build_tokenizer

    build_tokenizer(found.files)  # its files go out as they came: damaged ones are refused, as for training
    weights, dtype = checked_weights(found), _precision(fp32)
    write_folder(folder, weights, found.files, dtype=dtype)
    check_folder(folder, weights, dtype)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, convert, and return the exit code.

    0: done; 2: the user's to mend; 75: no room or no network, try again later; 130: Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m utils.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", help="a Diffusers folder, a .safetensors or .ckpt file, or a hub id")
    parser.add_argument("target", metavar="OUT", type=Path, help="a new .safetensors file, or a new folder")
    parser.add_argument("--fp32", action="store_true", help="full precision instead of half")
    parser.add_argument("--ema", action="store_true", help="take the averaged UNet of a file that holds both")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), help="override what is found")
    parser.add_argument("--model_config", metavar="FOLDER", help="a Diffusers folder or hub id that describes IN")
    parser.add_argument("--variant", help="of a folder or repository, such as fp16")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--title", help="name written into a single file")
    given = parser.parse_args(arguments)
    # Where Diffusers imports it, it warns of kernels for 4-bit networks, which nobody here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    wanted = Wanted(given.variant, given.revision, given.prediction_type, given.model_config, given.ema)
    try:
        told = convert(given.source, given.target, wanted=wanted, fp32=given.fp32, title=given.title)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return _fail(f"there is no room for {printable(given.target)} ({error.strerror}); make some", EXIT_TRY_LATER)
    except KeyboardInterrupt:
        return _fail("stopped; nothing is left behind", EXIT_INTERRUPTED)
    print(f"{told}; written to {printable(given.target)} and compared")  # noqa: T201
    return EXIT_DONE


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201 - a command of its own, without a logger
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
