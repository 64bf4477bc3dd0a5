"""`msee submit`: write the archive of masks that the PASCAL VOC 2012 test server takes."""

import argparse
from pathlib import Path

from ..inference.submission import check_archive_name, load_test_images, predict_masks, write_archive
from .common import MODEL_HELP, add_protocol, chosen_protocol, load_model, process_state


HELP = "write the archive of masks that the PASCAL VOC 2012 test server takes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--images", required=True, help="a folder of image files, or a data set as datasets_scripts.voc writes it"
    )
    parser.add_argument("--split", default="test", help="of a data set (default: %(default)s)")
    parser.add_argument("--list", type=Path, help="file of image ids, one a line, such as VOC's test.txt: these alone")
    parser.add_argument("--output", type=Path, required=True, help="the archive, .tgz or .tar.gz")
    add_protocol(parser, default="msee-crf")


def run(arguments: argparse.Namespace) -> int:
    protocol, state = chosen_protocol(arguments), process_state()
    check_archive_name(arguments.output)
    wanted = None if arguments.list is None else arguments.list.read_text(encoding="utf-8").split()
    image_ids, images = load_test_images(arguments.images, arguments.split, wanted)
    model, processor = load_model(arguments.model)
    masks = predict_masks(model.to(state.device), processor, images, protocol, arguments.crf_workers)
    if state.is_main_process:
        write_archive(arguments.output, masks, image_ids)
        print(f"Protocol: {protocol.title}\nWritten to {arguments.output}: {len(masks)} masks")
    return 0
