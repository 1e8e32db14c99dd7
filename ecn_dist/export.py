"""`export`: a trained model as a file that other programs run, with its model card."""

import argparse
import sys
from pathlib import Path

from ecn_dist.command import command
from ecn_dist.config import flatten
from ecn_dist.embed import add_model_options
from ecn_dist.reporting import model_card
from ecn_dist.serving import exporting
from ecn_dist.serving.embedder import Embedder

DESCRIPTION = """\
Write a trained model as ONNX, TorchScript or PT2 (torch.export): normalised pictures (n, 3, H, W) float32 in, features
(n, C) float32 of unit length out, any n. The file is loaded again and held against the model on random input before it
gets its name. Input size, normalisation, feature length and the model's fingerprint stand in its metadata; what it was
trained on, how well it does and what it is not for stand in MODEL_CARD.md beside it. A card of this model that is there
already is kept as it is, as it may have been completed by hand; one of another model is an error.

onnx needs an extra: pip install 'ecn_dist[export]'."""

EXAMPLE = "example: ecn-dist export --checkpoint runs/m2d --format onnx --output exported/m2d.onnx"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ecn-dist export",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, choices=list(exporting.FORMATS))
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="ending in .onnx, .pt (torchscript) or .pt2"
    )
    add_model_options(parser, device=False)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """Export the model, write its card, and say how exactly the file computes."""
    options = parse(argv)
    exporting.check_export(options.format, options.output)
    embedder = Embedder.load(options.checkpoint, "cpu", options.config)
    card = options.output.absolute().parent / model_card.NAME
    keeps_card = model_card.has_card(card, embedder.fingerprint)
    facts = None if keeps_card else model_card.facts_of(options.checkpoint, options.config)
    metadata = exporting.describe(embedder.backbone, embedder.height, embedder.width, embedder.fingerprint)
    difference = exporting.export(embedder.backbone, options.format, options.output, metadata)
    print(f"wrote {options.output}: within {difference:.1e} of the model on random input")
    if facts is None:
        print(f"kept {card} as it is, as it is this model's; remove it to have it written anew")
    else:
        model_card.write_card(card, embedder.backbone, flatten(embedder.config), facts)
        print(f"wrote {card}: complete it before you pass the model on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
